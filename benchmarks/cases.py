"""Every benchmark of the repository, as data.

A case is one subject (`subjects.SUBJECTS`) on one path (`paths.PATHS`) and one input. A comparison is what runs
interleaved, with the base of its ratios and what the ratios must show. Sizes are pixels, times seconds, memory bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        subject: what is computed, a key of `subjects.SUBJECTS`.
        path: how, a key of `paths.PATHS`.
        pixels: side of the square picture; ops and blocks get the tokens that Vim makes of it.
        batch: pictures per call.
    """

    subject: str
    path: str = "auto"
    pixels: int = 224
    batch: int = 1

    def __str__(self) -> str:
        return f"{self.subject} ({self.path}), {self.pixels} px, batch {self.batch}"


@dataclass(frozen=True)
class Claim:
    """What a comparison must show: a quantity of one case, divided by that of another if there is one, is bounded.

    Attributes:
        quantity: "seconds" of one call or "peak_bytes" of a process that does nothing else.
        of, over: cases of the comparison.
        must: the largest value that keeps the claim.
        aim: the value worked towards, if it is a smaller one.
    """

    quantity: Literal["seconds", "peak_bytes"]
    of: Case
    over: Case | None
    must: float
    aim: float | None = None


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


RESOLUTIONS = (224, 384, 512, 768, 1024, 1248, 1536, 2048)
OPS = {  # subject: its paths, or (subject, path) of another implementation of the same thing; the last one is the base
    "conv": (("conv", "torch"), ("conv_grouped", "auto")),
    "scan": (("scan", "torch"), ("scan", "loop")),
    "bidirectional_scan": (("bidirectional_scan", "torch"), ("bidirectional_scan", "loop")),
    "norm": (("norm", "auto"), ("norm_builtin", "auto")),
    "block": (("block", "torch"), ("block", "loop")),
}
OP_NAMES = {
    "conv": "causal convolution and SiLU of one direction of a Vim-Tiny block",
    "scan": "selective scan of one direction of a Vim-Tiny block",
    "bidirectional_scan": "both selective scans of a Vim-Tiny block and their gate",
    "norm": "addition to the residual stream and RMS norm of a Vim-Tiny block",
    "block": "one Vim-Tiny block",
}


def _rounds(pixels: int) -> int:
    """Large pictures take seconds each, and spread less."""
    return 15 if pixels <= 512 else 5


def _front_page() -> dict[str, Comparison]:
    """The comparisons of the README: the pure PyTorch path against the step-by-step loop and DeiT-Tiny."""
    torch, loop, deit = Case("vim_tiny", "torch"), Case("vim_tiny", "loop"), Case("deit_tiny")
    table = {
        "vim_tiny_224": Comparison(
            "Vim-Tiny, 224 px",
            (torch, loop, deit),
            deit,
            (Claim("seconds", torch, loop, must=1 / 5), Claim("seconds", torch, deit, must=7, aim=5.5)),
            memory=True,
        )
    }
    for pixels in (512, 1248):
        torch, deit = Case("vim_tiny", "torch", pixels), Case("deit_tiny", pixels=pixels)
        bound = (Claim("peak_bytes", torch, None, must=1.5e9),) if pixels == 1248 else ()
        table[f"vim_tiny_{pixels}"] = Comparison(
            f"Vim-Tiny, {pixels} px", (torch, deit), deit, bound, rounds=_rounds(pixels), memory=True
        )
    return table


def _whole_models() -> dict[str, Comparison]:
    """Vim as it comes (the best backend that is there) against DeiT of the same width."""
    table = {}
    for width in ("tiny", "small", "base"):
        for batch in (1, 8):
            vim, deit = Case(f"vim_{width}", batch=batch), Case(f"deit_{width}", batch=batch)
            title = f"Vim-{width.title()} and DeiT-{width.title()}, 224 px, batch {batch}"
            table[f"{width}_batch{batch}"] = Comparison(title, (vim, deit), deit, rounds=_rounds(224) // batch + 4)
    for pixels in RESOLUTIONS:
        vim, deit = Case("vim_tiny", pixels=pixels), Case("deit_tiny", pixels=pixels)
        title = f"Vim-Tiny and DeiT-Tiny, {pixels} px"
        table[f"resolution_{pixels}"] = Comparison(title, (vim, deit), deit, rounds=_rounds(pixels), memory=True)
    return table


def _ops() -> dict[str, Comparison]:
    table = {}
    for op, entries in OPS.items():
        for pixels in (224, 1248):
            cases = tuple(Case(subject, path, pixels) for subject, path in entries)
            for threads in (1, 2):
                title = f"{OP_NAMES[op]}, {pixels} px, threads: {threads}"
                table[f"{op}_{pixels}_threads{threads}"] = Comparison(
                    title, cases, cases[-1], threads=threads, rounds=_rounds(pixels)
                )
    return table


FRONT_PAGE = _front_page()
COMPARISONS = {**FRONT_PAGE, **_whole_models(), **_ops()}
