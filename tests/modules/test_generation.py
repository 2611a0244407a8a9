"""Sampling against simple definitions, and the decoding loop with a toy model whose answers are known."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mamba_ssm.utils import generation
from mamba_ssm.utils.generation import GenerationMixin, InferenceParams, decode, sample

# Quarters are exact in fp32, so that equal means equal.
LOGITS = st.lists(st.integers(-40, 40).map(lambda n: n / 4), min_size=1, max_size=12)


def probabilities(logits: list[float]) -> list[float]:
    weights = [math.exp(value) for value in logits]
    return [weight / sum(weights) for weight in weights]


def kept(logits: Tensor) -> list[bool]:
    return [math.isfinite(value) for value in logits.tolist()]


@given(LOGITS, st.integers(0, 15))
@settings(deadline=None)
def test_top_k(logits: list[float], top_k: int) -> None:
    filtered = torch.tensor(logits)
    generation.modify_logits_for_top_k_filtering(filtered, top_k)
    limit = sorted(logits)[-top_k] if 0 < top_k <= len(logits) else -math.inf
    assert kept(filtered) == [value >= limit for value in logits]
    assert [value for value in filtered.tolist() if math.isfinite(value)] == [v for v in logits if v >= limit]


@given(LOGITS, st.floats(0.0, 1.0))
@settings(deadline=None)
def test_min_p(logits: list[float], min_p: float) -> None:
    chances = probabilities(logits)
    assume(all(abs(chance / max(chances) - min_p) > 1e-5 or chance == max(chances) for chance in chances))
    filtered = torch.tensor(logits)
    generation.modify_logits_for_min_p_filtering(filtered, min_p)
    assert kept(filtered) == [chance >= min_p * max(chances) for chance in chances]


@given(
    st.lists(st.integers(-40, 40).map(lambda n: n / 4), min_size=1, max_size=12, unique=True),
    st.floats(0.0, 1.0),
)
@settings(deadline=None)
def test_top_p(logits: list[float], top_p: float) -> None:
    chances = probabilities(logits)
    before = [sum(other for other in chances if other > chance) for chance in chances]
    assume(all(abs(mass - top_p) > 1e-5 for mass in before if mass > 0))
    filtered = torch.tensor(logits)
    generation.modify_logits_for_top_p_filtering(filtered, top_p)
    off = top_p in (0.0, 1.0)
    assert kept(filtered) == [off or mass < top_p or mass == 0 for mass in before]


@given(LOGITS, st.lists(st.integers(0, 11), min_size=1, max_size=6), st.sampled_from([0.5, 1.0, 2.0]))
@settings(deadline=None)
def test_repetition_penalty(logits: list[float], previous: list[int], penalty: float) -> None:
    previous = [token % len(logits) for token in previous]
    found = torch.tensor([logits])
    result = generation.modify_logit_for_repetition_penalty(found, torch.tensor([previous]), penalty)
    assert result is found
    expected = [
        value if token not in previous else value * penalty if value < 0 else value / penalty
        for token, value in enumerate(logits)
    ]
    assert found[0].tolist() == expected


def test_filters_act_on_each_row() -> None:
    rows = torch.tensor([[0.0, 5.0, 4.9], [9.0, 1.0, 8.9]])
    for modify, value in (
        (generation.modify_logits_for_min_p_filtering, 0.5),
        (generation.modify_logits_for_top_p_filtering, 0.9),
        (generation.modify_logits_for_top_k_filtering, 2),
    ):
        filtered = rows.clone()
        modify(filtered, value)
        assert [kept(row) for row in filtered] == [[False, True, True], [True, False, True]]


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 0}, [0, 1, 2, 3]),
        ({"top_k": 2}, [0, 2]),
        ({"top_k": 99, "temperature": 2.0}, [0, 1, 2, 3]),
        ({"top_k": 0, "top_p": 0.5}, [0]),
        ({"top_k": 0, "min_p": 0.3}, [0, 2]),
        ({"top_k": 3, "min_p": 0.3, "temperature": 0.5}, [0, 2]),
        # Among 0, 1 and 2 the first alone has 0.64 of the probability, the first two have 0.87.
        ({"top_k": 3, "top_p": 0.7}, [0, 2]),
    ],
)
def test_sampling_distribution(options: dict[str, Any], allowed: list[int]) -> None:
    logits = torch.tensor([2.0, 0.5, 1.0, 0.0])
    draws = 20_000
    torch.manual_seed(0)
    before = logits.clone()
    found = sample(logits.expand(draws, 4), **options)
    assert found.shape == (draws,)
    assert torch.equal(logits, before)
    wanted = torch.full((4,), -math.inf)
    wanted[allowed] = logits[allowed] / options.get("temperature", 1.0)
    chances = torch.softmax(wanted, dim=0)
    frequencies = torch.bincount(found, minlength=4) / draws
    # Five standard deviations.
    assert ((frequencies - chances).abs() <= 5 * (chances * (1 - chances) / draws).sqrt()).all()


def test_greedy_ignores_the_other_options() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [4.0, 3.0, 1.0]], dtype=torch.bfloat16)
    assert sample(logits, top_k=1, temperature=0.0, top_p=0.1).tolist() == [1, 0]
    assert sample(logits, top_k=0, min_p=1.0).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"top_k": -1}, "top_k"),
        ({"top_k": 0, "top_p": 1.5}, "top_p"),
        ({"top_k": 0, "min_p": -0.1}, "min_p"),
        ({"top_k": 0, "temperature": 0.0}, "temperature"),
    ],
)
def test_sample_refuses_numbers_out_of_range(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        sample(torch.zeros(1, 4), **options)


def test_repetition_penalty_must_be_positive() -> None:
    with pytest.raises(ValueError, match="`repetition_penalty` must be above 0"):
        generation.modify_logit_for_repetition_penalty(torch.zeros(1, 4), torch.zeros(1, 1).long(), 0.0)


VOCABULARY = 8


class Counter(nn.Module, GenerationMixin):
    """After token t it gives t + 1 the logit 5 and t + 2 the logit 3; it also notes how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(1))
        self.calls: list[tuple[int, list[int] | None, int]] = []

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        inference_params: InferenceParams,
        num_last_tokens: int,
    ) -> SimpleNamespace:
        positions = None if position_ids is None else position_ids[:, 0].tolist()
        self.calls.append((inference_params.seqlen_offset, positions, input_ids.shape[1]))
        last = input_ids[:, -num_last_tokens:]
        logits = torch.zeros(*last.shape, VOCABULARY)
        logits.scatter_(-1, (last.unsqueeze(-1) + 1) % VOCABULARY, 5.0)
        logits.scatter_(-1, (last.unsqueeze(-1) + 2) % VOCABULARY, 3.0)
        return SimpleNamespace(logits=logits)


class Recorder:
    """A streamer that notes what it was told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.told.append(value.tolist())

    def end(self) -> None:
        self.told.append("end")


def test_greedy_decoding_and_calls() -> None:
    model, streamer = Counter(), Recorder()
    prompt = torch.tensor([[4, 0], [7, 3]])
    sequences = model.generate(prompt, 5, streamer=streamer)
    assert sequences.tolist() == [[4, 0, 1, 2, 3], [7, 3, 4, 5, 6]]
    assert model.calls == [(0, None, 2), (2, [2, 2], 1), (3, [3, 3], 1)]
    assert streamer.told == [[[4, 0], [7, 3]], [[1], [4]], [[2], [5]], [[3], [6]], "end"]
    assert not sequences.requires_grad


def test_outputs() -> None:
    prompt = torch.tensor([[0]])
    output = Counter().generate(prompt, 4, return_dict_in_generate=True, output_scores=True, enable_timing=True)
    assert isinstance(output.scores, tuple)
    assert [score.shape for score in output.scores] == [(1, VOCABULARY)] * 3
    assert [int(score.argmax()) for score in output.scores] == [1, 2, 3]
    assert output.seconds > 0
    silent = Counter().generate(prompt, 4, return_dict_in_generate=True)
    assert silent.scores is None
    assert silent.seconds is None
    assert len(decode(prompt, Counter(), 4).scores) == 3


def test_timing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mamba_ssm.utils.generation"):
        decode(torch.tensor([[0]]), Counter(), 4, enable_timing=True)
    assert "3 new tokens" in caplog.text


def test_a_row_ends_at_eos() -> None:
    # The first row meets 3 after two tokens, the second after four; both stop there although 20 are allowed.
    prompt = torch.tensor([[1], [7]])
    assert Counter().generate(prompt, 20, eos_token_id=3).tolist() == [[1, 2, 3, 3, 3], [7, 0, 1, 2, 3]]
    assert Counter().generate(prompt, 4, eos_token_id=3).tolist() == [[1, 2, 3, 3], [7, 0, 1, 2]]
    # An eos in the prompt ends nothing.
    assert Counter().generate(torch.tensor([[3]]), 3, eos_token_id=3).tolist() == [[3, 4, 5]]


def test_teacher() -> None:
    teacher = torch.tensor([[0, 6, 2], [5, 5, 5]])
    output = decode(teacher[:, :1], Counter(), 5, teacher_outputs=teacher)
    assert output.sequences.tolist() == [[0, 6, 2, 3, 4], [5, 5, 5, 6, 7]]
    assert [score[0].argmax().item() for score in output.scores] == [1, 7, 3, 4]


def test_penalty_sees_the_whole_sequence_and_leaves_the_scores() -> None:
    # 1 has occurred: its logit falls from 5 to 2.5, below the 3 of token 2.
    output = decode(torch.tensor([[1, 0]]), Counter(), 3, repetition_penalty=2.0)
    assert output.sequences.tolist() == [[1, 0, 2]]
    assert output.scores[0][0, 1] == 5.0


def test_vocab_size_hides_the_padding() -> None:
    output = decode(torch.tensor([[6]]), Counter(), 2, vocab_size=7)
    assert output.sequences.tolist() == [[6, 0]]
    assert output.scores[0].shape == (1, 7)


def test_sampling_follows_the_seed() -> None:
    prompt = torch.zeros(4, 1, dtype=torch.int64)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return Counter().generate(prompt, 12, top_k=0, temperature=3.0)

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": torch.tensor([1, 2])}, r"`input_ids` must have shape \(b, l\).*got \(2,\)"),
        ({"input_ids": torch.zeros(1, 0).long()}, "`input_ids` must have shape"),
        ({"max_length": 2}, "must exceed its 2 tokens, got 2"),
        (
            {"teacher_outputs": torch.zeros(3, 4).long()},
            r"`teacher_outputs` must have shape \(b, t\) with b = 1",
        ),
    ],
)
def test_bad_prompts(changes: dict[str, Any], message: str) -> None:
    arguments = {"input_ids": torch.tensor([[1, 2]]), "model": Counter(), "max_length": 5, **changes}
    with pytest.raises(ValueError, match=message):
        decode(**arguments)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="no_such_option"):
        Counter().generate(torch.tensor([[1]]), 3, no_such_option=1)


def test_cuda_graphs_need_cuda() -> None:
    model = Counter()
    with pytest.raises(RuntimeError, match="CUDA graphs need a CUDA device, but the model is on 'cpu'"):
        model.generate(torch.tensor([[1]]), 3, cg=True)
    with pytest.raises(RuntimeError, match="CUDA graphs"):
        generation.update_graph_cache(model, None, 1, 1, 3)
    with pytest.raises(RuntimeError, match="CUDA graphs"):
        generation.capture_graph(model, InferenceParams(3, 1), 1, 3)


def test_a_model_without_cache_says_so() -> None:
    with pytest.raises(NotImplementedError, match="Counter must define allocate_inference_cache"):
        Counter().allocate_inference_cache(1, 2)


def test_inference_params() -> None:
    states: dict[int, Tensor] = {0: torch.ones(1)}
    params = InferenceParams(10, 2, 5, 1, states, torch.tensor([4, 5]))
    params.reset(20, 3)
    assert (params.max_seqlen, params.max_batch_size, params.seqlen_offset) == (20, 3, 0)
    assert params.lengths_per_sample.tolist() == [0, 0]
    assert params.key_value_memory_dict is states
    assert InferenceParams(1, 1).key_value_memory_dict is not InferenceParams(1, 1).key_value_memory_dict


def test_import_needs_no_other_package() -> None:
    hidden = ["transformers", "huggingface_hub", "safetensors", "triton", "timm", "einops"]
    modules = ["utils.generation", "utils.hf", "models.mixer_seq_simple", "models.config_mamba"]
    modules += ["ops.triton.layer_norm", "ops.triton.layernorm", "ops.triton.selective_state_update"]
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in hidden)]
    lines += [f"import mamba_ssm.{name}" for name in modules]
    environment_path = [path for path in sys.path if path]
    lines.insert(1, f"sys.path[:0] = {environment_path!r}")
    found = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
