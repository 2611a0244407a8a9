"""Meters, checkpoints of the main process, and joining a group of processes."""

import argparse
import builtins
import io

import pytest
import torch
from timm.utils import ModelEma, ModelEmaV2
from torch import nn
from torch.nn import functional

import utils
from flags import UsageError
from progress import Progress, format_seconds
from samplers import ShardSampler

GROUP_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_NTASKS",
)


@pytest.fixture
def environment(monkeypatch):
    for name in GROUP_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch.setenv
    utils.leave_distributed_mode()


def place(**changes) -> argparse.Namespace:
    return argparse.Namespace(**{"world_size": 1, "dist_url": "env://", "device": "cpu", **changes})


def test_smoothed_value_by_hand():
    series = utils.SmoothedValue(window_size=3, fmt="{value:.0f} {median:.0f} {avg:.0f} {max:.0f} {global_avg:.2f}")
    assert str(series) == "-"
    for number in (9, 1, 2, 6):
        series.update(number)
    assert (series.value, series.median, series.avg, series.max) == (6, 2, 3, 6)
    assert series.global_avg == 4.5
    series.update(3, n=4)
    assert series.global_avg == 30 / 8
    assert str(series) == "3 3 4 6 3.75"


def test_metric_logger_keeps_named_meters():
    logger = utils.MetricLogger(delimiter="  ")
    logger.add_meter("lr", utils.SmoothedValue(window_size=1, fmt="{value:.6f}"))
    logger.update(lr=0.5, loss=torch.tensor(2.0))
    logger.update(lr=0.25, loss=4)
    logger.synchronize_between_processes()
    assert logger.loss.global_avg == 3
    assert str(logger) == "lr: 0.250000  loss: 2.0000 (3.0000)"
    with pytest.raises(AttributeError, match=r"no meter 'acc'; known are \['loss', 'lr'\]"):
        _ = logger.acc


def test_log_every_yields_all_and_prints_some(capsys):
    logger = utils.MetricLogger(delimiter=" | ")
    assert list(logger.log_every(range(7), 3, "Head")) == list(range(7))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[:-1]] == ["Head [1/7]", "Head [4/7]", "Head [7/7]"]
    assert "eta: 0:00:00" in lines[2]
    assert lines[-1].startswith("Head Total time: 0:00:0")
    assert list(logger.log_every(iter("ab"), 1)) == ["a", "b"]  # of unknown length
    assert "eta" not in capsys.readouterr().out


def test_progress_without_a_terminal_and_with_one():
    log = io.StringIO()
    progress = Progress("Test", 40, log)
    for _ in range(20):
        progress.advance(2)
    progress.close()
    assert log.getvalue().startswith("Test: 40/40 images, ")
    assert log.getvalue().rstrip().endswith("0:00:00 left")
    assert log.getvalue().count("\n") == 1
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    progress = Progress("Test", 4, terminal)
    progress.advance(4)
    progress.close()
    assert "4/4" in terminal.getvalue()
    assert "img/s" in terminal.getvalue()
    assert format_seconds(3671.4) == "1:01:11"


def test_shards_hold_every_index_once():
    shards = [list(ShardSampler(range(11), 3, rank)) for rank in range(3)]
    assert sorted(index for shard in shards for index in shard) == list(range(11))
    assert [len(shard) for shard in shards] == [4, 4, 3]
    assert [len(ShardSampler(range(11), 3, rank)) for rank in range(3)] == [4, 4, 3]
    with pytest.raises(ValueError, match="got 3"):
        ShardSampler(range(11), 3, 3)


def test_one_process_is_no_group(environment):
    args = place(world_size=5)
    utils.init_distributed_mode(args)
    assert (args.distributed, args.rank, args.world_size, args.gpu) == (False, 0, 1, None)
    assert (utils.get_rank(), utils.get_world_size(), utils.is_main_process()) == (0, 1, True)


@pytest.mark.parametrize("tasks", [None, "1"])
def test_slurms_variable_alone_does_not_make_a_group(environment, tasks):
    environment("SLURM_PROCID", "0")
    environment("SLURM_NTASKS", "8")  # what a batch script is given, though it runs once
    if tasks:
        environment("SLURM_STEP_NUM_TASKS", tasks)
    args = place()
    utils.init_distributed_mode(args)
    assert not args.distributed


def test_slurm_tasks_get_their_places(environment):
    environment("SLURM_PROCID", "5")
    environment("SLURM_STEP_NUM_TASKS", "8")
    environment("SLURM_LOCALID", "1")
    assert utils._place_in_group(1) == (5, 8, 1)
    assert utils._place_in_group(6) == (5, 6, 1)


def test_torchrun_variables_make_a_gloo_group_on_a_cpu(environment, tmp_path, capsys):
    environment("RANK", "0")
    environment("WORLD_SIZE", "1")
    args = place(dist_url=(tmp_path / "meet").as_uri())
    utils.init_distributed_mode(args)
    assert (args.distributed, args.rank, args.world_size, args.gpu, args.dist_backend) == ((True, 0, 1, 0, "gloo"))
    assert utils.get_world_size() == 1
    series = utils.SmoothedValue()
    series.update(2.0, n=3)
    series.synchronize_between_processes()
    assert (series.count, series.global_avg) == (3, 2.0)
    utils.leave_distributed_mode()
    assert not utils.is_dist_avail_and_initialized()


@pytest.mark.parametrize(
    ("variables", "url", "sentence"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "env://", "must be whole numbers"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "nowhere://", "cannot join the others at nowhere://"),
    ],
)
def test_a_group_that_cannot_be_joined(environment, variables, url, sentence):
    for name, value in variables.items():
        environment(name, value)
    with pytest.raises(UsageError, match=sentence):
        utils.init_distributed_mode(place(dist_url=url))


def test_only_the_main_process_prints(capsys):
    plain = builtins.print
    try:
        utils.setup_for_distributed(is_master=False)
        print("silent")  # noqa: T201
        print("forced", force=True)  # noqa: T201
        utils.setup_for_distributed(is_master=True)
        print("spoken")  # noqa: T201
    finally:
        utils.leave_distributed_mode()
    assert builtins.print is plain
    assert capsys.readouterr().out == "forced\nspoken\n"


def test_save_on_master_writes_what_can_be_read_again(tmp_path):
    path = tmp_path / "checkpoint.pth"
    utils.save_on_master({"model": {"w": torch.ones(2)}, "epoch": 4}, path)
    assert torch.load(path, weights_only=True)["epoch"] == 4
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pth"]


@pytest.mark.parametrize("average", [ModelEma, ModelEmaV2])
def test_moving_average_takes_weights(average):
    model_ema = average(nn.Linear(2, 2))
    state = {"weight": torch.full((2, 2), 3.0), "bias": torch.zeros(2)}
    utils._load_checkpoint_for_ema(model_ema, state)
    network = model_ema.ema if average is ModelEma else model_ema.module
    assert torch.equal(network.weight, state["weight"])


@pytest.mark.parametrize(("placement", "row", "new_row"), [("middle", 8, 2), (None, 0, 0)])
def test_interpolate_pos_embed_keeps_the_class_row_where_the_model_has_it(placement, row, new_row):
    model = nn.Module()
    model.patch_embed = argparse.Namespace(grid_size=(2, 2))
    if placement:
        model.class_token_placement = placement
    patches = torch.randn(1, 16, 3)
    class_row = torch.full((1, 1, 3), 7.0)
    state = {
        "pos_embed": torch.cat([patches[:, :row], class_row, patches[:, row:]], 1),
        "other": torch.ones(1),
    }
    utils.interpolate_pos_embed(model, state)
    grid = patches.transpose(1, 2).reshape(1, 3, 4, 4)
    expected = functional.interpolate(grid, (2, 2), mode="bicubic").flatten(2).transpose(1, 2)
    expected = torch.cat([expected[:, :new_row], class_row, expected[:, new_row:]], 1)
    torch.testing.assert_close(state["pos_embed"], expected)
    utils.interpolate_pos_embed(model, state)  # the size is right already
    torch.testing.assert_close(state["pos_embed"], expected)
    state = {"other": torch.ones(1)}
    utils.interpolate_pos_embed(model, state)
    assert list(state) == ["other"]
