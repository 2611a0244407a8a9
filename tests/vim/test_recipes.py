"""The recipes in vim/scripts: the commands that they print and run."""

import argparse
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from flags import get_args_parser
from registry import VARIANTS

SCRIPTS = Path(__file__).resolve().parents[2] / "vim" / "scripts"
RECIPES = ("pt-vim-t.sh", "pt-vim-s.sh", "ft-vim-t.sh", "ft-vim-s.sh")
COLUMNS = ("batch_size", "lr", "min_lr", "warmup_lr", "drop_path", "weight_decay", "epochs")
SETTINGS = {
    "pt-vim-t.sh": ("vim_tiny_patch16_224_", 128, 5e-4, 1e-5, 1e-6, 0.0, 0.1, 300),
    "pt-vim-s.sh": ("vim_small_patch16_224_", 64, 1e-3, 1e-5, 1e-6, 0.05, 0.05, 300),
    "ft-vim-t.sh": ("vim_tiny_patch16_stride8_224_", 128, 5e-6, 1e-5, 1e-5, 0.0, 1e-8, 30),
    "ft-vim-s.sh": ("vim_small_patch16_stride8_224_", 128, 5e-6, 1e-5, 1e-5, 0.0, 1e-8, 30),
}

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def run(name, *arguments, cwd=None, **environment):
    inherited = {key: value for key, value in os.environ.items() if key not in ("NGPUS", "DRY_RUN")}
    return subprocess.run(
        [SCRIPTS / name, *arguments], env={**inherited, **environment}, cwd=cwd, capture_output=True, text=True
    )


def folders(name):
    return ["/the data", "out"] + (["pt.pth"] if name.startswith("ft") else [])


def command(name, *arguments, **environment):
    """Return what a recipe would run."""
    result = run(name, *folders(name), *arguments, DRY_RUN="1", **environment)
    assert (result.returncode, result.stderr) == (0, "")
    return shlex.split(result.stdout)


def parse(words):
    """Read a command's flags as main.py does, and refuse shortened ones."""
    parser = argparse.ArgumentParser(parents=[get_args_parser()], allow_abbrev=False)
    return parser.parse_args(words[words.index(str(SCRIPTS.parent / "main.py")) + 1 :])


@pytest.mark.parametrize("name", sorted(path.name for path in SCRIPTS.iterdir()))
def test_scripts_parse_and_can_be_run(name):
    subprocess.run(["bash", "-n", SCRIPTS / name], check=True)
    assert os.access(SCRIPTS / name, os.X_OK)
    assert "set -euo pipefail" in (SCRIPTS / name).read_text()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_finds_nothing():
    result = subprocess.run(["shellcheck", *SCRIPTS.iterdir()], capture_output=True, text=True)
    assert result.stdout == ""


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_settings_of_the_published_weights(name):
    words = command(name)
    assert words[:3] == ["torchrun", "--nproc_per_node=8", "--standalone"]
    args = parse(words)
    model, *settings = SETTINGS[name]
    assert args.model in VARIANTS
    assert args.model.startswith(model)
    assert [getattr(args, column) for column in COLUMNS] == settings
    assert (args.data_path, args.output_dir) == ("/the data", "out")
    assert args.finetune == ("pt.pth" if name.startswith("ft") else "")
    changed = {"model", "given", "data_path", "output_dir", "finetune", "num_workers", "pos_embed_resize", *COLUMNS}
    defaults = get_args_parser().parse_args([])
    assert (args.num_workers, args.if_amp) == (25, False)
    assert {key: value for key, value in vars(args).items() if key not in changed} == {
        key: value for key, value in vars(defaults).items() if key not in changed
    }


@pytest.mark.parametrize("name", RECIPES)
def test_further_flags_and_ngpus_are_passed_on(name):
    words = command(name, "--epochs", "3", "--mend", "lr-lag", "ema-best", NGPUS="2")
    assert "--nproc_per_node=2" in words
    args = parse(words)
    assert (args.epochs, args.mend) == (3, ["lr-lag", "ema-best"])


@pytest.mark.parametrize("name", RECIPES)
def test_too_few_arguments_give_the_usage(name):
    result = run(name, *folders(name)[:-1], DRY_RUN="1")
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("usage: ")
    assert ("DATA OUTPUT CHECKPOINT" if name.startswith("ft") else "DATA OUTPUT [") in line


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_no_error(name, flag):
    result = run(name, flag)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: ")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_torchrun_from_any_folder(name, tmp_path):
    fake = tmp_path / "torchrun"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 7\n')
    fake.chmod(0o755)
    (tmp_path / "elsewhere").mkdir()
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = run(name, *folders(name), cwd=tmp_path / "elsewhere", PATH=path, CDPATH="/usr")
    assert (result.returncode, result.stderr) == (7, "")
    assert ["torchrun", *result.stdout.splitlines()] == command(name)


def test_a_missing_torchrun_is_one_sentence(tmp_path):
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    result = subprocess.run(
        [tmp_path / "bash", SCRIPTS / RECIPES[0], "data", "out"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: torchrun is not on the path: activate")
    assert len(result.stderr.splitlines()) == 1
