"""Mamba language models: embedding, a stack of blocks, a last norm, and a head over the vocabulary.

Glossary: b batch, l length, v vocabulary (padded), d model features.
"""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mamba_ssm.models.config_mamba import MambaConfig, refuse_unknown
from mamba_ssm.modules.mamba_simple import Block, Mamba
from mamba_ssm.ops.norm import RMSNorm, layer_norm_fn
from mamba_ssm.utils.generation import GenerationMixin, InferenceParams
from mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf, write_atomically

__all__ = ["CausalLMOutput", "MambaLMHeadModel", "MixerModel", "create_block"]


class CausalLMOutput(NamedTuple):
    """What a language model returns: logits, (b, l, v)."""

    logits: Tensor


def create_block(
    d_model: int,
    d_intermediate: int,
    ssm_cfg: dict[str, Any] | None = None,
    attn_layer_idx: list[int] | None = None,
    attn_cfg: dict[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Block:
    """Build one block: norm and `Mamba` mixer.

    Args:
        d_model: features.
        ssm_cfg: further arguments of `Mamba`; the key "layer" may say "Mamba1".
        norm_epsilon, rms_norm: the norm's epsilon, and whether it is RMSNorm or nn.LayerNorm.
        residual_in_fp32, fused_add_norm: see `Block`.
        layer_idx: the block's number, the key of its states in the inference cache.
        d_intermediate, attn_layer_idx, attn_cfg: feed-forward and attention layers, which are not built.

    Raises:
        ValueError: "layer" is another than "Mamba1", a key of `ssm_cfg` is unknown, or feed-forward or
            attention layers are asked for.
    """
    if d_intermediate > 0 or attn_layer_idx or attn_cfg:
        raise ValueError(
            "Only pure Mamba stacks are built: `d_intermediate` must be 0, `attn_layer_idx` and `attn_cfg` "
            f"empty, got {d_intermediate}, {attn_layer_idx} and {attn_cfg}."
        )
    mamba_options = dict(ssm_cfg or {})
    layer = mamba_options.pop("layer", "Mamba1")
    if layer != "Mamba1":
        raise ValueError(f'`ssm_cfg["layer"]` must be "Mamba1", the only layer of this package, got {layer!r}.')
    set_here = ("self", "d_model", "layer_idx", "device", "dtype")
    known = [name for name in inspect.signature(Mamba.__init__).parameters if name not in set_here]
    refuse_unknown(mamba_options, known, "`ssm_cfg`")
    placement: dict[str, Any] = {"device": device, "dtype": dtype}
    block = Block(
        d_model,
        partial(Mamba, layer_idx=layer_idx, **mamba_options, **placement),
        norm_cls=partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **placement),
        fused_add_norm=fused_add_norm,
        residual_in_fp32=residual_in_fp32,
    )
    block.layer_idx = layer_idx
    return block


def _init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """Initialise one module of the model, for `nn.Module.apply`.

    Biases of linears become 0 unless tagged `_no_reinit`, embeddings normal with standard deviation
    `initializer_range`. With `rescale_prenorm_residual` the maps that write to the residual stream
    (`out_proj`, `fc2`) become uniform in +-1 / sqrt(fan_in), divided by the root of the number of residual
    additions.
    Source: GPT-2, section 2.3, for the rescaling.
    """
    if isinstance(module, nn.Linear):
        if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if not rescale_prenorm_residual:
        return
    for name, parameter in module.named_parameters():
        if name in ("out_proj.weight", "fc2.weight"):
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            with torch.no_grad():
                parameter.div_(math.sqrt(n_residuals_per_layer * n_layer))


class MixerModel(nn.Module):
    """Embedding, `n_layer` blocks and a last norm. Arguments as in `MambaConfig` and `create_block`.

    `vocab_size` is the number of rows of the embedding (no padding is added here), `initializer_cfg` holds
    further arguments of the initialisation: `initializer_range`, `rescale_prenorm_residual`,
    `n_residuals_per_layer`.
    """

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int,
        vocab_size: int,
        ssm_cfg: dict[str, Any] | None = None,
        attn_layer_idx: list[int] | None = None,
        attn_cfg: dict[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: dict[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        placement: dict[str, Any] = {"device": device, "dtype": dtype}
        self.residual_in_fp32 = residual_in_fp32
        self.fused_add_norm = fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, **placement)
        sublayers = (d_intermediate, ssm_cfg, attn_layer_idx, attn_cfg)
        norms = (norm_epsilon, rms_norm, residual_in_fp32, fused_add_norm)
        make_layer = partial(create_block, d_model, *sublayers, *norms, **placement)
        self.layers = nn.ModuleList(make_layer(layer_idx=i) for i in range(n_layer))
        self.norm_f = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, **placement)
        self.apply(partial(_init_weights, n_layer=n_layer, **(initializer_cfg or {})))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """Return zero states for each layer, for `InferenceParams.key_value_memory_dict`."""
        layers: list[Any] = list(self.layers)
        return {
            i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for i, layer in enumerate(layers)
        }

    def forward(
        self, input_ids: Tensor, inference_params: InferenceParams | None = None, **mixer_kwargs: Any
    ) -> Tensor:
        """Map token ids, (b, l) int64, to hidden states, (b, l, d). `mixer_kwargs` go to each block."""
        hidden, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, inference_params=inference_params, **mixer_kwargs)
        return layer_norm_fn(
            hidden,
            self.norm_f.weight,
            self.norm_f.bias,
            residual=residual,
            eps=self.norm_f.eps,
            is_rms_norm=isinstance(self.norm_f, RMSNorm),
        )


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """A Mamba language model: `backbone` (MixerModel) and `lm_head`, which may share the embedding's weight.

    Args:
        config: see `MambaConfig`; the vocabulary is padded up to a multiple of `pad_vocab_size_multiple`.
        initializer_cfg: see `MixerModel`.
    """

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        multiple = config.pad_vocab_size_multiple
        vocab_size = math.ceil(config.vocab_size / multiple) * multiple
        self.backbone = MixerModel(
            d_model=config.d_model,
            n_layer=config.n_layer,
            d_intermediate=config.d_intermediate,
            vocab_size=vocab_size,
            ssm_cfg=config.ssm_cfg,
            attn_layer_idx=config.attn_layer_idx,
            attn_cfg=config.attn_cfg,
            rms_norm=config.rms_norm,
            initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm,
            residual_in_fp32=config.residual_in_fp32,
            device=device,
            dtype=dtype,
        )
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, device=device, dtype=dtype)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head share the embedding's weight, if the configuration says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """Return zero states for each layer, for `InferenceParams.key_value_memory_dict`."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> CausalLMOutput:
        """Return the logits of the next token at each position.

        Args:
            input_ids: (b, l) int64; l = 1 once `inference_params.seqlen_offset` > 0.
            position_ids: ignored, a recurrence needs none; there because `decode` passes it.
            num_last_tokens: if above 0, compute the logits of this many last positions only.

        Returns:
            A named tuple with `logits`, (b, l or num_last_tokens, v).
        """
        hidden = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        if num_last_tokens > 0:
            hidden = hidden[:, -num_last_tokens:]
        return CausalLMOutput(logits=self.lm_head(hidden))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> MambaLMHeadModel:
        """Load a folder that `save_pretrained` wrote, or a Hugging Face repository "owner/name".

        Args:
            device, dtype: of the model; `A_log` and `D` stay in fp32 whatever `dtype` says.
            kwargs: further arguments of the constructor.

        Raises:
            ValueError: there is no such model, or its configuration or its weights do not fit.
            RuntimeError: the hub cannot be reached, or a package for reading is missing.
        """
        config = MambaConfig.from_dict(load_config_hf(pretrained_model_name))
        model = cls(config, device=device, dtype=dtype, **kwargs)
        # In the stored dtype: each parameter converts to its own when it is copied.
        state = load_state_dict_hf(pretrained_model_name, device=device)
        if config.tie_embeddings and "backbone.embedding.weight" in state:
            # Safetensors files hold a shared weight once.
            state.setdefault("lm_head.weight", state["backbone.embedding.weight"])
        _check_weights(model, state, pretrained_model_name)
        model.load_state_dict(state)
        return model

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `pytorch_model.bin` and `config.json` into a folder, which is made if need be.

        Each file appears whole or not at all.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict()
        write_atomically(folder / "pytorch_model.bin", lambda file: torch.save(state, file))
        text = json.dumps(asdict(self.config), indent=4) + "\n"
        write_atomically(folder / "config.json", lambda file: file.write(text.encode()))


def _check_weights(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Raise a ValueError that names the first weight that is missing, too much or misshapen."""
    expected = model.state_dict()
    for name, parameter in expected.items():
        if name not in state:
            raise ValueError(f"The weights of {source!r} lack `{name}`; they belong to another model.")
        if state[name].shape != parameter.shape:
            raise ValueError(
                f"`{name}` of {source!r} has shape {tuple(state[name].shape)}, but its configuration asks "
                f"for {tuple(parameter.shape)}."
            )
    for name in state:
        if name not in expected:
            raise ValueError(f"The weights of {source!r} have `{name}`, which the model does not.")
