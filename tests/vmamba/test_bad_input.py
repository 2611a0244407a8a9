"""Bad input for VMamba models, as a user meets it: one clear sentence, a non-zero exit code, nothing run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import main
from flags import UsageError
from model_setup import build_model

VIM = Path(main.__file__).resolve().parent
TINY = "vmamba_tiny_s2l5"


class Bomb:
    """Would leave a trace if it were unpickled."""

    def __reduce__(self):
        return os.system, ("mkdir made_by_the_checkpoint",)


def light(state):
    """Weights of these shapes that take no room in a file."""
    return {name: torch.zeros(1).expand(value.shape) for name, value in state.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A picture, val/ folders, and checkpoints of both families, whole, truncated and hostile."""
    root = tmp_path_factory.mktemp("bad")
    (root / "data/val/bee").mkdir(parents=True)
    for path in ("a.png", "data/val/bee/a.png"):
        Image.new("RGB", (40, 40), "red").save(root / path)
    with torch.device("meta"):
        shapes = [timm_model(name).state_dict() for name in (TINY, "vim_pico_patch4_32")]
    tiny, vim = map(light, shapes)
    torch.save({"model": tiny}, root / "vmamba.pth")
    torch.save({"model": tiny, "config": Bomb()}, root / "evil.pth")
    torch.save({"model": tiny, "config": Bomb()}, root / "evil_old.pth", _use_new_zipfile_serialization=False)
    torch.save({"model": vim, "model_name": "vim_pico_patch4_32"}, root / "vim.pth")
    torch.save({"state_dict": {f"backbone.{n}": v for n, v in tiny.items() if "classifier" not in n}}, root / "det.pth")
    whole = (root / "vmamba.pth").read_bytes()
    (root / "cut.pth").write_bytes(whole[: len(whole) // 2])
    return root


def timm_model(name):
    import other_family

    other_family.package()
    return timm.create_model(name, num_classes=10)


INFER = "infer_rpi.py --image a.png"
EVAL = "main.py --eval --data-path data --num_workers 0 --device cpu --batch-size 1"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            f"{INFER} --model {TINY} --checkpoint vim.pth",
            "the checkpoint belongs to a Vim, but this model is a VMamba (",
        ),
        (
            f"{EVAL} --model vim_tiny_patch16_224 --resume vmamba.pth",
            f"the checkpoint belongs to a VMamba ({TINY}), but this model is a Vim (it lacks ",
        ),
        (f"{INFER} --checkpoint evil.pth --model {TINY}", "system) besides tensors and numbers, which could run code"),
        (
            "test_flops.py --model vanilla_vmamba_tiny --img-size 2 --repeat 1",
            "vanilla_vmamba_tiny cannot be built for 2 pixels and 1000 classes: its pictures must have at least 4 x 4",
        ),
    ],
)
def test_the_scripts_as_processes(folder, line, expected):
    script, *words = line.split()
    done = subprocess.run(
        [sys.executable, str(VIM / script), *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert expected in errors[0]
    assert "Traceback" not in done.stderr
    assert not (folder / "made_by_the_checkpoint").exists()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            f"{INFER} --checkpoint cut.pth --model {TINY}",
            "cut.pth is not a checkpoint that can be read: it is truncated",
        ),
        (f"{INFER} --checkpoint evil_old.pth", "system) besides tensors and numbers, which could run code"),
        (f"{INFER} --checkpoint det.pth", "det.pth holds no classifier (classifier.head.weight)"),
        (f"{INFER} --checkpoint vmamba.pth --num_classes 9", "--num_classes is 9 but the checkpoint has 10 classes"),
        (f"{INFER} --checkpoint vmamba.pth --model vmamba_tiny_s1l8", "belongs to another model (vmamba_tiny_s2l5) ("),
        (f"{INFER} --checkpoint vmamba.pth --img-size 40 3", "cannot be built for (40, 3) pixels"),
        (
            f"{INFER} --model vmamba_tinny_s2l5",
            "There is no model called 'vmamba_tinny_s2l5'; the nearest is 'vmamba_t",
        ),
        (f"{INFER} --model vanila_vmamba_tiny", "the nearest is 'vanilla_vmamba_tiny'"),
        (f"{EVAL} --model {TINY} --resume vim.pth", "belongs to a Vim, but this model is a VMamba"),
        (f"{EVAL} --model {TINY} --resume vmamba.pth --input-size 3", "its pictures must have at least 4 x 4 pixels"),
        (f"{EVAL} --model {TINY} --resume det.pth", "has no classifier.head.weight, the classifier of vmamba"),
    ],
)
def test_the_scripts_in_this_process(folder, line, expected, capsys, monkeypatch):
    import infer_rpi

    monkeypatch.chdir(folder)
    script, *words = line.split()
    assert {"infer_rpi.py": infer_rpi, "main.py": main}[script].run(words) == 2
    printed = capsys.readouterr()
    assert expected in printed.err
    assert printed.err.count("error: ") == 1
    assert not (folder / "made_by_the_checkpoint").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"forward_type": "v99"}, r"vmamba_tiny_s2l5 cannot be built for 10 classes: .*v99"),
        ({"forward_type": "v05_noz_onnone"}, "v05_noz_onnone"),
        ({"norm_layer": "ln3d"}, "ln3d.*the nearest is 'ln2d'"),
        ({"ssm_ration": 2}, "ssm_ration.*the nearest is 'ssm_ratio'"),
    ],
)
def test_options_that_do_not_exist(options, expected):
    with pytest.raises(UsageError, match=expected) as caught:
        build_model(TINY, 10, None, depths=(1, 1, 1, 1), **options)
    assert "\n" not in str(caught.value)
