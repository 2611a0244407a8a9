"""Vim-Tiny against timm's DeiT-Tiny: a training step at 224 px, inference at 1248 px; and what a mixer costs.

b batch, e inner channels, l length, m model channels
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import models_mamba  # noqa: F401  (registers Vim with timm)
from benchmarks.gpu.findings import Bound, Findings, Rows
from benchmarks.gpu.ops import backends_for
from benchmarks.gpu.timing import Call, Device, as_json, interleave, megabytes, milliseconds, ratio, times
from benchmarks.runner import Spread
from causal_conv1d.backend import use_backend
from command_line import DEFAULT_MODEL
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.mamba_inner import BiMambaInnerFn, MambaInnerFn, MambaInnerFnNoOutProj, compose

DEIT = "deit_tiny_patch16_224"
STEP_MUST, STEP_AIM = 2.0, 1.5
CLAIMED = "the paper (arXiv 2401.09417) claims 2.8 times and 86.8 %"
HEADER = ["what", "batch", "time", "over the first", "memory beyond what is loaded"]
Network = Callable[..., nn.Module]
Context = Callable[[], AbstractContextManager[None]]


def contexts(device: Device) -> dict[str, Context]:
    """{what runs: a context}: by itself, under the name of the backend that is then chosen, and triton by force."""
    names = [name for name in backends_for(device) if name != "torch"]
    by_itself = {names[0] if names else "torch": nullcontext}
    return by_itself | {name: partial(use_backend, name) for name in names[1:] if name == "triton"}


def make_vim(pixels: int = 224) -> nn.Module:
    model: nn.Module = timm.create_model(DEFAULT_MODEL, img_size=pixels, drop_path_rate=0.0)
    return model


def make_deit(pixels: int = 224, materialised: bool = False) -> nn.Module:
    """`materialised`: every attention matrix is written to memory, as in the paper, instead of SDPA's fused kernel."""
    model: nn.Module = timm.create_model(DEIT, img_size=pixels)
    attentions: list[Any] = [module for module in model.modules() if hasattr(module, "fused_attn")]
    if not attentions:
        raise RuntimeError("timm's attention has no `fused_attn` here: its two kinds cannot be told apart")
    for module in attentions:
        module.fused_attn = not materialised
    return model


@contextmanager
def _entered(context: Context, gradients: bool) -> Iterator[None]:
    with context(), nullcontext() if gradients else torch.inference_mode():
        yield


def training_step(
    model: nn.Module, pictures: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer, autocast: bool = True
) -> Tensor:
    """One step; the loss before it."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(pictures.device.type, torch.bfloat16, enabled=autocast):
        logits = model(pictures)
    loss = F.cross_entropy(logits.float(), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _step_of(make: Network, device: Device, pixels: int, batch: int) -> Call:
    torch.manual_seed(0)
    model = make(pixels).to(device.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=device.is_gpu)
    pictures = torch.randn(batch, 3, pixels, pixels, device=device.device)
    labels = torch.randint(1000, (batch,), device=device.device)
    return partial(training_step, model, pictures, labels, optimizer)


def _guarded(call: Call, context: Context, gradients: bool) -> Call:
    def run() -> None:
        with _entered(context, gradients):
            call()

    return run


def _compare(device: Device, calls: dict[str, Call], rounds: int, batch: int) -> tuple[Rows, dict[str, Any]]:
    """Time the calls interleaved and take their memory one by one; a call for which memory lacks is named so."""
    possible, peaks = dict(calls), {}
    lacking = []
    for name, call in calls.items():
        try:
            peaks[name] = device.peak(call)
        except torch.cuda.OutOfMemoryError:
            lacking.append(name)
            del possible[name]
            device.free()
    seconds = interleave(device, possible, rounds)
    lines: Rows = []
    measured: dict[str, Any] = {}
    base = next(iter(seconds), None)
    for name, values in seconds.items():
        over = "1" if name == base else times(ratio(values, seconds[str(base)]))
        lines.append([name, str(batch), milliseconds(Spread.of(values)), over, megabytes(peaks[name])])
        measured[f"{name}, batch {batch}"] = {**as_json(values), "peak_bytes": peaks[name]}
    for name in lacking:
        lines.append([name, str(batch), "out of memory", "", ""])
        measured[f"{name}, batch {batch}"] = None
    return lines, measured


def measure_step(device: Device, rounds: int, batch: int = 128, pixels: int = 224, deit: Network = make_deit,
                 vim: Network = make_vim) -> Findings:  # fmt: skip
    """A training step (forward, backward, AdamW) in bf16 autocast: Vim-Tiny's over DeiT-Tiny's."""
    calls = {"DeiT-Tiny": _guarded(_step_of(deit, device, pixels, batch), nullcontext, True)}
    for backend, context in contexts(device).items():
        calls[f"Vim-Tiny, {backend}"] = _guarded(_step_of(vim, device, pixels, batch), context, True)
    lines, measured = _compare(device, calls, rounds, batch)
    title = f"Training step, {pixels} px, bf16 autocast, AdamW"
    findings = Findings(tables={title: [HEADER, *lines]}, measured={title: measured})
    base = measured[f"DeiT-Tiny, batch {batch}"]
    for name in list(calls)[1:]:
        mine = measured[f"{name}, batch {batch}"]
        if mine is not None and base is not None:
            value = ratio(mine["seconds"], base["seconds"]).median
            findings.bounds.append(
                Bound(f"training step of {name} over DeiT-Tiny's, batch {batch}", STEP_MUST, value, STEP_AIM)
            )
    return findings


def measure_inference(device: Device, rounds: int, batches: Sequence[int] = (6, 24, 96), pixels: int = 1248,
                      deit: Network = make_deit, vim: Network = make_vim) -> Findings:  # fmt: skip
    """Inference of Vim-Tiny against DeiT-Tiny, whose attention is materialised as in the paper, or SDPA's; bf16."""
    networks: dict[str, tuple[Network, Context]] = {
        "DeiT-Tiny, attention materialised": (partial(deit, materialised=True), nullcontext),
        "DeiT-Tiny, SDPA": (deit, nullcontext),
        **{f"Vim-Tiny, {backend}": (vim, context) for backend, context in contexts(device).items()},
    }
    title = f"Inference, {pixels} px, bf16"
    findings = Findings(tables={title: [HEADER]}, measured={title: {}})
    models = {}
    for name, (make, _) in networks.items():
        torch.manual_seed(0)
        models[name] = make(pixels).to(device.device, torch.bfloat16).eval()
    for batch in batches:
        pictures = torch.randn(batch, 3, pixels, pixels, device=device.device, dtype=torch.bfloat16)
        calls = {
            name: _guarded(partial(models[name], pictures), context, False) for name, (_, context) in networks.items()
        }
        lines, measured = _compare(device, calls, rounds, batch)
        findings.tables[title] += lines
        findings.measured[title] |= measured
        findings.notes += _against_paper(measured, list(networks), batch)
        del pictures, calls
        device.free()
    return findings


def _against_paper(measured: dict[str, Any], names: Sequence[str], batch: int) -> list[str]:
    """A sentence for each pair of a DeiT and a Vim: speed and memory beside what the paper claims."""
    sentences = []
    for vim in names[2:]:
        for deit in names[:2]:
            mine, its = (measured[f"{name}, batch {batch}"] for name in (vim, deit))
            if mine is None or its is None:
                continue
            speed = f"{ratio(its['seconds'], mine['seconds']).median:.2f} times the speed of {deit} at batch {batch}"
            memory = ""
            if its["peak_bytes"]:
                memory = f" and {100 * (1 - mine['peak_bytes'] / its['peak_bytes']):.1f} % less memory"
            sentences.append(f"{vim} has {speed}{memory}; {CLAIMED}")
    return sentences


# --- mixers ---------------------------------------------------------------------------------------------------------


def _trained(parameters: Sequence[Tensor], run: Callable[[], Tensor]) -> Call:
    def call() -> None:
        for parameter in parameters:
            parameter.grad = None
        with torch.autocast(parameters[0].device.type, torch.bfloat16):
            out = run()
        out.float().sum().backward()

    return call


def _inner(function: Any, kind: str, level: int, hidden: Tensor, with_projection: bool = True) -> Call:
    """The upstream function on the parameters of a mixer of this kind; level 1 recomputes what level 0 keeps."""
    mixer = Mamba(hidden.shape[-1], bimamba_type=kind, device=hidden.device)
    arguments = list(mixer._inner_parameters())
    if not with_projection:
        del arguments[4:6]
    rates = [arguments.pop().detach()]
    if kind == "v1":
        rates.append(-torch.exp(mixer.A_b_log.detach()))
    skip = (None, None, mixer.D, mixer.dt_proj.bias, None, None, True)

    def run() -> Tensor:
        return function.apply(mixer._inner_input(hidden), *arguments, *rates, *skip, checkpoint_lvl=level)

    return _trained([hidden, *mixer.parameters()], run)


def _both_ways(level: int, composed: bool, hidden: Tensor) -> Call:
    """The "v2" mixer, or the same composed of its ops."""
    mixer = Mamba(hidden.shape[-1], bimamba_type="v2", if_divide_out=True, device=hidden.device)

    def compose_all(x: Tensor) -> Tensor:
        y = compose(mixer._inner_input(x), mixer._direction(""), mixer._direction("_b"), 0.5)
        out: Tensor = mixer.out_proj(y.transpose(1, 2))
        return out

    run: Callable[[Tensor], Tensor] = compose_all if composed else mixer
    if level:
        return _trained([hidden, *mixer.parameters()], lambda: checkpoint(run, hidden, use_reentrant=False))
    return _trained([hidden, *mixer.parameters()], lambda: run(hidden))


def measure_mixers(device: Device, rounds: int, batch: int = 128, length: int = 197, features: int = 192) -> Findings:
    """Forward and backward of the inner functions and the mixer of both directions, kept and recomputed."""
    hidden = torch.randn(batch, length, features, device=device.device, requires_grad=True)
    calls: dict[str, Call] = {}
    for level in (0, 1):
        how = f"checkpoint_lvl={level}"
        calls |= {
            f"mamba_inner_fn, {how}": _inner(MambaInnerFn, "none", level, hidden),
            f"mamba_inner_fn_no_out_proj, {how}": _inner(MambaInnerFnNoOutProj, "none", level, hidden, False),
            f"bimamba_inner_fn, {how}": _inner(BiMambaInnerFn, "v1", level, hidden),
            f"v2 mixer, {how}": _both_ways(level, False, hidden),
            f"v2 mixer, composed of its ops, {how}": _both_ways(level, True, hidden),
        }
    title = f"Mixers of {features} channels, {length} tokens, forward and backward, bf16 autocast"
    lines, measured = _compare(device, calls, rounds, batch)
    return Findings(tables={title: [HEADER, *lines]}, measured={title: measured})
