"""The language of forward types: what each name means, and what is refused."""

import itertools

import pytest

from vmamba import SS2D, VSSM
from vmamba.forward_types import ForwardType, parse_forward_type

CROSS = ("v01", "v02", "v03", "v04", "v05", "v1", "v2", "v3", "v4")
PATTERNS = {
    **dict.fromkeys(CROSS, "cross"),
    **dict.fromkeys(("v051d", "v31d"), "rows"),
    **dict.fromkeys(("v052d", "v32d"), "both"),
    **dict.fromkeys(("v052dc", "v32dc"), "cascade"),
}
OUT_NORMS = ("onnone", "ondwconv3", "oncnorm", "onsoftmax", "onsigmoid")


@pytest.mark.parametrize(("base", "directions"), PATTERNS.items())
def test_every_base_with_every_postfix(base, directions):
    assert parse_forward_type(base) == ForwardType(directions)
    for tags in itertools.product(("", *OUT_NORMS), ("", "nozact"), ("", "noz"), ("", "oact"), ("", "no32")):
        norm, nozact, noz, oact, _ = tags
        expected = ForwardType(
            directions,
            gate=not noz,
            gate_act=not nozact,
            out_act=bool(oact),
            out_norm=norm or "norm",
        )
        assert parse_forward_type("_".join(filter(None, (base, *tags)))) == expected


@pytest.mark.parametrize("name", ["v0", "v0seq"])
def test_the_vanilla_names(name):
    assert parse_forward_type(name) == ForwardType(vanilla=True)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("v05_noz_onnone", "v05_onnone_noz"),
        ("v05_no32_oact_noz_onsoftmax", "v05_onsoftmax_noz_oact_no32"),
        ("v052dc_oact_oncnorm", "v052dc_oncnorm_oact"),
        ("v05_noz_noz", "v05_noz"),
        ("v05_onnone_onsoftmax", None),
        ("v05_nonz", "v05_noz"),
        ("V05_NOZ", "v05_noz"),
        ("v052d3", "v052d"),
        ("v0_noz", "v05_noz"),
        ("v05_", "v05"),
        ("v5", "v05"),
        ("", None),
        ("xv1a", None),
        ("xv2a_noz", None),
        ("xv3a", None),
        ("m0", None),
        ("m0_noz", None),
        ("_noz", None),
        (None, None),
    ],
)
def test_what_means_nothing_is_refused_at_construction(name, near):
    with pytest.raises(ValueError, match="there is no `forward_type`") as caught:
        SS2D(8, forward_type=name)
    suggestion = str(caught.value).rsplit("the nearest is ", 1)[1].strip("'")
    parse_forward_type(suggestion)
    assert near in (None, suggestion)
    assert repr(name) in str(caught.value)
    with pytest.raises(ValueError, match="there is no `forward_type`"):
        VSSM(forward_type=name)
