"""Runs that stop: killed, asked to, out of disk, out of workers, on a bad loss; and what is left of them."""

import json
import os
import re
import signal
import time

import pytest
import torch
from training_runs import MODEL, PLAIN, differences, finish, load, settings, start, write_pictures

import main
import run_setup
import training
from checkpoint import CheckpointError
from datasets import DataError
from engine import NonFiniteLossError

EVERYTHING = (  # whatever draws random numbers or keeps a state
    *PLAIN,
    *("--epochs", "3", "--drop-path", "0.2", "--mixup", "0.8", "--cutmix", "1.0", "--model-ema-decay", "0.8"),
    *("--sched", "cosine", "--lr-noise", "0.0", "1.0", "--if_random_token_rank", "--save-every", "1"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The last checkpoint of a run that nothing interrupted, and the lines of its log."""
    out = tmp_path_factory.mktemp("whole")
    code, text = finish(start(*EVERYTHING, "--data-path", data, "--output_dir", out))
    assert code == 0, text
    return load(out / "checkpoint.pth"), (out / "log.txt").read_text()


def assert_same_run(out, whole):
    expected, log = whole
    saved = load(out / "checkpoint.pth")
    for name in expected:
        if name != "args":
            assert differences(expected[name], saved[name], name) == []
    assert (out / "log.txt").read_text() == log


def wait_for(process, out, epoch, step):
    """Wait until the run has saved this step or a later one."""
    for _ in range(6000):
        assert process.poll() is None, process.communicate()[0]
        if (out / "checkpoint.pth").exists():
            saved = load(out / "checkpoint.pth")
            if (saved["epoch"] + 1, saved["step"]) >= (epoch, step):
                return
        time.sleep(0.02)
    raise AssertionError("the run saved nothing")


@pytest.mark.parametrize(("epoch", "step"), [(0, 1), (1, 2)])
def test_a_killed_run_ends_with_the_same_bits(data, whole, tmp_path, epoch, step):
    """Killed within an epoch; what goes on reads its pictures in processes of their own, which must not matter."""
    out = tmp_path / "run"
    words = (*EVERYTHING, "--data-path", data, "--output_dir", out, "--auto-resume")
    process = start(*words)
    wait_for(process, out, epoch, step)
    process.kill()
    process.communicate()
    with open(out / "log.txt", "a") as log:
        log.write('{"train_lr": 0.1, "tra')  # cut short by the kill
    code, text = finish(start(*words, "--num_workers", "2"))
    assert code == 0, text
    assert "resumed: " in text
    assert_same_run(out, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_saves_when_its_workers_are_asked_to_stop_too(data, whole, tmp_path, number):
    """As a batch system, `timeout` or Ctrl-C does it."""
    out = tmp_path / "run"
    words = (*EVERYTHING, "--data-path", data, "--output_dir", out, "--auto-resume")
    process = start(*words, "--num_workers", "2")
    wait_for(process, out, 0, 2)
    os.killpg(process.pid, number)
    code, text = finish(process)
    assert code == 128 + number, text
    assert "go on with the same command and --auto-resume" in text
    assert "Traceback" not in text
    code, text = finish(start(*words))
    assert code == 0, text
    assert_same_run(out, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on(data, whole, tmp_path, number):
    out = tmp_path / "run"
    words = (*EVERYTHING, "--data-path", data, "--output_dir", out, "--auto-resume")
    process = start(*words)
    wait_for(process, out, 0, 2)
    process.send_signal(number)
    code, text = finish(process)
    assert code == 128 + number, text
    assert "go on with the same command and --auto-resume" in text
    assert "Traceback" not in text
    code, text = finish(start(*words))
    assert code == 0, text
    assert_same_run(out, whole)


def test_a_run_goes_on_with_the_evaluation_of_an_epoch(data, whole, tmp_path, capsys, monkeypatch):
    """Killed after the last step of an epoch: nothing of that epoch is left to train, nor does it tell the rate."""

    def killed(run):
        raise KeyboardInterrupt

    words = [str(word) for word in (*EVERYTHING, "--data-path", data, "--output_dir", tmp_path, "--auto-resume")]
    with monkeypatch.context() as patch:
        patch.setattr(training, "_evaluate", killed)
        assert main.run(words) == 130
    saved = load(tmp_path / "checkpoint.pth")
    assert (saved["epoch"], saved["step"]) == (-1, 3)
    capsys.readouterr()
    assert main.run(words) == 0
    assert re.findall(r"\d+ epochs? to go", capsys.readouterr().out) == ["1 epoch to go"]
    assert_same_run(tmp_path, whole)


def test_a_finished_run_has_nothing_left_to_do(data, tmp_path, capsys):
    words = [str(w) for w in (*PLAIN, "--data-path", data, "--output_dir", tmp_path, "--epochs", "1", "--auto-resume")]
    assert main.run(words) == 0
    before = (tmp_path / "checkpoint.pth").read_bytes(), (tmp_path / "log.txt").read_text()
    assert main.run(words) == 0
    assert "nothing left to do" in capsys.readouterr().out
    assert ((tmp_path / "checkpoint.pth").read_bytes(), (tmp_path / "log.txt").read_text()) == before


def test_best_accuracy_outlives_a_resume(data, tmp_path):
    words = (*PLAIN, "--data-path", data, "--output_dir", tmp_path)
    assert main.run([str(w) for w in (*words, "--epochs", "1")]) == 0
    saved = load(tmp_path / "checkpoint.pth")
    saved["max_accuracy"] = 101.0
    torch.save(saved, tmp_path / "checkpoint.pth")
    (tmp_path / "best_checkpoint.pth").unlink(missing_ok=True)
    assert main.run([str(w) for w in (*words, "--epochs", "2", "--resume", tmp_path / "checkpoint.pth")]) == 0
    assert load(tmp_path / "checkpoint.pth")["max_accuracy"] == 101.0
    assert not (tmp_path / "best_checkpoint.pth").exists()


def test_resuming_upstreams_checkpoint(data, tmp_path, capsys):
    """No steps, no random states, no average: it starts with the next epoch, and an average of its own."""
    words = (*PLAIN, "--data-path", data, "--output_dir", tmp_path, "--epochs", "1", "--no-model-ema")
    assert main.run([str(word) for word in words]) == 0
    saved = load(tmp_path / "checkpoint.pth")
    upstream = {key: saved[key] for key in ("model", "optimizer", "lr_scheduler", "epoch", "scaler", "args")}
    torch.save(upstream, tmp_path / "upstream.pth")
    run = run_setup.prepare(
        settings(*PLAIN, "--data-path", data, "--epochs", "3"),
        torch.device("cpu"),
        run_setup.read_checkpoint_for(None, str(tmp_path / "upstream.pth")),
    )
    assert (run.position.epoch, run.position.step) == (1, 0)
    assert differences(run.average.module.state_dict(), run.model.state_dict()) == []
    assert differences(saved["optimizer"]["state"], run.optimizer.state_dict()["state"]) == []


def test_another_length_of_the_epoch_is_refused(data, tmp_path, capsys):
    words = (*PLAIN, "--data-path", data, "--output_dir", tmp_path)
    assert main.run([str(w) for w in (*words, "--epochs", "1")]) == 0
    saved = load(tmp_path / "checkpoint.pth")
    torch.save(saved | {"epoch": -1, "step": 2}, tmp_path / "checkpoint.pth")
    capsys.readouterr()
    assert main.run([str(w) for w in (*words, "--batch-size", "4", "--auto-resume")]) == 2
    errors = capsys.readouterr().err
    assert "2 of the 3 steps" in errors
    assert errors.count("\n") == 1


@pytest.fixture(scope="module")
def one_epoch(data, tmp_path_factory):
    """The command line and the checkpoint of a run of one epoch."""
    out = tmp_path_factory.mktemp("one_epoch")
    words = [str(word) for word in (*PLAIN, "--data-path", data)]
    assert main.run([*words, "--epochs", "1", "--output_dir", str(out)]) == 0
    return [*words, "--epochs", "2"], out / "checkpoint.pth"


def refused(capsys, words) -> str:
    """What `main.py` says in its one sentence."""
    capsys.readouterr()
    assert main.run([str(word) for word in words]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    return errors


@pytest.mark.parametrize("optimizer", ["sgd", "lamb"])
@pytest.mark.parametrize("named", [True, False])
def test_another_optimizer_is_refused(one_epoch, tmp_path, capsys, optimizer, named):
    words, path = one_epoch
    saved = load(path)
    if not named:
        del saved["args"]
    torch.save(saved, tmp_path / "c.pth")
    errors = refused(capsys, [*words, "--resume", tmp_path / "c.pth", "--opt", optimizer, "--model", MODEL])
    assert f"--opt {optimizer}" in errors
    assert ("was trained with --opt adamw" in errors) == named


def test_an_optimizers_state_of_other_shapes_is_refused(one_epoch, tmp_path, capsys):
    words, path = one_epoch
    saved = load(path)
    saved["optimizer"]["state"][0]["exp_avg"] = torch.zeros(7)
    torch.save(saved, tmp_path / "c.pth")
    assert "exp_avg has the shape (7,) for weights of " in refused(capsys, [*words, "--resume", tmp_path / "c.pth"])


def test_a_new_run_keeps_the_checkpoints_of_an_earlier_one(one_epoch, tmp_path, capsys):
    words, path = one_epoch
    (tmp_path / "checkpoint.pth").write_bytes(path.read_bytes())
    (tmp_path / "best_checkpoint.pth").write_bytes(b"best")
    (tmp_path / "checkpoint-1.pth").write_bytes(b"older still")
    words = [*words, "--epochs", "1", "--finetune", tmp_path / "checkpoint.pth", "--output_dir", tmp_path]
    assert main.run([str(word) for word in words]) == 0
    assert "kept as checkpoint-2.pth, best_checkpoint-2.pth; --auto-resume would have" in capsys.readouterr().out
    assert (tmp_path / "checkpoint-1.pth").read_bytes() == b"older still"
    assert (tmp_path / "checkpoint-2.pth").read_bytes() == path.read_bytes()
    assert (tmp_path / "best_checkpoint-2.pth").read_bytes() == b"best"
    assert load(tmp_path / "checkpoint.pth")["epoch"] == 0
    assert not (tmp_path / "log-2.txt").exists()


def test_a_run_resumed_from_elsewhere_keeps_what_is_in_its_folder(one_epoch, tmp_path, capsys):
    words, path = one_epoch
    out = tmp_path / "out"
    out.mkdir()
    (out / "checkpoint.pth").write_bytes(b"of another run")
    (out / "log.txt").write_text('{"epoch": 7}\n')
    words = [*words, "--epochs", "2", "--resume", path, "--output_dir", out]
    assert main.run([str(word) for word in words]) == 0
    assert "kept as log-1.txt, checkpoint-1.pth" in capsys.readouterr().out
    assert (out / "checkpoint-1.pth").read_bytes() == b"of another run"
    assert [json.loads(line)["epoch"] for line in (out / "log.txt").read_text().splitlines()] == [1]
    words[-1] = out.parent / "out" / ".." / "out"
    words[words.index(path)] = out / "checkpoint.pth"
    assert main.run([*map(str, words), "--epochs", "3"]) == 0
    assert [json.loads(line)["epoch"] for line in (out / "log.txt").read_text().splitlines()] == [1, 2]
    assert not (out / "log-2.txt").exists()


def last_good(tmp_path, data):
    words = [str(w) for w in (*PLAIN, "--data-path", data, "--output_dir", tmp_path)]
    assert main.run([*words, "--epochs", "1"]) == 0
    return [*words, "--epochs", "3", "--auto-resume"], (tmp_path / "checkpoint.pth").read_bytes()


def test_a_bad_loss_leaves_the_last_checkpoint(data, tmp_path, capsys, monkeypatch):
    words, before = last_good(tmp_path, data)
    monkeypatch.setattr(run_setup, "build_criterion", lambda *_: lambda scores, labels: scores.sum() * float("nan"))
    assert main.run(words) == 2
    errors = capsys.readouterr().err
    assert "The loss of a step in epoch 1 is nan" in errors
    assert "checkpoint.pth is the last checkpoint" in errors
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
    assert issubclass(NonFiniteLossError, RuntimeError)


def test_a_bad_loss_before_any_checkpoint(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_setup, "build_criterion", lambda *_: lambda scores, labels: scores.sum() * float("nan"))
    errors = refused(capsys, [*PLAIN, "--data-path", data, "--output_dir", tmp_path])
    assert errors.endswith(f"Nothing was saved yet, so there is no {tmp_path / 'checkpoint.pth'} to go on from.\n")


@pytest.mark.parametrize("best", [False, True])
def test_a_truncated_checkpoint_of_the_run(one_epoch, tmp_path, capsys, best):
    words, path = one_epoch
    (tmp_path / "checkpoint.pth").write_bytes(path.read_bytes()[:-99])
    if best:
        (tmp_path / "best_checkpoint.pth").write_bytes(path.read_bytes())
    errors = refused(capsys, [*words, "--output_dir", tmp_path, "--auto-resume"])
    assert errors.endswith("remove it to begin anew\n")
    assert (f"--resume {tmp_path / 'best_checkpoint.pth'} in place of --auto-resume" in errors) == best


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device ("),
        (RuntimeError("[enforce fail at inline_container.cc:595] . unexpected pos 64 vs 0"), "the disk may be full ("),
    ],
)
def test_a_full_disk_leaves_the_last_checkpoint(data, tmp_path, capsys, monkeypatch, error, reason):
    words, before = last_good(tmp_path, data)

    def full(contents, path):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", full)
    assert main.run(words) == 2
    errors = capsys.readouterr().err
    assert f"cannot write {tmp_path / 'checkpoint.pth'}: " in errors
    assert reason in errors
    assert errors.endswith(" MB are free on it); make room or name another folder\n")
    assert "Traceback" not in errors
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))
    assert issubclass(CheckpointError, ValueError)


def die_in_a_worker(path):
    del path
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_lost_worker_leaves_the_last_checkpoint(data, tmp_path, capsys, monkeypatch):
    import class_folders
    import datasets

    del class_folders
    words, before = last_good(tmp_path, data)
    monkeypatch.setattr(datasets, "open_picture", die_in_a_worker)
    assert main.run([*words, "--num_workers", "1"]) == 2
    errors = capsys.readouterr().err
    assert "A process that reads pictures was lost" in errors
    assert "checkpoint.pth is the last checkpoint" in errors
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
    assert issubclass(DataError, ValueError)


# --- several processes -----------------------------------------------------------------------------------------------

TWO = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", "29613")


@pytest.mark.parametrize("launcher", [TWO, ("-m", "torch.distributed.launch", "--nproc_per_node=2", "--use_env")])
def test_two_processes_equal_one(data, tmp_path, launcher):
    """The same pictures a step: weights, average, log; each validation picture counted once."""
    common = ("--data-path", data, "--epochs", "2", "--no-repeated-aug", "--clip-grad", "1", "--model-ema-decay", "0.8")
    common += ("--mend", "ema-best")
    code, text = finish(start(*PLAIN, *common, "--output_dir", tmp_path / "one"))
    assert code == 0, text
    words = (*PLAIN, *common, "--batch-size", "4", "--dist-eval", "--output_dir", tmp_path / "two")
    code, text = finish(start(*words, launcher=launcher))
    assert code == 0, text
    one, two = (load(tmp_path / name / "checkpoint.pth") for name in ("one", "two"))
    for number, state in one["optimizer"]["state"].items():
        for moment in ("exp_avg", "exp_avg_sq"):
            bound = 1e-5 * state[moment].abs().max().item()
            torch.testing.assert_close(two["optimizer"]["state"][number][moment], state[moment], rtol=1e-5, atol=bound)
    # AdamW divides by the size of the gradient: one near zero moves its weight by some of the rounding of the others.
    for part in ("model", "model_ema"):
        for name, weight in one[part].items():
            torch.testing.assert_close(two[part][name], weight, rtol=1e-5, atol=1e-4, msg=f"{part} {name}")
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.txt").read_text().splitlines()] for name in ("one", "two")
    ]
    for line, other in zip(*logs, strict=True):
        assert other == pytest.approx(line, rel=1e-5)


def test_two_processes_resume(data, tmp_path):
    """Each with its own random numbers: killed and gone on, the same bits as uninterrupted."""
    words = (*EVERYTHING, "--epochs", "2", "--batch-size", "4", "--data-path", data, "--no-repeated-aug")
    code, text = finish(start(*words, "--output_dir", tmp_path / "whole", launcher=TWO))
    assert code == 0, text
    out = tmp_path / "killed"
    words = (*words, "--output_dir", out, "--auto-resume")
    process = start(*words, launcher=TWO)
    wait_for(process, out, 0, 2)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on
    process.communicate()
    code, text = finish(start(*words, launcher=TWO))
    assert code == 0, text
    expected, saved = load(tmp_path / "whole/checkpoint.pth"), load(out / "checkpoint.pth")
    for name in ("model", "model_ema", "optimizer", "processes"):
        assert differences(expected[name], saved[name], name) == []
