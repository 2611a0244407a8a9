"""Every benchmark of the repository, as data.

A case is one subject (`subjects.SUBJECTS`) on one path (`paths.PATHS`), one input, dtype and mode. A comparison is
what runs interleaved, with the base of its ratios and what the ratios must show. Sizes are pixels, times seconds,
memory bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Quantity = Literal["seconds", "seconds_per_element", "peak_bytes", "increase_bytes", "scratch_bytes", "allocated_bytes"]


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        subject: what is computed, a key of `subjects.SUBJECTS`.
        path: how, a key of `paths.PATHS`.
        pixels: side of the square picture; ops and blocks get the tokens that Vim makes of it.
        batch: pictures per call.
        dtype: of the weights and the inputs, all of them; "fp64" is there to compare with.
        mode: "inference"; "train": forward, sum of the output, backward, gradients set to None before; "step": the
            same and AdamW, with a learning rate of 0 so that every call computes the same; or "compiled":
            inference of `torch.compile(subject, fullgraph=True)`, compiled before anything is timed.
    """

    subject: str
    path: str = "auto"
    pixels: int = 224
    batch: int = 1
    dtype: Literal["fp32", "bf16", "fp64"] = "fp32"
    mode: Literal["inference", "train", "step", "compiled"] = "inference"

    def __str__(self) -> str:
        unusual = [value for value in (self.dtype, self.mode) if value not in ("fp32", "inference")]
        return f"{self.subject} ({', '.join([self.path, *unusual])}), {self.pixels} px, batch {self.batch}"


@dataclass(frozen=True)
class Claim:
    """What a comparison must show: a quantity of one case, divided by that of another if there is one, is bounded.

    Attributes:
        quantity: "seconds" of one call; "seconds_per_element" of what the subject counts (`Subject.elements`);
            "peak_bytes" of a process that does nothing else, "increase_bytes" of its calls over the loaded subject,
            "scratch_bytes" that a call takes beyond its inputs and its result, per thread, "allocated_bytes" that it
            holds at once of what it asks PyTorch's allocator for.
        of, over: cases of the comparison.
        must: the largest value that keeps the claim.
        aim: the value worked towards, if it is a smaller one.
        needs: what the machine must have for the claim to apply, a key of `machine.ABILITIES`.
    """

    quantity: Quantity
    of: Case
    over: Case | None
    must: float
    aim: float | None = None
    needs: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Cases that run in turn, in one process, on the same threads.

    Attributes:
        title: what is compared, for people.
        base: the case that the times of the others are divided by.
        rounds: measured calls of each case.
        memory: whether the peak memory of each case is measured too, in a process of its own.
    """

    title: str
    cases: tuple[Case, ...]
    base: Case
    claims: tuple[Claim, ...] = ()
    threads: int = 2
    rounds: int = 15
    memory: bool = False


Named = Iterator[tuple[str, Comparison]]

RESOLUTIONS = (224, 384, 512, 768, 1024, 1248, 1536, 2048)
WIDTHS = ("tiny", "small", "base")
LOOP64 = ("scan", "loop", "fp64")
OPS = {  # subject: (subject, path) of each way to compute it, or (subject, path, dtype); the last one is the base
    "conv": (("conv", "auto"), ("conv", "torch"), ("copy", "auto"), ("conv_grouped", "auto")),
    "scan": (("scan", "auto"), ("scan", "torch"), LOOP64, ("scan", "loop")),
    "bidirectional_scan": tuple(("bidirectional_scan", path) for path in ("auto", "torch", "loop")),
    "norm": (("norm", "auto"), ("norm", "torch"), ("norm_builtin", "auto")),
    "block": tuple(("block", path) for path in ("auto", "torch", "loop")),
}
OP_NAMES = {
    "conv": "causal convolution and SiLU of one direction of a Vim-Tiny block",
    "scan": "selective scan of one direction of a Vim-Tiny block",
    "bidirectional_scan": "both selective scans of a Vim-Tiny block and their gate",
    "norm": "addition to the residual stream and RMS norm of a Vim-Tiny block",
    "block": "one Vim-Tiny block",
}
# Vim's seconds over DeiT's of the same width, (must, aim) of (width, pixels, batch)
OVER_DEIT = {
    ("tiny", 224, 1): (1.25, 1.0),
    ("tiny", 224, 8): (1.35, 1.15),
    ("tiny", 512, 1): (0.85, 0.65),
    ("tiny", 1248, 1): (0.30, 0.23),
    ("small", 224, 1): (1.15, 1.05),
    ("base", 224, 1): (1.15, 1.05),
}


def _rounds(pixels: int) -> int:
    """Large pictures take seconds each, and spread less."""
    return 15 if pixels <= 512 else 5


def _over_deit(width: str, pixels: int, batch: int = 1) -> tuple[Claim, ...]:
    """What is claimed of Vim as it comes over DeiT, if anything."""
    bounds = OVER_DEIT.get((width, pixels, batch))
    vim, deit = (Case(f"{family}_{width}", pixels=pixels, batch=batch) for family in ("vim", "deit"))
    return () if bounds is None else (Claim("seconds", vim, deit, *bounds),)


def _front_page() -> Named:
    """The comparisons of the README: Vim-Tiny as it comes and in pure PyTorch, its step-by-step loop, DeiT-Tiny."""
    for pixels in (224, 512, 1248):
        vim, torch = (Case("vim_tiny", path, pixels) for path in ("auto", "torch"))
        deit = Case("deit_tiny", pixels=pixels)
        cases: tuple[Case, ...] = (vim, torch, deit)
        claims = _over_deit("tiny", pixels)
        if pixels == 224:
            loop = Case("vim_tiny", "loop")
            cases = (vim, torch, loop, deit)
            claims += (Claim("seconds", torch, loop, must=0.2), Claim("seconds", torch, deit, must=7, aim=5.5))
        if pixels == 1248:
            claims += (Claim("increase_bytes", vim, deit, must=0.8, aim=0.5),)
            claims += (Claim("peak_bytes", torch, None, must=1.5e9),)
        title = f"Vim-Tiny, {pixels} px"
        yield f"vim_tiny_{pixels}", Comparison(title, cases, deit, claims, rounds=_rounds(pixels), memory=True)


def _vmamba() -> Named:
    """VMamba-Tiny as it comes and in pure PyTorch, over what it would take without its scans, and Swin-Tiny."""
    vmamba, torch = (Case("vmamba_tiny", path) for path in ("auto", "torch"))
    floor, swin = Case("vmamba_tiny_unscanned"), Case("swin_tiny")
    claims = (
        Claim("seconds", vmamba, floor, must=1.25),
        Claim("seconds", vmamba, swin, must=1.0),
        Claim("seconds", torch, vmamba, must=3),
    )
    title = "VMamba-Tiny (s2l5), 224 px"
    yield "vmamba_tiny_224", Comparison(title, (vmamba, torch, floor, swin), swin, claims, memory=True)
    vmamba, swin = (Case(name, pixels=1024) for name in ("vmamba_tiny", "swin_tiny"))
    memory = Claim("peak_bytes", vmamba, swin, must=1.0)
    title = "VMamba-Tiny (s2l5), 1024 px"
    yield "vmamba_tiny_1024", Comparison(title, (vmamba, swin), swin, (memory,), rounds=_rounds(1024), memory=True)


def _whole_models() -> Named:
    """Vim as it comes (the best backend that is there) against DeiT of the same width."""
    for width in WIDTHS:
        for batch in (1, 8):
            vim, deit = Case(f"vim_{width}", batch=batch), Case(f"deit_{width}", batch=batch)
            title = f"Vim-{width.title()} and DeiT-{width.title()}, 224 px, batch {batch}"
            rounds, name = _rounds(224) // batch + 4, f"{width}_batch{batch}"
            claims = () if name == "tiny_batch1" else _over_deit(width, 224, batch)  # the front page has that one
            yield name, Comparison(title, (vim, deit), deit, claims, rounds=rounds)
            one = Comparison(f"{title}, one thread", (vim, deit), deit, threads=1, rounds=rounds)
            yield f"{name}_threads1", one
    for pixels in RESOLUTIONS:
        vim, deit = Case("vim_tiny", pixels=pixels), Case("deit_tiny", pixels=pixels)
        title = f"Vim-Tiny and DeiT-Tiny, {pixels} px"
        yield f"resolution_{pixels}", Comparison(title, (vim, deit), deit, rounds=_rounds(pixels), memory=True)


def _paths() -> Named:
    """Every path in one run: the best backend, the compiled kernels by name, pure PyTorch, one step at a time."""
    for subject, title in (("vim_tiny", "Vim-Tiny"), ("scan", OP_NAMES["scan"])):
        cases = tuple(Case(subject, path) for path in ("auto", "native", "torch", "loop"))
        yield f"paths_{subject}", Comparison(f"every path of {title}, 224 px", cases, cases[-1])


def _dtypes_and_modes() -> Named:
    """bf16 against fp32, forward and backward, and torch.compile; Vim as it comes and DeiT with the same."""
    for pixels in (224, 512, 1248):
        vim, deit = ("vim_tiny", "auto", pixels), ("deit_tiny", "auto", pixels)
        cases = tuple(Case(*network, dtype=dtype) for network in (vim, deit) for dtype in ("bf16", "fp32"))
        title, claims = f"Vim-Tiny and DeiT-Tiny in bf16 and fp32, {pixels} px", _bf16_claims(pixels, cases)
        yield f"bf16_{pixels}", Comparison(title, cases, cases[-1], claims, rounds=_rounds(pixels))
    for batch in (1, 8):
        networks = (("vim_tiny", "auto"), ("vim_tiny", "torch"), ("deit_tiny", "auto"))
        cases = tuple(Case(name, path, batch=batch, mode="train") for name, path in networks)
        claims = (Claim("seconds", cases[0], cases[2], must=1.8, aim=1.3),) if batch == 8 else ()
        title = f"forward and backward of Vim-Tiny and DeiT-Tiny, 224 px, batch {batch}"
        yield f"train_batch{batch}", Comparison(title, cases, cases[-1], claims, rounds=9)
    cases = tuple(Case(name, path, batch=8, mode="step") for name, path in networks)
    title, claims = (
        "a step of AdamW of Vim-Tiny and DeiT-Tiny, 224 px, batch 8",
        (Claim("seconds", cases[0], cases[2], must=1.8),),
    )
    yield "step_batch8", Comparison(title, cases, cases[-1], claims, rounds=9)
    recomputed, kept = (Case(name, batch=8, mode="train") for name in ("vim_tiny_recomputed", "vim_tiny"))
    title, claims = (
        "Vim-Tiny with --use-checkpoint, forward and backward",
        (Claim("allocated_bytes", recomputed, kept, 0.5),),
    )
    yield "recomputed_batch8", Comparison(title, (recomputed, kept), kept, claims, rounds=5, memory=True)
    for op in ("scan", "block"):
        cases = tuple(Case(op, path, mode="train") for path in ("auto", "torch"))
        yield f"train_{op}", Comparison(f"forward and backward of {OP_NAMES[op]}, 224 px", cases, cases[-1])
    eager, compiled = Case("vim_tiny"), Case("vim_tiny", mode="compiled")
    cases = (eager, compiled, Case("deit_tiny"), Case("deit_tiny", mode="compiled"))
    claim = Claim("seconds", compiled, eager, must=1.05)
    yield "compiled_224", Comparison("Vim-Tiny and DeiT-Tiny through torch.compile, 224 px", cases, cases[2], (claim,))


def _bf16_claims(pixels: int, cases: Sequence[Case]) -> tuple[Claim, ...]:
    narrow, wide, deit, _ = cases
    if pixels == 1248:
        return (Claim("seconds", narrow, deit, must=0.55, aim=0.40),)
    must, aim = {224: (0.85, 0.7), 512: (0.7, 0.55)}[pixels]
    return (Claim("seconds", narrow, wide, must, aim, needs="bf16 products"),)


def _ops() -> Named:
    for op, entries in OPS.items():
        for pixels, batch in ((224, 1), (1248, 1), (224, 8)):
            cases = tuple(
                Case(subject, path, pixels, _pictures(subject, pixels, batch), *dtype)  # type: ignore[arg-type]
                for subject, path, *dtype in entries
            )
            name, title = f"{op}_{pixels}", f"{OP_NAMES[op]}, {pixels} px"
            if batch > 1:
                name, title = f"{name}_batch{batch}", f"{title}, batch {batch}"
            for threads in (1, 2):
                claims, rounds = _op_claims(cases[0], threads), _rounds(pixels)
                here = Comparison(f"{title}, threads: {threads}", cases, cases[-1], claims, threads, rounds)
                yield f"{name}_threads{threads}", here
    cases = (Case("inner", pixels=1248), Case("inner", "torch", 1248))
    claim = Claim("scratch_bytes", cases[0], None, must=8e6, aim=2e6)
    title = "a Vim-Tiny block between its outer projections, 1248 px"
    yield "inner_1248", Comparison(title, cases, cases[0], (claim,), rounds=_rounds(1248), memory=True)


def _vmamba_ops() -> Named:
    """The scan of a block of VMamba-Tiny's first stage, with one state and with 16; also forward and backward."""
    for states in (1, 16):
        subject = f"scan_2d_{states}"
        for mode in ("inference", "train"):
            cases = tuple(Case(subject, path, mode=mode) for path in ("auto", "torch"))
            title = f"four scans of a block of VMamba-Tiny's first stage, {states} states, 224 px"
            name, title = (subject, title) if mode == "inference" else (f"train_{subject}", f"gradients of {title}")
            yield name, Comparison(title, cases, cases[-1])


def _pictures(subject: str, pixels: int, batch: int) -> int:
    """The batch of a case; of a copy, which measures the bandwidth of the memory, so many that no cache holds them."""
    return 2**27 // (pixels**2 * 6) if subject == "copy" else batch


def _op_claims(case: Case, threads: int) -> tuple[Claim, ...]:
    """What is claimed of an op as it comes: of one scan on one core, of a convolution that no cache holds."""
    if (case, threads) == (Case("scan"), 1):
        return tuple(
            Claim("seconds_per_element", case, None, must, aim, needs)
            for needs, must, aim in (("AVX-512 kernels", 0.20e-9, 0.14e-9), ("AVX2 kernels", 0.32e-9, 0.24e-9))
        )
    if (case, threads) == (Case("conv", pixels=1248), 2):
        copy = Case("copy", pixels=1248, batch=_pictures("copy", 1248, 1))
        return (Claim("seconds_per_element", case, copy, must=2.0, aim=1.3),)
    return ()


def _peers() -> Named:
    """Implementations that other packages offer, which `requirements/peers.txt` installs."""
    scans = (("scan", "auto"), ("scan", "torch"), ("mambapy_scan_sequential", "auto"), ("mambapy_scan", "auto"))
    mixers = (("mixer", "auto"), ("mixer", "torch"), ("mambapy_mixer", "auto"), ("transformers_mixer", "auto"))
    what = {"scan": (OP_NAMES["scan"], scans), "mixer": ("a Mamba mixer of Vim-Tiny's sizes, one direction", mixers)}
    for name, (title, entries) in what.items():
        for pixels in (224, 1248):
            cases = tuple(Case(subject, path, pixels) for subject, path in entries)
            title_here = f"other packages: {title}, {pixels} px"
            yield (
                f"peers_{name}_{pixels}",
                Comparison(title_here, cases, cases[-1], rounds=_rounds(pixels), memory=pixels == 1248),
            )
        cases = tuple(Case(subject, path, mode="train") for subject, path in entries)
        title_here = f"other packages: forward and backward of {title}, 224 px"
        yield f"peers_{name}_train", Comparison(title_here, cases, cases[-1])


def _exports() -> Named:
    """ONNX files in ONNX Runtime against PyTorch and against the published scheme of their scans, and int8."""
    titles = {"vim_tiny": "Vim-Tiny", "vmamba_tiny": "VMamba-Tiny (s2l5)"}
    for key, title in titles.items():
        native, torch = (Case(key, path) for path in ("auto", "torch"))
        chunks, steps, operators, published = (
            Case(f"{key}_onnx_{way}") for way in ("chunks", "steps", "operators", "chunk24")
        )
        if key == "vim_tiny":
            cases: tuple[Case, ...] = (native, torch, chunks, steps, operators)
            bounds = [Claim("seconds", chunks, native, must=9, aim=5), Claim("seconds", operators, native, must=1.3)]
        else:
            cases = (native, torch, chunks, steps, operators, published)
            bounds = [Claim("seconds", chunks, published, must=0.25)]
        as_onnx = f"{title} as ONNX, 224 px"
        yield f"onnx_{key}", Comparison(as_onnx, cases, native, tuple(bounds), rounds=_rounds(224))
        narrow = [Case(f"{key}_{way}_{scheme}") for way in ("int8", "onnx_int8") for scheme in ("dynamic", "static")]
        pairs = zip(narrow, (native, native, operators, operators), strict=True)
        claims = tuple(Claim("seconds", case, wide, must=0.8, needs="VNNI") for case, wide in pairs)
        title = f"{title} in int8 and fp32, 224 px"
        yield f"int8_{key}", Comparison(title, (native, operators, *narrow), native, claims, rounds=_rounds(224))


FRONT_PAGE = {**dict(_front_page()), **dict(_vmamba())}
COMPARISONS = {
    **FRONT_PAGE,
    **dict(_vmamba_ops()),
    **dict(_exports()),
    **dict(_whole_models()),
    **dict(_paths()),
    **dict(_dtypes_and_modes()),
    **dict(_ops()),
    **dict(_peers()),
}
GROUPS = {"claims": tuple(name for name, comparison in COMPARISONS.items() if comparison.claims)}
