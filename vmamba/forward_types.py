"""The names of SS2D's variants ("forward types"), read once into a description.

A name is a base and, in this order, the postfixes that are wanted: one out-norm, then `_nozact`, `_noz`, `_oact`,
`_no32`, as in `v05_onnone_noz`. Source: arXiv 2401.10166 and the configurations of its published code.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

# What each base scans; every name of one pattern computes the same function.
_BASES = {
    **dict.fromkeys(("v0", "v0seq"), "cross"),
    **dict.fromkeys(("v01", "v02", "v03", "v04", "v05", "v1", "v2", "v3", "v4"), "cross"),
    **dict.fromkeys(("v051d", "v31d"), "rows"),
    **dict.fromkeys(("v052d", "v32d"), "both"),
    **dict.fromkeys(("v052dc", "v32dc"), "cascade"),
}
_VANILLA = ("v0", "v0seq")
_OUT_NORMS = ("onnone", "ondwconv3", "oncnorm", "onsoftmax", "onsigmoid")
_SWITCHES = ("nozact", "noz", "oact", "no32")  # in the order in which they are written


@dataclass(frozen=True)
class ForwardType:
    """What a name asks for.

    Attributes:
        directions: the pattern of the scans: "cross" (rows and columns, both ways), "rows" (rows four times), "both"
            (rows twice, and twice reversed) or "cascade" (rows both ways, then columns both ways).
        vanilla: the gate, a 3 x 3 convolution with bias, SiLU, LayerNorm and initialisation v0, whatever else is asked.
        gate: multiply the scan's output by a second half of the input projection.
        gate_act: apply the activation to the gate.
        out_act: apply GELU to the scan's output before the gate.
        out_norm: "norm" (LayerNorm), "onnone", "ondwconv3", "oncnorm", "onsoftmax" or "onsigmoid".
    """

    directions: str = "cross"
    vanilla: bool = False
    gate: bool = True
    gate_act: bool = True
    out_act: bool = False
    out_norm: str = "norm"


def nearest(name: object, valid: Iterable[str]) -> str:
    """Return the one of `valid` that reads most like `name`."""
    return difflib.get_close_matches(str(name).lower(), sorted(valid), n=1, cutoff=0.0)[0]


def refuse_unknown(whose: str, names: Iterable[str], valid: Iterable[str]) -> None:
    """Raise TypeError for the first of the names of options that `whose` function has not; names the nearest one."""
    for name in names:
        raise TypeError(f"{whose} has no option {name!r}; the nearest is {nearest(name, valid)!r}")


def parse_forward_type(name: str) -> ForwardType:
    """Return what the forward type `name` asks for.

    `_no32`, which chose the scan's dtype, is accepted and changes nothing: every scan runs in at least fp32.

    Raises:
        ValueError: there is no such forward type; names the nearest one, which for postfixes in another order is the
            same in the right order.
    """
    base, *tags = str(name).split("_")
    if name not in _valid_names(base):
        raise ValueError(f"there is no `forward_type` {name!r}; the nearest is {_suggestion(str(name))!r}")
    return ForwardType(
        directions=_BASES[base],
        vanilla=base in _VANILLA,
        gate="noz" not in tags,
        gate_act="nozact" not in tags,
        out_act="oact" in tags,
        out_norm=next((tag for tag in tags if tag in _OUT_NORMS), "norm"),
    )


def _valid_names(base: str) -> list[str]:
    """Every name that begins with this base; none for an unknown one. The vanilla ones take no postfix."""
    if base not in _BASES or base in _VANILLA:
        return [base] if base in _VANILLA else []
    choices = [("", *_OUT_NORMS), *(("", tag) for tag in _SWITCHES)]
    return ["_".join(filter(None, (base, *tags))) for tags in itertools.product(*choices)]


def _suggestion(name: str) -> str:
    base, *tags = name.split("_")
    places = {tag: place for place, tag in enumerate((*_OUT_NORMS, *_SWITCHES))}
    if all(tag in places for tag in tags):
        ordered = "_".join((base, *sorted(set(tags), key=places.__getitem__)))
        if ordered in _valid_names(base):
            return ordered
    return nearest(name, itertools.chain.from_iterable(map(_valid_names, _BASES)))
