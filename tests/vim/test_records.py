"""What a training run writes down: log.txt through kills and resumes, the picture, TensorBoard, MLflow."""

import argparse
import errno
import json
import os
import sys
import types

import pytest

import records
from checkpoint_sources import CheckpointError
from flags import UsageError
from records import RunRecord, draw_summary


def command_line(**changes):
    settings = {"model": "vim_pico_patch4_32", "mend": (), "tensorboard": False, "mlflow": False, "output_dir": ""}
    return argparse.Namespace(**{**settings, **changes})


def numbers(epoch, **more):
    """The numbers of an epoch, in another order than log.txt has them."""
    first = {"epoch": epoch, "n_parameters": 1234, "test_acc1": 10.0 + epoch, "test_acc5": 50.0 + epoch}
    return {**first, "train_lr": 1e-3, "train_loss": 6.0 - epoch, "test_loss": 5.0 - epoch, **more}


def epochs_of(folder):
    return [json.loads(line)["epoch"] for line in (folder / "log.txt").read_text().splitlines()]


@pytest.fixture
def tensorboard(monkeypatch):
    """A stand-in for torch.utils.tensorboard that keeps every call."""
    calls = []

    class SummaryWriter:
        def __init__(self, **options):
            calls.append(("new", options))

        def __getattr__(self, name):
            return lambda *values: calls.append((name, *values))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return calls


@pytest.fixture
def mlflow(monkeypatch):
    """A stand-in for MLflow that keeps every call; names in `broken` raise."""
    module = types.ModuleType("mlflow")
    module.calls, module.broken = [], set()

    def recorder(name):
        def call(*values, **options):
            if name in module.broken:
                raise RuntimeError(f"{name}: no answer\nand more")
            module.calls.append((name, values, options))

        return call

    for name in ("start_run", "log_param", "log_metric", "end_run"):
        setattr(module, name, recorder(name))
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return module


def test_a_line_has_upstreams_keys_in_upstreams_order_then_the_others(tmp_path):
    folder = tmp_path / "new" / "folder"
    record = RunRecord(folder, command_line(), resume=False)
    record.epoch(numbers(0, unreadable=2, ema_acc1=9.5))
    record.epoch(numbers(1))
    first, second = (json.loads(line) for line in (folder / "log.txt").read_text().splitlines())
    usual = ["train_lr", "train_loss", "test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters"]
    assert list(first) == [*usual, "unreadable", "ema_acc1"]
    assert list(second) == usual
    assert first == numbers(0, unreadable=2, ema_acc1=9.5)


def test_a_line_is_on_the_disk_when_epoch_returns(tmp_path, monkeypatch):
    record = RunRecord(tmp_path, command_line(), resume=False)
    synced = []
    monkeypatch.setattr(records.os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    record.epoch(numbers(0))
    assert synced == [(tmp_path / "log.txt").stat().st_size]


def test_epochs_that_run_again_stand_in_the_log_once(tmp_path):
    record = RunRecord(tmp_path, command_line(), resume=False)
    for epoch in range(4):
        record.epoch(numbers(epoch))
    record = RunRecord(tmp_path, command_line(), resume=True)
    assert epochs_of(tmp_path) == [0, 1, 2, 3]
    record.rewind(2)
    assert epochs_of(tmp_path) == [0, 1]
    record.epoch(numbers(2, unreadable=1))
    record.epoch(numbers(3))
    assert epochs_of(tmp_path) == [0, 1, 2, 3]
    record.rewind(0)
    assert epochs_of(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt"]


@pytest.mark.parametrize("half", ['{"train_lr": 0.001, "tra', "\x00\x00\x00", '{"epoch": ', '7\n"text"\n{}'])
def test_half_a_line_is_dropped_on_resume(tmp_path, half):
    whole = json.dumps(numbers(0)) + "\n"
    (tmp_path / "log.txt").write_text(whole + half)
    RunRecord(tmp_path, command_line(), resume=True).epoch(numbers(1))
    assert epochs_of(tmp_path) == [0, 1]
    assert (tmp_path / "log.txt").read_text().startswith(whole)


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    (tmp_path / "log.txt").write_text(json.dumps(numbers(0)))
    RunRecord(tmp_path, command_line(), resume=True).epoch(numbers(1))
    assert epochs_of(tmp_path) == [0, 1]


def test_bytes_that_are_no_text_do_not_stop_a_resume(tmp_path):
    (tmp_path / "log.txt").write_bytes(json.dumps(numbers(0)).encode() + b"\n\xff\xfe")
    RunRecord(tmp_path, command_line(), resume=True)
    assert epochs_of(tmp_path) == [0]


def test_a_new_run_puts_an_older_log_aside(tmp_path):
    for run in range(3):
        RunRecord(tmp_path, command_line(), resume=False).epoch(numbers(run))
    assert epochs_of(tmp_path) == [2]
    assert [json.loads((tmp_path / f"log-{number}.txt").read_text())["epoch"] for number in (1, 2)] == [0, 1]


@pytest.mark.parametrize("resume", [False, True])
def test_what_killed_processes_left_is_removed(tmp_path, resume):
    alive = [f".checkpoint.pth.{os.getppid()}.tmp", ".checkpoint.pth.mine.tmp", ".other.txt.99999999.tmp"]
    dead = [f".checkpoint.pth.{os.getpid()}.tmp", ".checkpoint.pth.99999999.tmp", f".log.txt.{10**30}.tmp"]
    for name in alive + dead:
        (tmp_path / name).write_text("half")
    RunRecord(tmp_path, command_line(), resume=resume)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*alive, "log.txt"])


def test_a_failed_rewrite_leaves_the_log_as_it_was(tmp_path, monkeypatch):
    record = RunRecord(tmp_path, command_line(), resume=False)
    record.epoch(numbers(0))

    def no_space(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records.os, "fsync", no_space)
    with pytest.raises(CheckpointError, match=r"^Cannot write .*log\.txt: No space left on device\.$"):
        record.rewind(0)
    assert epochs_of(tmp_path) == [0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt"]
    with pytest.raises(CheckpointError, match=r"^Cannot write .*log\.txt: No space left on device\.$"):
        record.epoch(numbers(1))
    with pytest.raises(UsageError, match=r"^Cannot write .*log\.txt: No space left on device\.$"):
        RunRecord(tmp_path, command_line(), resume=True)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"^Cannot write .*file/run/log\.txt: Not a directory\.$"):
        RunRecord(tmp_path / "file" / "run", command_line(), resume=False)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    record = RunRecord(None, command_line(), resume=False)
    record.rewind(0)
    record.epoch(numbers(0))
    record.close(finished=True)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_tensorboard_gets_the_numbers_and_forgets_what_runs_again(tmp_path, tensorboard):
    record = RunRecord(tmp_path, command_line(tensorboard=True), resume=True)
    assert tensorboard == []
    record.epoch(numbers(5, ema_acc1=9.5))
    assert tensorboard[0] == ("new", {"log_dir": str(tmp_path), "purge_step": 5})
    scalars = {call[1]: call[2:] for call in tensorboard if call[0] == "add_scalar"}
    assert scalars == {
        "train_lr": (1e-3, 5),
        "train_loss": (1.0, 5),
        "test_loss": (0.0, 5),
        "test_acc1": (15.0, 5),
        "test_acc5": (55.0, 5),
        "ema_acc1": (9.5, 5),
    }
    assert tensorboard[-1] == ("flush",)
    record.rewind(3)
    assert tensorboard[-1] == ("close",)
    record.epoch(numbers(3))
    assert [call[1]["purge_step"] for call in tensorboard if call[0] == "new"] == [5, 3]
    record.close(finished=True)
    assert tensorboard[-1] == ("close",)


def test_tensorboard_needs_a_folder(tensorboard):
    with pytest.raises(UsageError, match="--output_dir"):
        RunRecord(None, command_line(tensorboard=True), resume=False)


@pytest.mark.parametrize(
    ("flag", "module"),
    [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow")],
    ids=["tensorboard", "mlflow"],
)
def test_a_missing_package_is_said_before_anything_is_touched(tmp_path, monkeypatch, flag, module):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "log.txt").write_text(json.dumps(numbers(0)))
    with pytest.raises(UsageError, match=f"^--{flag} needs the package {flag} .* -m pip install {flag}` installs it"):
        RunRecord(tmp_path, command_line(**{flag: True}), resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


def test_trackers_are_imported_only_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    RunRecord(tmp_path, command_line(), resume=False).epoch(numbers(0))


def test_mlflow_gets_arguments_numbers_and_the_end(tmp_path, mlflow):
    args = command_line(mlflow=True, given=("model",), aa="x" * 9999, opt_betas=None)
    record = RunRecord(tmp_path / "a run", args, resume=False)
    assert mlflow.calls[0] == ("start_run", (), {"run_name": "a run"})
    parameters = dict(values for name, values, _ in mlflow.calls if name == "log_param")
    assert set(parameters) == set(vars(args)) - {"given"}
    assert (parameters["model"], parameters["opt_betas"], parameters["aa"]) == (args.model, "None", "x" * 500)
    del mlflow.calls[:]
    record.epoch(numbers(7))
    record.epoch(numbers(8))
    assert [values for name, values, _ in mlflow.calls if name == "log_param"] == [("n_parameters", "1234")]
    metrics = [(*values, options["step"]) for name, values, options in mlflow.calls if name == "log_metric"]
    assert metrics == [(key, numbers(epoch)[key], epoch) for epoch in (7, 8) for key in records.FIRST_KEYS]
    record.close(finished=True)
    assert mlflow.calls[-1] == ("end_run", ("FINISHED",), {})


def test_a_stopped_run_is_no_finished_one_to_mlflow(mlflow):
    record = RunRecord(None, command_line(mlflow=True), resume=False)
    assert mlflow.calls[0] == ("start_run", (), {"run_name": None})
    record.close(finished=False)
    assert mlflow.calls[-1] == ("end_run", ("FAILED",), {})


def test_mlflow_that_cannot_start_is_one_sentence(mlflow):
    mlflow.broken.add("start_run")
    with pytest.raises(UsageError, match=r"^--mlflow: MLflow cannot start a run: start_run: no answer\.$"):
        RunRecord(None, command_line(mlflow=True), resume=False)


def test_mlflow_that_fails_later_is_noted_once_and_ends_nothing(tmp_path, mlflow, capsys):
    record = RunRecord(tmp_path, command_line(mlflow=True), resume=False)
    mlflow.broken.add("log_metric")
    record.epoch(numbers(0))
    record.epoch(numbers(1))
    assert capsys.readouterr().out == "note: MLflow is told no more: log_metric: no answer\n"
    assert epochs_of(tmp_path) == [0, 1]


def test_a_parameter_that_mlflow_refuses_is_noted(mlflow, capsys):
    mlflow.broken.add("log_param")
    record = RunRecord(None, command_line(mlflow=True), resume=False)
    assert "note: MLflow did not take the parameter model: log_param: no answer\n" in capsys.readouterr().out
    record.epoch(numbers(0))
    assert any(name == "log_metric" for name, _, _ in mlflow.calls)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figure_module = pytest.importorskip("matplotlib.figure")
    figures = []
    save = figure_module.Figure.savefig

    def keep(figure, *values, **options):
        figures.append(figure)
        save(figure, *values, **options)

    monkeypatch.setattr(figure_module.Figure, "savefig", keep)
    return figures


def lines_of(axes):
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def test_close_draws_the_summary(tmp_path, drawn, capsys):
    record = RunRecord(tmp_path, command_line(model="a $strange$ name"), resume=False)
    for epoch, accuracy in enumerate((20.0, 40.0, 40.0)):
        record.epoch(numbers(epoch, test_acc1=accuracy, ema_acc1=10.0 * epoch, ema_acc5=11.0 * epoch))
    record.close(finished=False)
    assert capsys.readouterr().out == ""
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    losses, accuracies, rates = figure.axes
    assert figure.get_suptitle() == "a $strange$ name"
    assert {axes.get_xlabel() for axes in figure.axes} == {"epoch"}
    assert set(lines_of(losses)) == {"training", "validation"}
    assert set(lines_of(accuracies)) == {"at 1", "at 5", "at 1, EMA", "at 5, EMA", "best epoch: 1, 40.00 % at 1"}
    assert set(lines_of(rates)) == {"learning rate"}
    assert {axes.lines[-1].get_linestyle() for axes in figure.axes} == {":"}  # the best epoch
    assert list(lines_of(accuracies)["at 1, EMA"].get_xdata()) == [0, 1, 2]
    assert list(lines_of(losses)["training"].get_ydata()) == [6.0, 5.0, 4.0]


def test_the_best_epoch_is_the_averages_where_that_chooses(tmp_path, drawn):
    record = RunRecord(tmp_path, command_line(mend=["ema-best"]), resume=False)
    for epoch in range(3):
        record.epoch(numbers(epoch, ema_acc1=30.0 - epoch))
    record.close(finished=True)
    assert "best epoch: 0, 30.00 % at 1 (EMA)" in lines_of(drawn[0].axes[1])


def test_a_log_of_upstream_with_gaps_is_drawn(tmp_path, drawn):
    log = tmp_path / "log.txt"
    entries = [numbers(4), numbers(5), {**numbers(4), "train_loss": 3.5}, numbers(6, train_loss=float("nan"))]
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    draw_summary(log, tmp_path / "out.png")
    (figure,) = drawn
    assert figure.get_suptitle() == tmp_path.name
    training = lines_of(figure.axes[0])["training"]
    assert list(zip(training.get_xdata(), training.get_ydata(), strict=True)) == [(4, 3.5), (5, 1.0)]


@pytest.mark.parametrize(
    ("values", "limits"),
    [([1.0, 4.0], (0, 4.24)), ([2.0, 3.0], (1.94, 3.06)), ([5.0], (0, 5.3)), ([0.0], (0, 1)), ([], (0, 1))],
)
def test_an_axis_begins_at_0_unless_the_lines_would_be_flat(values, limits):
    assert records._limits(values) == pytest.approx(limits)


def test_texts_of_the_picture_do_not_overlap(tmp_path, drawn):
    name = "vim_small_patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed_with_middle_cls_token_div2"
    record = RunRecord(tmp_path, command_line(model=name), resume=False)
    for epoch in range(300):
        record.epoch(numbers(epoch, train_loss=7.0, test_loss=6.0, test_acc1=76.0, ema_acc1=77.0, ema_acc5=99.0))
    record.close(finished=True)
    (figure,) = drawn
    boxes = [figure._suptitle.get_window_extent()]
    for axes in figure.axes:
        boxes += [axes.get_window_extent(), axes.title.get_window_extent(), axes.xaxis.label.get_window_extent()]
        low, high = axes.get_xlim()
        numbers_below = [text for text in axes.get_xticklabels() if low <= text.get_position()[0] <= high]
        boxes += [text.get_window_extent() for text in (*numbers_below, *axes.get_legend().get_texts())]
    for index, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])


def test_without_matplotlib_close_says_so_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    record = RunRecord(tmp_path, command_line(), resume=False)
    record.epoch(numbers(0))
    record.close(finished=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("note: summary.png was not drawn: drawing needs matplotlib")
    assert line.endswith(f"`{sys.executable} -m pip install matplotlib` installs it")


def test_a_picture_that_fails_never_ends_a_run(tmp_path, monkeypatch, capsys):
    def fail(*values, **options):
        raise KeyError("font")

    monkeypatch.setattr(records, "draw_summary", fail)
    record = RunRecord(tmp_path, command_line(), resume=False)
    record.epoch(numbers(0))
    record.close(finished=True)
    assert capsys.readouterr().out == "note: summary.png was not drawn: 'font'\n"


def test_draw_summary_says_what_is_wrong(tmp_path):
    pytest.importorskip("matplotlib")
    log = tmp_path / "log.txt"
    log.write_text("nothing\n")
    with pytest.raises(UsageError, match="holds no finished epoch"):
        draw_summary(log, tmp_path / "out.png")
    log.write_text(json.dumps(numbers(0)))
    with pytest.raises(UsageError, match="No such file or directory"):
        draw_summary(log, tmp_path / "missing" / "out.png")
