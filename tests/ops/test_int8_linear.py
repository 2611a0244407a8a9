"""Products with weights in int8: their definition in whole numbers on every backend, and mixers with such weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from int8_cases import STEPS, case
from mamba_ssm.modules.int8 import quantize
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.int8 import LEVELS, Int8Weight, int8_linear, linear, quantize_weight, quantized_rows


def defined(x, weight: Int8Weight, bias):
    """`int8_linear` row by row, with sums of Python's whole numbers."""
    out = torch.empty(x.shape[0], weight.shape[0])
    for i, row in enumerate(x):
        largest = row.abs().max()
        step = largest / LEVELS if weight.step is None else weight.step
        inverse = torch.tensor(float(LEVELS)) / largest if weight.step is None else torch.tensor(1.0) / step
        levels = [max(-LEVELS, min(LEVELS, round(value))) for value in (row * inverse).tolist()]
        for j, column in enumerate(weight.values.tolist()):
            total = torch.tensor(sum(a * b for a, b in zip(levels, column, strict=True)), dtype=torch.float32)
            out[i, j] = total * (step * weight.scales[j]) + (0.0 if bias is None else bias[j])
    return out


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("bias", [True, False])
def test_the_definition_is_kept_bit_by_bit(backend, step, bias):
    x, weight, shift = case(7, 21, 19, step, bias)
    assert torch.equal(int8_linear(x, weight, shift), defined(x, weight, shift))


@pytest.mark.parametrize("step", STEPS)
def test_a_product_is_near_that_of_the_numbers(backend, step):
    x, weight, bias = case(31, 96, 40, step)
    x = x.clamp(-2.5, 2.5)
    exact = x.double() @ (weight.values.double() * weight.scales[:, None]).t() + bias
    steps = x.abs().amax(-1, keepdim=True) / LEVELS if step is None else torch.tensor(step)
    bound = 0.5 * steps * (weight.values.double().abs() * weight.scales[:, None]).sum(1) * 1.001
    assert ((int8_linear(x, weight, bias) - exact).abs() <= bound).all()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("strange", [float("nan"), float("inf"), -float("inf")])
def test_a_row_with_a_strange_number_gives_nan_and_spoils_no_other(backend, strange, step):
    x, weight, bias = case(6, 37, 20, step)
    want = int8_linear(x, weight, bias)
    x[2, 35], x[4, 0] = strange, strange
    found = int8_linear(x, weight, bias)
    assert found[[2, 4]].isnan().all()
    assert torch.equal(found[[0, 1, 3, 5]], want[[0, 1, 3, 5]])


def test_rows_of_zeros_and_of_next_to_nothing_and_of_much(backend):
    _, weight, bias = case(1, 40, 8)
    x = torch.randn(4, 40) * torch.tensor([0.0, 1e-42, 1e-32, 1e30])[:, None]
    found = int8_linear(x, weight, bias)
    assert torch.equal(found[0], bias)
    assert torch.equal(found[1:3], bias.expand(2, -1))
    assert found[3].isfinite().all()
    assert found[3].abs().max() > 1e28


def test_what_is_beyond_a_given_step_counts_as_its_last_level(backend):
    _, weight, _ = case(1, 9, 5, step=0.5)
    x = torch.full((1, 9), 1e30)
    x[0, ::2] = -64.0
    want = torch.where(x > 0, 1.0, -1.0) * (LEVELS * 0.5)
    assert torch.equal(int8_linear(x, weight), int8_linear(want, weight))


def test_halves_are_rounded_to_the_even_number(backend):
    weight = Int8Weight(torch.eye(6, dtype=torch.int8), torch.ones(6), torch.tensor(2.0))
    x = torch.tensor([[1.0, 3.0, 5.0, -1.0, -3.0, -7.0]])
    assert int8_linear(x, weight).tolist() == [[0.0, 4.0, 4.0, 0.0, -4.0, -8.0]]


def test_the_largest_sums_are_exact(backend):
    values = torch.full((3, 4096), LEVELS, dtype=torch.int8)
    values[1] = -LEVELS
    weight = Int8Weight(values, torch.ones(3), torch.tensor(1.0))
    found = int8_linear(torch.full((2, 4096), 200.0), weight)
    assert found.tolist() == [[float(4096 * LEVELS**2), -float(4096 * LEVELS**2), float(4096 * LEVELS**2)]] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_and_any_layout(backend, dtype):
    x, weight, bias = case(12, 18, 7)
    x = x.view(3, 4, 18).to(dtype).transpose(0, 1)
    found = int8_linear(x, weight, bias)
    assert (found.dtype, found.shape) == (dtype, (4, 3, 7))
    want = int8_linear(x.float().contiguous(), weight, bias)
    assert (found.float() - want).abs().max() <= (2e-6 if dtype is torch.float64 else 0.01) * want.abs().max()
    assert int8_linear(x[0, 0], weight, bias).shape == (7,)


def test_autocast_does_not_narrow_the_whole_numbers(backend):
    x, weight, bias = case(9, 70, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(int8_linear(x, weight, bias), int8_linear(x, weight, bias).float())
        inside = int8_linear(x, weight, bias)
    assert torch.equal(inside, int8_linear(x, weight, bias))


def test_the_weight_of_a_row_keeps_its_largest_number():
    weight = torch.randn(5, 30)
    weight[3] = 0
    values, scales = quantize_weight(weight)
    assert values.abs().amax(1).tolist() == [127, 127, 127, 0, 127]
    assert ((values * scales[:, None]) - weight).abs().max() <= 0.5001 * scales.max()
    with pytest.raises(ValueError, match="not finite"):
        quantize_weight(torch.full((2, 2), float("nan")))
    with pytest.raises(ValueError, match=r"shape \(o, i\)"):
        quantize_weight(torch.ones(3))


def test_linear_takes_either_kind_of_weight(backend):
    x, weight, bias = case(4, 10, 3)
    assert torch.equal(linear(x, weight, bias), int8_linear(x, weight, bias))
    plain = torch.randn(3, 10)
    assert torch.equal(linear(x, plain, bias), nn.functional.linear(x, plain, bias))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, w, b: (x[:, :3], w, b), r"`x` must have shape \(\.\.\., 10\)"),
        (lambda x, w, b: (x.int(), w, b), "real numbers"),
        (lambda x, w, b: (x, w._replace(values=w.values.int()), b), "`weight` must be int8"),
        (lambda x, w, b: (x, w._replace(scales=w.scales[:2]), b), "`weight.scales` must be"),
        (lambda x, w, b: (x, w._replace(scales=w.scales.double()), b), "`weight.scales` must be"),
        (lambda x, w, b: (x, w._replace(step=torch.ones(2)), b), "`weight.step` must be one number"),
        (lambda x, w, b: (x, w._replace(step=torch.ones(1, 1, 1)), b), "`weight.step` must be one number"),
        (lambda x, w, b: (x, w._replace(step=torch.ones(1)), b), r"of shape \(\)"),
        (lambda x, w, b: (x, w._replace(step=torch.ones((), dtype=torch.float64)), b), "`weight.step` must be one"),
        (lambda x, w, b: (x[0, 0], w, b), "`x` must have shape"),
        (lambda x, w, b: (x, w._replace(values=w.values[:, :9]), b), "`x` must have shape"),
        (lambda x, w, b: (x, w._replace(values=w.values[0]), b), "`weight` must be int8 of shape"),
        (lambda x, w, b: (x, w, b[:2]), "`bias` must have shape"),
    ],
)
def test_what_does_not_fit_is_named(change, words, backend):
    x, weight, bias = change(*case(4, 10, 3))
    with pytest.raises(ValueError, match=words):
        int8_linear(x, weight, bias)
    with pytest.raises(ValueError, match=words):  # nor may the op itself read beyond its arguments
        torch.ops.mamba_ssm.int8_linear(x, weight.values, weight.scales, bias, weight.step)


def test_more_inputs_than_a_sum_has_room_for_are_refused():
    weight = Int8Weight(torch.zeros(1, 66_053, dtype=torch.int8), torch.ones(1))
    with pytest.raises(ValueError, match="66052 inputs"):
        int8_linear(torch.zeros(1, 66_053), weight)


def test_a_gradient_is_refused():
    x, weight, bias = case(4, 10, 3)
    with pytest.raises(RuntimeError, match="cannot be trained"):
        int8_linear(x.requires_grad_(), weight, bias)


def test_rows_and_steps():
    levels, steps = quantized_rows(torch.tensor([[1.0, -0.5, 0.25]]), None)
    assert levels.tolist() == [[127.0, -64.0, 32.0]]
    assert steps.item() == pytest.approx(1 / 127)


def test_the_schema_and_the_fake():
    x, weight, bias = case(4, 10, 3)
    arguments = (x, weight.values, weight.scales, bias, None)
    torch.library.opcheck(
        torch.ops.mamba_ssm.int8_linear.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_it_is_compiled_whole():
    x, weight, bias = case(4, 10, 3)
    run = torch.compile(lambda x: int8_linear(x, weight, bias) * 2, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(run(x), int8_linear(x, weight, bias) * 2)


@pytest.mark.parametrize("kind", ["none", "v1", "v2"])
@torch.no_grad()
def test_every_kind_of_mixer_is_quantised(kind, backend):
    mixer = Mamba(32, d_state=4, bimamba_type=kind).eval()
    x = torch.randn(2, 9, 32)
    want = mixer(x)
    found = quantize(copy.deepcopy(mixer))(x)
    assert 0 < (found - want).abs().max() <= 0.05 * want.abs().max()


@torch.no_grad()
def test_steps_of_a_quantised_mixer_are_its_whole_sequence():
    mixer = quantize(Mamba(32, d_state=4).eval())
    x = torch.randn(2, 9, 32)
    states = mixer.allocate_inference_cache(2, 9)
    steps = torch.cat([mixer.step(x[:, i : i + 1], *states)[0] for i in range(9)], 1)
    whole = mixer(x)
    assert (steps - whole).abs().max() <= 0.02 * whole.abs().max()
