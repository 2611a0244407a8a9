"""Handing a training in to a SLURM cluster, with a stand-in for submitit."""

import os
import pickle
import sys
import types
from pathlib import Path

import pytest

import main
import run_with_submitit
from flags import get_args_parser

GROUP_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_RESTART_COUNT")


@pytest.fixture
def submitit(monkeypatch):
    """A stand-in that keeps what it is handed; `place` is where a task believes to be."""
    module = types.ModuleType("submitit")
    module.given, module.refusal = {}, None
    module.place = types.SimpleNamespace(job_id="77", global_rank=9, local_rank=1, num_tasks=16)

    class AutoExecutor:
        def __init__(self, **options):
            module.given["executor"] = options

        def update_parameters(self, **parameters):
            module.given["parameters"] = parameters

        def submit(self, task):
            if module.refusal:
                raise module.refusal
            module.given["task"] = pickle.loads(pickle.dumps(task))
            return types.SimpleNamespace(job_id="77")

    module.AutoExecutor = AutoExecutor
    module.JobEnvironment = lambda: module.place
    module.helpers = types.SimpleNamespace(DelayedSubmission=lambda task: ("again", task))
    monkeypatch.setitem(sys.modules, "submitit", module)
    return module


@pytest.fixture
def trained(monkeypatch):
    """The command lines that main.main gets; group variables and sys.path are put back."""
    for name in GROUP_VARIABLES:
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "path", list(sys.path))
    calls = []
    monkeypatch.setattr(main, "main", calls.append)
    return calls


def test_all_flags_of_main_and_those_of_the_cluster_with_their_defaults():
    args = vars(run_with_submitit.parse_args([]))
    cluster = {
        "ngpus": 8,
        "nodes": 2,
        "timeout": 2800,
        "job_dir": "",
        "partition": "learnfair",
        "use_volta32": False,
        "comment": "",
    }
    assert args == {**vars(get_args_parser().parse_args([])), **cluster}


def test_a_job_is_described_to_the_cluster(submitit, tmp_path, capsys):
    folder = tmp_path / "a b" / "%j"
    assert run_with_submitit.run(["--job_dir", str(folder), "--ngpus", "4", "--nodes", "3", "--timeout", "60"]) == 0
    assert submitit.given["executor"] == {"folder": str(folder), "slurm_max_num_timeout": 30}
    assert submitit.given["parameters"] == {
        "name": "deit",
        "mem_gb": 160,
        "gpus_per_node": 4,
        "tasks_per_node": 4,
        "cpus_per_task": 10,
        "nodes": 3,
        "timeout_min": 60,
        "slurm_partition": "learnfair",
        "slurm_signal_delay_s": 120,
    }
    assert (tmp_path / "a b").is_dir()
    assert capsys.readouterr().out == f"Submitted job 77; its logs and checkpoints go to {tmp_path}/a b/77\n"


def test_volta_comment_and_partition_are_passed_on(submitit, tmp_path):
    flags = ["--use_volta32", "--comment", "for the paper", "--partition", "gpu"]
    assert run_with_submitit.run(["--job_dir", str(tmp_path / "%j"), *flags]) == 0
    parameters = submitit.given["parameters"]
    assert parameters["slurm_constraint"] == "volta32gb"
    assert parameters["slurm_comment"] == "for the paper"
    assert parameters["slurm_partition"] == "gpu"


def test_a_task_takes_its_place_and_trains(submitit, trained, tmp_path):
    run_with_submitit.run(["--job_dir", str(tmp_path / "%j"), "--model", "vim_pico_patch4_32", "--lr", "0.1"])
    submitit.given["task"]()
    (args,) = trained
    assert args.output_dir == str(tmp_path / "77")
    assert (args.model, args.lr, args.auto_resume) == ("vim_pico_patch4_32", 0.1, True)
    assert (args.rank, args.gpu, args.world_size) == (9, 1, 16)
    assert [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["9", "1", "16"]
    assert args.dist_url.startswith(f"file://{tmp_path}/.meeting-")
    assert str(Path(run_with_submitit.__file__).parent) in sys.path


def test_an_evaluation_does_not_resume(submitit, trained, tmp_path):
    run_with_submitit.run(["--job_dir", str(tmp_path / "%j"), "--eval"])
    submitit.given["task"]()
    assert trained[0].auto_resume is False


def test_all_tasks_of_a_start_meet_in_one_file_and_those_of_the_next_in_another(
    submitit, trained, tmp_path, monkeypatch
):
    run_with_submitit.run(["--job_dir", str(tmp_path / "%j")])
    pickled = pickle.dumps(submitit.given["task"])
    for _ in range(2):
        pickle.loads(pickled)()
    assert trained[0].dist_url == trained[1].dist_url
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # a machine broke down: SLURM starts the same pickle once more
    pickle.loads(pickled)()
    assert trained[2].dist_url != trained[0].dist_url


def test_a_job_that_lost_its_machines_goes_on_where_it_was(submitit, trained, tmp_path):
    run_with_submitit.run(["--job_dir", str(tmp_path / "%j")])
    task = submitit.given["task"]
    task()
    trained[0].output_dir = trained[0].lr = None  # what main makes of its arguments is its own affair
    called, again = task.checkpoint()
    assert called == "again"
    pickle.loads(pickle.dumps(again))()
    first, second = trained
    assert (second.output_dir, second.lr, second.auto_resume) == (str(tmp_path / "77"), 5e-4, True)
    assert second.dist_url != first.dist_url


def test_without_job_dir_it_is_upstreams_folder(submitit, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_with_submitit, "CHECKPOINTS", tmp_path)
    monkeypatch.setenv("USER", "somebody")
    assert run_with_submitit.run([]) == 2
    assert capsys.readouterr().err == (
        f"error: There is no folder {tmp_path}/somebody/experiments: name one that all machines share, "
        "as in --job_dir /shared/folder/%j.\n"
    )
    (tmp_path / "somebody" / "experiments").mkdir(parents=True)
    assert run_with_submitit.run([]) == 0
    task = submitit.given["task"]
    assert task.args.output_dir == str(tmp_path / "somebody" / "experiments" / "%j")
    assert task.shared == str(tmp_path / "somebody" / "experiments")


def test_the_shared_folder_is_above_any_number_of_the_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_with_submitit.find_folders("runs/%j/logs") == (tmp_path / "runs" / "%j" / "logs", tmp_path / "runs")
    assert run_with_submitit.find_folders("runs/vim") == (tmp_path / "runs" / "vim", tmp_path / "runs")


def test_a_folder_that_cannot_be_made_is_one_sentence(submitit, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run_with_submitit.run(["--job_dir", str(tmp_path / "file" / "runs" / "%j")]) == 2
    assert capsys.readouterr().err.endswith("file/runs cannot be made: Not a directory.\n")


def test_a_missing_submitit_is_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert run_with_submitit.run(["--job_dir", str(tmp_path / "runs" / "%j")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: Handing in a job needs the package submitit")
    assert " -m pip install submitit`" in line
    assert list(tmp_path.iterdir()) == []


def test_a_refused_job_is_one_sentence(submitit, tmp_path, capsys):
    submitit.refusal = RuntimeError("Invalid partition")
    assert run_with_submitit.run(["--job_dir", str(tmp_path / "%j")]) == 2
    assert capsys.readouterr().err == "error: submitit could not hand in the job: Invalid partition\n"


@pytest.mark.parametrize("flag", ["--ngpus", "--nodes", "--timeout"])
def test_numbers_must_be_positive(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_with_submitit.run([flag, "0"])
    assert flag in capsys.readouterr().err
