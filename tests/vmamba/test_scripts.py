"""The scripts of vim/ with VMamba models: what they print and save, against the network itself."""

import json
import os
import pickle
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from models import SMALL, small_model
from PIL import Image
from timm.models import register_model
from torch import nn

import flops
import infer_rpi
import main
import model_setup
import run_setup
import test_flops as flops_script
from checkpoint import read_checkpoint, save_checkpoint
from flags import UsageError, check, get_args_parser
from optimization import make_optimizer
from vmamba import VSSM, weights
from vmamba.factories import VARIANTS

VIM = Path(main.__file__).resolve().parent
NAMES = ["ant", "bee", "cow"]
NAME = "vmamba_of_the_tests"


def _build(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **options):
    return VSSM(**{**SMALL, **options})


_build.__name__ = NAME
_build.__module__ = __name__
globals()[NAME] = _build


@pytest.fixture(scope="module", autouse=True)
def _registered():
    """A small network with a registered name, known to timm in this module alone."""
    from timm.models import _registry

    register_model(_build)
    yield
    for table in (_registry._model_entrypoints, _registry._model_to_module):
        table.pop(NAME, None)
    for members in _registry._module_to_models.values():
        members.discard(NAME)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six pictures to train on and three to validate, of three classes."""
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 1)):
        for name in NAMES:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 255, (5, 5, 3), np.uint8).repeat(8, 0).repeat(8, 1)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


class CfgNode(dict):
    """As yacs has it."""


@pytest.fixture
def config(monkeypatch):
    module = types.ModuleType("some_config_package")
    monkeypatch.setattr(CfgNode, "__module__", module.__name__)
    module.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return CfgNode(MODEL=CfgNode(NAME="vssm1_tiny_0230"))


def run(capsys, script, *words) -> tuple[int, str, str]:
    code = script.run([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def archive(state):
    """Some of the old names, enough that nothing loads without the renaming."""
    return {name.replace("classifier.", "").replace(".op.", ".self_attention."): value for name, value in state.items()}


def prepared_picture(path, size):
    """By hand: bicubic, the middle, ImageNet's mean and deviation."""
    side = size if size <= 32 else int(size / 0.875)
    with Image.open(path) as picture:
        pixels = np.array(picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC))
    first = round((side - size) / 2)
    values = torch.from_numpy(pixels[first : first + size, first : first + size]).permute(2, 0, 1) / 255
    mean, deviation = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return ((values - mean) / deviation)[None]


def distinct(seed):
    """A small network of three classes whose answers depend on the picture."""
    torch.manual_seed(seed)
    model = small_model(num_classes=3)
    with torch.no_grad():
        model.classifier.head.weight.normal_(std=2)
    return model


# ---------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("size", [32, 49])
def test_evaluation_of_a_training_checkpoint(data, tmp_path, capsys, config, monkeypatch, size):
    """Upstream's layout and old names, with a configuration whose package is not there; weights and their average."""
    models = [distinct(1), distinct(2)]
    contents = {
        "model": archive(models[0].state_dict()),
        "model_ema": models[1].state_dict(),
        "config": config,
        "epoch": 3,
        "max_accuracy": 0.5,
    }
    torch.save(contents, tmp_path / "c.pth")
    monkeypatch.delitem(sys.modules, "some_config_package")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "c.pth", weights_only=True)
    code, out, err = run(
        *(capsys, main, "--eval", "--model", NAME, "--resume", tmp_path / "c.pth", "--data-path", data),
        *("--batch-size", 2, "--num_workers", 0, "--input-size", size, "--device", "cpu"),
    )
    assert code == 0, err
    results = [line for line in out.splitlines() if line.startswith("*")]
    for line, model in zip(results, models, strict=True):
        scores = torch.cat([model(prepared_picture(data / f"val/{name}/0.png", size)) for name in NAMES]).double()
        loss = nn.functional.cross_entropy(scores, torch.arange(3)).item()
        accuracy = 100 * (scores.argmax(1) == torch.arange(3)).double().mean().item()
        assert line == f"* Acc@1 {accuracy:.3f} Acc@5 100.000 loss {loss:.3f}"
    assert results[0] != results[1]
    assert f"model: {NAME}, {sum(p.numel() for p in models[0].parameters()) / 1e6:.2f} M parameters, 3 classes" in out


def test_a_position_embedding_of_another_grid(tmp_path, data, capsys):
    given = small_model(num_classes=3, posembed=True, imgsize=32)
    model = small_model(num_classes=3, posembed=True, imgsize=(24, 40))
    save_checkpoint(tmp_path / "c.pth", {"model": given.state_dict(), "class_names": NAMES})
    report = main.load_weights(model, read_checkpoint(str(tmp_path / "c.pth")).model)
    assert report.resized == (64, 60)
    expected = weights.resize_pos_embed(given.pos_embed.detach(), (6, 10))
    assert torch.equal(model.pos_embed, expected)
    with pytest.raises(
        main.CheckpointError, match=r"does not fit: `pos_embed` must have shape \(1, c, rows, columns\)"
    ):
        main.load_weights(model, {**given.state_dict(), "pos_embed": torch.zeros(1, 9, 8)})


# ---------------------------------------------------------------------------------------------------- training


def settings(*words):
    args = get_args_parser().parse_args([str(word) for word in words])
    check(args)
    args.distributed, args.rank, args.world_size, args.gpu = False, 0, 1, None
    return args


PLAIN = (
    *("--model", NAME, "--device", "cpu", "--batch-size", "2", "--num_workers", "0", "--warmup-epochs", "0"),
    *("--mixup", "0", "--cutmix", "0", "--input-size", "32", "--epochs", "1", "--lr", "0.01"),
)


def test_training_with_and_without_keeping_activations(data, tmp_path, capsys):
    """Stochastic depth on; the same weights come out, and evaluation takes them without being told their model."""
    states = []
    for words in ((), ("--use-checkpoint",)):
        out = tmp_path / f"run{len(states)}"
        place = ("--data-path", data, "--output_dir", out, "--drop-path", "0.4")
        code, printed, err = run(capsys, main, *PLAIN, *place, *words)
        assert code == 0, err
        states.append(read_checkpoint(str(out / "checkpoint.pth")))
    first, second = states
    assert first.model_name == NAME
    assert first.model.keys() == small_model(num_classes=3).state_dict().keys()
    assert first.model.keys() == first.ema.keys()
    for name, value in first.model.items():
        torch.testing.assert_close(value, second.model[name], rtol=1e-4, atol=1e-5)
    code, printed, err = run(
        *(capsys, main, "--eval", "--resume", tmp_path / "run0/checkpoint.pth", "--data-path", data),
        *("--num_workers", 0, "--device", "cpu"),
    )
    assert code == 0, err
    assert f"model: {NAME}" in printed
    code, printed, err = run(
        *(capsys, main, *PLAIN, "--epochs", 2, "--data-path", data, "--output_dir", tmp_path / "run0"),
        *("--resume", tmp_path / "run0/checkpoint.pth"),
    )
    assert code == 0, err
    assert re.search(r"resumed: .*run0/checkpoint\.pth, epoch 1", printed)


def test_recomputing_is_switched_on_for_every_block(data):
    for words in ((), ("--use-checkpoint",)):
        own = run_setup.prepare(
            settings(*PLAIN, "--data-path", data, "--drop-path", "0.3", *words), torch.device("cpu")
        )
        blocks = [block for stage in own.model.layers for block in stage.blocks]
        assert all(block.use_checkpoint == bool(words) for block in blocks)
        rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
        np.testing.assert_allclose(rates, np.linspace(0, 0.3, len(blocks)), atol=1e-9)


@pytest.mark.parametrize("mended", [False, True])
def test_weight_decay(mended):
    """Upstream's rule: vectors, biases and the position embedding are spared, A_logs and the steps' biases are not."""
    model = small_model(posembed=True)
    args = settings("--weight-decay", "0.07", *(("--mend", "ssm-decay") if mended else ()))
    groups = make_optimizer(args, model).param_groups
    decayed = {id(weight): group["weight_decay"] for group in groups for weight in group["params"]}
    for name, weight in model.named_parameters():
        spared = weight.ndim <= 1 or name == "pos_embed"
        if mended:
            spared = spared or name.endswith(("A_logs", "Ds", "dt_projs_bias"))
        assert decayed[id(weight)] == (0.0 if spared else 0.07), name
    assert len(decayed) == len(list(model.parameters()))


@pytest.mark.parametrize("line", [archive, weights.export_single_file])
def test_fine_tuning_for_other_classes(data, tmp_path, capsys, line):
    before = small_model(num_classes=7)
    save_checkpoint(tmp_path / "c.pth", {"model": line(before.state_dict())})
    args = settings(*PLAIN, "--data-path", data, "--finetune", tmp_path / "c.pth")
    own = run_setup.prepare(args, torch.device("cpu")).model.state_dict()
    assert "with a new head for these classes" in capsys.readouterr().out
    assert own["classifier.head.weight"].shape[0] == 3
    for name, value in before.state_dict().items():
        assert torch.equal(own[name], value) or name.startswith("classifier.head."), name
    del before.classifier.norm
    save_checkpoint(tmp_path / "c.pth", {"model": before.state_dict()})
    with pytest.raises(main.CheckpointError, match=r"lacks classifier\.norm\.weight, classifier\.norm\.bias"):
        run_setup.prepare(args, torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------- inference


@pytest.fixture
def picture(data):
    return data / "val/bee/0.png"


def test_inference_gives_the_networks_numbers(picture, tmp_path, capsys):
    model = distinct(4)
    torch.save(
        {"state_dict": {f"module.{name}": v for name, v in archive(model.state_dict()).items()}}, tmp_path / "c.pt"
    )
    expected = model(prepared_picture(picture, 64)).softmax(-1)[0]
    for words, tolerance in ((("--backend", "torch"), 1e-5), ((), 1e-5), (("--dtype", "bfloat16"), 0.05)):
        code, out, err = run(
            *(capsys, infer_rpi, "--model", NAME, "--checkpoint", tmp_path / "c.pt", "--image", picture, *words),
            *("--img-size", 64, "--json", "--benchmark", 1, "--topk", 3),
        )
        assert code == 0, err
        found = json.loads(out)
        assert found["num_classes"] == 3
        assert found["benchmark"]["runs"] == 1
        for prediction in found["pictures"][0]["predictions"]:
            assert prediction["probability"] == pytest.approx(expected[prediction["index"]].item(), abs=tolerance)


def light(state):
    """Weights of these shapes that take no room in a file."""
    return {name: torch.full((1,), 0.01).expand(value.shape) for name, value in state.items()}


@pytest.mark.parametrize("name", ["vmamba_tiny_s1l8", "vanilla_vmamba_tiny"])
def test_a_published_file_need_not_be_named(name, picture, tmp_path, capsys, config):
    """The released files do not say which model they are; their weights' sizes do."""
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    old = archive(light(state)) if name.startswith("vanilla") else light(state)
    torch.save({"model": old, "config": config}, tmp_path / "released.pth")
    read = read_checkpoint(str(tmp_path / "released.pth"))
    assert (read.model_name, read.num_classes, list(read.model)) == (name, 1000, list(state))
    code, _, err = run(
        capsys, infer_rpi, "--checkpoint", tmp_path / "released.pth", "--image", picture, "--img-size", 32
    )
    assert code == 0, err
    assert f"model: {name}, " in err


def test_without_a_checkpoint_the_published_one_is_named(picture, capsys, monkeypatch):
    published = {NAME: ("tag", "file.pth")}
    monkeypatch.setattr(weights, "PUBLISHED", published)
    words = ("--image", picture, "--model", NAME, "--img-size", 32, "--num_classes", 5)
    _, _, err = run(capsys, infer_rpi, *words)
    assert "--checkpoint https://github.com/MzeroMiko/VMamba/releases/download/%23tag/file.pth." in err
    published.clear()
    _, _, err = run(capsys, infer_rpi, *words)
    assert "--checkpoint hustvl/Vim-tiny-midclstok." in err


def test_from_another_folder_and_without_vmamba_for_vim(picture, tmp_path):
    """The scripts find the package by themselves; Vim is not made to wait for it."""
    watch = (
        "import runpy, sys\n"
        "del sys.argv[0]\n"
        "try:\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n"
        "    print('vmamba' in sys.modules)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for model, loaded in (("vim_pico_patch4_32", "False"), ("vmamba_tiny_s2l5", "True")):
        command = [sys.executable, "-c", watch, VIM / "infer_rpi.py", "--model", model, "--num_classes", "10"]
        done = subprocess.run(
            list(map(str, [*command, "--image", picture, "--img-size", 32])),
            cwd=tmp_path,
            env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(VIM)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert "1. Class" in done.stdout
        assert done.stdout.splitlines()[-1] == loaded


def test_the_factories_are_entries_of_torch_hub():
    model = torch.hub.load(str(VIM.parent), "vmamba_tiny_s2l5", source="local", num_classes=3, depths=(1, 1, 1, 1))
    assert model.classifier.head.out_features == 3
    entries = runpy.run_path(str(VIM.parent / "hubconf.py"))
    assert {*VARIANTS, "vim_tiny_patch16_224"} <= set(entries)
    assert all(callable(entries[name]) for name in VARIANTS)


# ---------------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize(
    ("name", "published", "parameters"),
    [
        ("vmamba_tiny_s2l5", 4_857_742_080, 30_705_832),
        ("vmamba_tiny_s1l8", 4_905_609_984, 30_249_064),
        ("vmamba_small_s2l15", 8_715_774_720, 50_147_752),
        ("vmamba_small_s1l20", 8_612_211_456, 49_012_840),
        ("vmamba_base_s2l15", 15_358_944_256, 88_557_800),
        ("vmamba_base_s1l20", 15_220_859_904, 86_614_504),
        ("vanilla_vmamba_tiny", 5_626_895_040, 22_893_448),
        ("vanilla_vmamba_small", 11_231_522_784, 44_417_416),
        ("vanilla_vmamba_base", 18_020_115_136, 76_254_056),
    ],
)
def test_the_published_flops(name, published, parameters):
    """To the last digit; those of the first version were published from a count of rounded parts."""
    with torch.device("meta"):
        model = timm.create_model(name)
    count = flops.count_flops(model)
    assert sum(weight.numel() for weight in model.parameters()) == parameters
    if name.startswith("vanilla"):
        assert count.fvcore_flops == pytest.approx(published, rel=3e-5)
    else:
        assert count.fvcore_flops == published


@pytest.mark.parametrize("norm", ["ln", "ln2d", "bn"])
@pytest.mark.parametrize(
    ("forward_type", "gate", "norms"), [("v05_noz", 1, 5), ("v05", 2, 5), ("v05_oncnorm_noz", 1, 5)]
)
def test_the_flops_of_a_mixer(norm, forward_type, gate, norms):
    """One block over a map of 3 x 5 pixels, by hand."""
    options = {"depths": (1,), "dims": 16, "ssm_d_state": 3, "ssm_ratio": 2.0, "mlp_ratio": 2.0, "num_classes": 7}
    model = VSSM(**options, forward_type=forward_type, norm_layer=norm, patchembed_version="v1", ssm_conv_bias=True)
    count = flops.count_flops(model, (12, 20))
    pixels, c, d, n, r, k = 15, 16, 32, 3, 1, 4
    mixer = gate * c * d + 9 * d + k * d * (r + 2 * n) + k * d * r + d * c + (9 * d if "oncnorm" in forward_type else 0)
    assert count.multiply_adds == pixels * (48 * c + mixer + 2 * c * 32) + c * 7
    assert count.state_updates == pixels * k * d * n
    assert count.channel_updates == pixels * k * d
    assert count.bias_additions == pixels * (c + d + 32 + c) + 7
    outer = 2 if norm == "bn" else 5  # the patches, two in the block, the classifier
    assert count.norm_flops == pixels * (4 * outer * c + 5 * d)
    assert count.pooled_values == pixels * c
    assert count.fvcore_flops == (count.multiply_adds + count.norm_flops + pixels * c + pixels * k * d * (9 * n + 1))


def test_what_the_script_prints(capsys):
    code, out, err = run(
        capsys, flops_script, "--model", NAME, "--num_classes", 5, "--img-size", 24, 40, "--repeat", 1, "--threads", 1
    )
    assert code == 0, err
    expected = flops.count_flops(small_model(), (24, 40))
    lines = dict(line.split(":", 1) for line in out.splitlines())
    assert lines["FLOPs"].split()[0] == f"{expected.fvcore_flops / 1e9:.3f}"
    assert lines["Scans"].split()[0] == f"{expected.scan_flops / 1e9:.3f}"
    code, out, err = run(
        capsys, flops_script, "--model", NAME, "--num_classes", 5, "--img-size", 24, 40, "--repeat", 1, "--json"
    )
    found = json.loads(out)
    for key in ("fvcore_flops", "scan_flops", "operations", "multiply_adds"):
        assert found[key] == getattr(expected, key), key
    _, out, _ = run(capsys, flops_script, "--model", "vim_pico_patch4_32", "--repeat", 1, "--json")
    assert "fvcore_flops" not in json.loads(out)


def test_a_configuration_names_a_network_for_every_program(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("MODEL:\n  VSSM: {EMBED_DIM: 8, DEPTHS: [1, 1, 1, 1], SSM_FORWARDTYPE: v05_noz}\n")
    model = model_setup.build_model(str(file), 5, 64)
    assert model.dims == [8, 16, 32, 64]
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
    file.write_text("MODEL:\n  VSSM: {EMBED_DIMM: 8}\n")
    with pytest.raises(UsageError, match="EMBED_DIM"):
        model_setup.build_model(str(file), 5, 64)
    with pytest.raises(UsageError, match=r"no model called .mine.; .* --model FILE\.yaml\."):
        model_setup.build_model("mine", 5, 64)
