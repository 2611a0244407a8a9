"""The language model: stepping equals the whole sequence, initialisation, configuration, files."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel, MixerModel, _init_weights, create_block
from mamba_ssm.ops.norm import RMSNorm, layer_norm_ref, rms_norm_ref
from mamba_ssm.utils.generation import InferenceParams
from mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf
from tolerances import RELATIVE, assert_close

SMALL = {"d_model": 12, "n_layer": 2, "vocab_size": 21, "ssm_cfg": {"d_state": 4}}


def small_model(seed: int = 0, dtype: torch.dtype | None = torch.float64, **changes: Any) -> MambaLMHeadModel:
    torch.manual_seed(seed)
    # A large embedding keeps the logits far enough apart for the greedy choice to be beyond doubt.
    return MambaLMHeadModel(MambaConfig(**{**SMALL, **changes}), {"initializer_range": 1.0}, dtype=dtype)


@pytest.mark.parametrize("rms_norm", [True, False])
@pytest.mark.parametrize("fused_add_norm", [True, False])
def test_generation_equals_the_whole_sequence(rms_norm: bool, fused_add_norm: bool) -> None:
    model = small_model(rms_norm=rms_norm, fused_add_norm=fused_add_norm)
    prompt = torch.randint(0, 21, (3, 5))
    output = model.generate(prompt, 16, return_dict_in_generate=True, output_scores=True)
    assert output.sequences.shape == (3, 16)
    assert torch.equal(output.sequences[:, :5], prompt)
    with torch.no_grad():
        logits = model(output.sequences).logits
    assert torch.equal(output.sequences[:, 5:], logits[:, 4:-1].argmax(-1))
    assert_close(torch.stack(output.scores, dim=1), logits[:, 4:-1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_cuda_graphs_give_the_same() -> None:
    model = small_model().cuda()
    for batch_size, length in ((2, 9), (2, 12), (3, 9)):  # a new graph, a longer one, another batch
        prompt = torch.randint(0, 21, (batch_size, 4), device="cuda")
        expected = model.generate(prompt, length)
        for _ in range(2):  # captured, then replayed
            assert torch.equal(model.generate(prompt, length, cg=True), expected)


@pytest.mark.parametrize("rms_norm", [True, False])
def test_logits_by_hand(rms_norm: bool) -> None:
    model = small_model(rms_norm=rms_norm, tie_embeddings=False)
    reference = rms_norm_ref if rms_norm else layer_norm_ref
    tokens = torch.randint(0, 21, (2, 6))
    with torch.no_grad():
        for parameter in [*model.backbone.layers.parameters(), *model.backbone.norm_f.parameters()]:
            parameter += 0.1 * torch.randn_like(parameter)
        stream = model.backbone.embedding.weight[tokens]
        for layer in model.backbone.layers:
            stream = stream + layer.mixer(reference(stream, layer.norm.weight, layer.norm.bias, eps=1e-5))
        last = model.backbone.norm_f
        hidden = reference(stream, last.weight, last.bias, eps=1e-5)
        assert_close(model.backbone(tokens), hidden)
        assert_close(model(tokens).logits, hidden @ model.lm_head.weight.T)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
def test_steps_continue_prompts_of_any_length(length: int) -> None:
    """Lengths on both sides of the convolution's width."""
    model = small_model()
    tokens = torch.randint(0, 21, (2, length + 3))
    params = InferenceParams(max_seqlen=length + 3, max_batch_size=2)
    with torch.no_grad():
        expected = model(tokens).logits
        found = [model(tokens[:, :length], inference_params=params).logits]
        for position in range(length, length + 3):
            params.seqlen_offset = position
            found.append(model(tokens[:, position : position + 1], inference_params=params).logits)
    assert_close(torch.cat(found, dim=1), expected)
    assert set(params.key_value_memory_dict) == {0, 1}


def test_an_allocated_cache_gives_the_same() -> None:
    model = small_model()
    tokens = torch.randint(0, 21, (2, 6))
    cache = model.allocate_inference_cache(2, 6)
    assert set(cache) == {0, 1}
    params = InferenceParams(6, 2, key_value_memory_dict=cache)
    with torch.no_grad():
        model(tokens[:, :5], inference_params=params)
        params.seqlen_offset = 5
        found = model(tokens[:, 5:], inference_params=params).logits
        assert_close(found, model(tokens).logits[:, 5:])


def test_num_last_tokens() -> None:
    model = small_model()
    tokens = torch.randint(0, 21, (2, 6))
    whole = model(tokens).logits
    assert whole.shape == (2, 6, 24)
    assert_close(model(tokens, num_last_tokens=2).logits, whole[:, -2:])


def test_output_is_a_named_tuple() -> None:
    output = small_model()(torch.zeros(1, 2, dtype=torch.int64))
    assert output._fields == ("logits",)
    assert type(output).__name__ == "CausalLMOutput"


@pytest.mark.parametrize(("vocab_size", "multiple", "rows"), [(21, 8, 24), (24, 8, 24), (21, 1, 21), (50277, 8, 50280)])
def test_vocabulary_is_padded(vocab_size: int, multiple: int, rows: int) -> None:
    model = small_model(vocab_size=vocab_size, pad_vocab_size_multiple=multiple, n_layer=1)
    assert model.backbone.embedding.weight.shape == (rows, 12)
    assert model.lm_head.weight.shape == (rows, 12)
    assert model.lm_head.bias is None
    assert model.config.vocab_size == vocab_size


def test_tied_and_untied_heads() -> None:
    tied, untied = small_model(), small_model(tie_embeddings=False)
    assert tied.lm_head.weight is tied.backbone.embedding.weight
    assert untied.lm_head.weight is not untied.backbone.embedding.weight
    tied.lm_head.weight = nn.Parameter(torch.zeros(24, 12))
    tied.tie_weights()
    assert tied.lm_head.weight is tied.backbone.embedding.weight


def test_every_parameter_has_a_gradient() -> None:
    model = small_model(tie_embeddings=False)
    model(torch.randint(0, 21, (2, 7))).logits.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    wide, narrow = small_model(dtype=torch.float64), small_model(dtype=dtype)
    narrow.load_state_dict(wide.state_dict())
    wide.load_state_dict(narrow.state_dict())
    tokens = torch.randint(0, 21, (2, 9))
    with torch.no_grad():
        expected, found = wide(tokens).logits, narrow(tokens).logits
    assert found.dtype == dtype
    assert narrow.backbone.layers[0].mixer.A_log.dtype == torch.float32
    assert_close(found, expected, limit=4 * RELATIVE[dtype])  # a few roundings per layer


def test_initialisation() -> None:
    model = MixerModel(64, 3, 0, 400, rms_norm=True, initializer_cfg={"n_residuals_per_layer": 2})
    assert abs(model.embedding.weight.std().item() - 0.02) < 0.001
    mixer = model.layers[1].mixer
    bound = 1 / math.sqrt(128) / math.sqrt(2 * 3)
    assert 0.95 * bound < mixer.out_proj.weight.abs().max().item() <= bound * (1 + 1e-6)
    # The bias of the step sizes is tagged and keeps its own start: softplus of it lies in [0.001, 0.1].
    steps = nn.functional.softplus(mixer.dt_proj.bias)
    assert steps.min() > 0.0009
    assert steps.max() < 0.11


def test_initialisation_of_single_modules() -> None:
    linear = nn.Linear(3, 3)
    _init_weights(linear, n_layer=1)
    assert (linear.bias == 0).all()
    embedding = nn.Embedding(500, 20)
    _init_weights(embedding, n_layer=1, initializer_range=0.5)
    assert abs(embedding.weight.std().item() - 0.5) < 0.03
    parent = nn.Module()
    parent.out_proj = nn.Linear(3, 3)
    before = parent.out_proj.weight.detach().clone()
    _init_weights(parent, n_layer=1, rescale_prenorm_residual=False)
    assert torch.equal(parent.out_proj.weight, before)
    _init_weights(parent, n_layer=1)
    assert not torch.equal(parent.out_proj.weight, before)


def test_create_block() -> None:
    block = create_block(12, 0, {"layer": "Mamba1", "d_state": 3}, norm_epsilon=1e-3, rms_norm=True, layer_idx=7)
    assert (block.layer_idx, block.mixer.layer_idx, block.mixer.d_state) == (7, 7, 3)
    assert isinstance(block.norm, RMSNorm)
    assert block.norm.eps == 1e-3
    assert isinstance(create_block(12, 0).norm, nn.LayerNorm)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba2"}}, "must be \"Mamba1\".*got 'Mamba2'"),
        ({"ssm_cfg": {"d_stat": 4}}, "`ssm_cfg` has no option `d_stat`; did you mean `d_state`"),
        ({"ssm_cfg": {"layer_idx": 4}}, "`ssm_cfg` has no option `layer_idx`"),
        ({"d_intermediate": 4}, "`d_intermediate` must be 0"),
        ({"attn_layer_idx": [1]}, r"empty, got 0, \[1\]"),
        ({"attn_cfg": {"num_heads": 2}}, "`attn_cfg`"),
    ],
)
def test_what_is_not_built_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MambaLMHeadModel(MambaConfig(**{**SMALL, **changes}))


def test_configuration_defaults() -> None:
    found = dataclasses.asdict(MambaConfig())
    assert found == {
        "d_model": 2560,
        "d_intermediate": 0,
        "n_layer": 64,
        "vocab_size": 50277,
        "ssm_cfg": {},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
        "tie_embeddings": True,
    }
    assert MambaConfig().ssm_cfg is not MambaConfig().ssm_cfg


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_saved_and_loaded(tmp_path: Path, tie_embeddings: bool) -> None:
    model = small_model(dtype=None, tie_embeddings=tie_embeddings)
    folder = tmp_path / "new" / "folder"
    model.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "pytorch_model.bin"]
    text = (folder / "config.json").read_text()
    assert text == json.dumps(dataclasses.asdict(model.config), indent=4) + "\n"
    loaded = MambaLMHeadModel.from_pretrained(str(folder))
    assert loaded.config == model.config
    tokens = torch.randint(0, 21, (2, 5))
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert (loaded.lm_head.weight is loaded.backbone.embedding.weight) == tie_embeddings
    half = MambaLMHeadModel.from_pretrained(str(folder), dtype=torch.bfloat16)
    mixer = half.backbone.layers[0].mixer
    assert (mixer.in_proj.weight.dtype, mixer.A_log.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(mixer.A_log, model.backbone.layers[0].mixer.A_log)


def test_safetensors_without_the_tied_head(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = small_model(dtype=None)
    model.save_pretrained(tmp_path)
    state = {name: value.clone() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    (tmp_path / "pytorch_model.bin").unlink()
    safetensors.save_file(state, str(tmp_path / "model.safetensors"))
    loaded = MambaLMHeadModel.from_pretrained(str(tmp_path))
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    (tmp_path / "model.safetensors").write_bytes(b"not this")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        load_state_dict_hf(str(tmp_path))


def test_state_dict_is_converted(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "n": torch.tensor(3)}, tmp_path / "pytorch_model.bin")
    assert load_state_dict_hf(str(tmp_path))["w"].dtype == torch.float32
    state = load_state_dict_hf(str(tmp_path), device="meta", dtype=torch.float16)
    assert (state["w"].dtype, state["n"].dtype) == (torch.float16, torch.int64)
    assert state["w"].device.type == "meta"


def test_a_failed_save_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "pytorch_model.bin").read_bytes()

    def fail(state: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "pytorch_model.bin").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


class Payload:
    """Would run code if it were unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this must never run",))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"neither zip nor pickle",
        pickle.dumps({"w": Payload()}, protocol=2),
        pickle.dumps([1, 2], protocol=2),
    ],
    ids=["empty", "noise", "code", "list"],
)
def test_bad_weight_files(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        load_state_dict_hf(str(tmp_path))
    assert "never" not in capsys.readouterr().out


def test_code_in_a_torch_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"w": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than weights"):
        load_state_dict_hf(str(tmp_path))
    torch.save({"w": torch.ones(1), "epoch": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must hold a dictionary of tensors"):
        load_state_dict_hf(str(tmp_path))
    torch.save({"w": torch.ones(1000)}, tmp_path / "pytorch_model.bin")
    whole = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        load_state_dict_hf(str(tmp_path))
    assert "never" not in capsys.readouterr().out


def test_weights_of_another_model(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def load(**changes: Any) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        MambaLMHeadModel.from_pretrained(str(tmp_path))

    with pytest.raises(ValueError, match=r"lack `backbone\.layers\.2\."):
        load(n_layer=3)
    with pytest.raises(ValueError, match=r"have `backbone\.layers\.1\."):
        load(n_layer=1)
    with pytest.raises(ValueError, match=r"`backbone\.embedding\.weight` .* has shape \(24, 12\)"):
        load(vocab_size=100)
    with pytest.raises(ValueError, match="has no option `n_layers`; did you mean `n_layer`"):
        load(n_layers=2)


def test_bad_configuration_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_config_hf(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_config_hf(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        load_config_hf(str(tmp_path))
    with pytest.raises(ValueError, match=r"has no model\.safetensors or pytorch_model\.bin"):
        load_state_dict_hf(str(tmp_path))


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    errors = pytest.importorskip("huggingface_hub.errors")
    model = small_model(dtype=None)
    model.save_pretrained(tmp_path)
    asked = []

    def download(repository: str, name: str) -> str:
        asked.append((repository, name))
        if not (tmp_path / name).exists():
            raise errors.LocalEntryNotFoundError("no network") if repository == "a/b" else Missing(name)
        return str(tmp_path / name)

    class Missing(errors.EntryNotFoundError):
        def __init__(self, name: str) -> None:
            Exception.__init__(self, name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    loaded = MambaLMHeadModel.from_pretrained("owner/name")
    assert loaded.config == model.config
    assert [name for _, name in asked] == ["config.json", "model.safetensors", "pytorch_model.bin"]
    with pytest.raises(RuntimeError, match=r"'a/b' is no local folder.*check the network"):
        load_state_dict_hf("a/b")
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"'owner/name' of the Hugging Face hub has no model\.safetensors or"):
        load_state_dict_hf("owner/name")


def test_names_that_are_no_repository() -> None:
    pytest.importorskip("huggingface_hub")
    with pytest.raises(ValueError, match="neither a local folder nor a repository"):
        load_config_hf("no/such/folder")


def test_missing_hub_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RuntimeError, match="pip install huggingface_hub"):
        load_config_hf("owner/name")
