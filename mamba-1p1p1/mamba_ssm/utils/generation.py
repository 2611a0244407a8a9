"""Generate tokens one after the other with a model that keeps its state between calls.

Glossary: b batch, l length, v vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mamba_ssm.utils.sampling import (
    modify_logit_for_repetition_penalty,
    modify_logits_for_min_p_filtering,
    modify_logits_for_top_k_filtering,
    modify_logits_for_top_p_filtering,
    sample,
)

__all__ = [
    "DecoderOnlyOutput",
    "DecodingCGCache",
    "GenerationMixin",
    "InferenceParams",
    "capture_graph",
    "decode",
    "modify_logit_for_repetition_penalty",
    "modify_logits_for_min_p_filtering",
    "modify_logits_for_top_k_filtering",
    "modify_logits_for_top_p_filtering",
    "sample",
    "update_graph_cache",
]

logger = logging.getLogger(__name__)


@dataclass
class InferenceParams:
    """What the layers share while a sequence grows.

    max_seqlen, max_batch_size: how much there is room for. seqlen_offset: tokens already seen.
    batch_size_offset: first row in use. key_value_memory_dict: each layer's states, by its `layer_idx`.
    lengths_per_sample: (b,) int32 tokens already seen per row, or None.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[Any, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Start a new sequence; the states stay allocated and are overwritten by its first tokens."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


class Streamer(Protocol):
    """Receives tokens while they are made; transformers' streamers fit."""

    def put(self, value: Tensor) -> None:
        """Take the prompt, (b, l), and then each token, (b, 1), as int64 on the CPU."""

    def end(self) -> None:
        """Learn that there are no more tokens."""


@dataclass
class DecoderOnlyOutput:
    """What was generated.

    sequences: (b, l) int64, the prompt included. scores: for each new token the logits it came from, (b, v),
    before penalty, filters and temperature; or None. seconds: duration, if it was asked for.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None
    seconds: float | None = None


@torch.no_grad()
def decode(
    input_ids: Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
    enable_timing: bool = False,
    streamer: Streamer | None = None,
    *,
    output_scores: bool = True,
) -> DecoderOnlyOutput:
    """Extend the prompts token by token.

    Args:
        input_ids: (b, l) int64, the prompts, without padding.
        model: called with input_ids, position_ids=, inference_params=, num_last_tokens=1; gives `.logits`.
        max_length: tokens of a result, the prompt included; more than l.
        top_k, top_p, min_p, temperature: see `sample`. repetition_penalty: see the function of that name.
        eos_token_id: ends a row, which is filled up with it; when all rows have ended, so does the decoding.
        teacher_outputs: (b, t) int64, whole sequences, taken instead of what is sampled as far as they reach.
        vocab_size: ignore logits from this index on, the padding of a vocabulary.
        cg: replay CUDA graphs, kept in the model; faster, and only on a CUDA device.
        enable_timing: measure the duration, log it, and return it as `seconds`.
        streamer: told each token.
        output_scores: keep the logits.

    Raises:
        ValueError: a shape or number above does not hold.
        RuntimeError: `cg` without a CUDA device.
    """
    _check_prompt(input_ids, max_length, teacher_outputs)
    params = _fresh_states(model, input_ids, max_length, cg)
    started = _now(input_ids.device) if enable_timing else 0.0
    if streamer is not None:
        streamer.put(input_ids.cpu())

    sequences, token, scores = input_ids, input_ids, []
    ended = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    while sequences.shape[1] < max_length and not (eos_token_id is not None and bool(ended.all())):
        logits = _next_logits(model, token, params, cg)[..., :vocab_size]
        params.seqlen_offset += token.shape[1]
        if output_scores:
            scores.append(logits)
        if teacher_outputs is not None and sequences.shape[1] < teacher_outputs.shape[1]:
            chosen = teacher_outputs[:, sequences.shape[1]]
        else:
            penalised = logits
            if repetition_penalty != 1.0:
                penalised = modify_logit_for_repetition_penalty(logits.clone(), sequences, repetition_penalty)
            chosen = sample(penalised, top_k, top_p, min_p, temperature)
            if eos_token_id is not None:
                chosen = torch.where(ended, eos_token_id, chosen)
        if eos_token_id is not None:
            ended = chosen == eos_token_id
        token = chosen.unsqueeze(1)
        sequences = torch.cat([sequences, token], dim=1)
        if streamer is not None:
            streamer.put(token.cpu())

    if streamer is not None:
        streamer.end()
    output = DecoderOnlyOutput(sequences, tuple(scores) if output_scores else None)
    if enable_timing:
        output.seconds = _now(input_ids.device) - started
        logger.info("Prompt and %d new tokens: %.3f s", sequences.shape[1] - input_ids.shape[1], output.seconds)
    return output


class GenerationMixin:
    """Gives `generate` to a model that `decode` can call."""

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[Any, Any]:
        """Return zero states for each layer, by `layer_idx`; the model defines it."""
        raise NotImplementedError(f"{type(self).__name__} must define allocate_inference_cache to use CUDA graphs.")

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> Tensor | DecoderOnlyOutput:
        """Extend prompts, (b, l) int64, to `max_length` tokens; arguments and errors as in `decode`.

        Returns:
            The sequences, or with `return_dict_in_generate` an output whose `scores` need `output_scores`.
        """
        output = decode(
            input_ids,
            self,
            max_length,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            temperature=temperature,
            output_scores=output_scores and return_dict_in_generate,
            **kwargs,
        )
        return output if return_dict_in_generate else output.sequences


@dataclass
class DecodingCGCache:
    """CUDA graphs of one-token steps, and the states that they were captured with.

    callables: by (batch size, tokens per step). run: replays the one that fits; see `update_graph_cache`.
    """

    max_batch_size: int = 0
    max_seqlen: int = 0
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    callables: dict[tuple[int, int], Callable[[Tensor, Tensor, int], Tensor]] = field(default_factory=dict)
    mempool: Any = None
    inference_params: InferenceParams = field(default_factory=lambda: InferenceParams(0, 0))
    run: Callable[[Tensor, Tensor, int], Tensor] | None = None


@torch.no_grad()
def update_graph_cache(
    model: Any,
    cache: DecodingCGCache | None,
    batch_size: int,
    seqlen_og: int,
    max_seqlen: int,
    decoding_seqlens: Sequence[int] = (1,),
    dtype: torch.dtype | None = None,
    n_warmups: int = 2,
) -> DecodingCGCache:
    """Return a cache whose `run(input_ids, position_ids, seqlen)` replays the step for this batch size.

    Args:
        cache: an earlier cache, which is reused if it fits, or None.
        seqlen_og: tokens of the prompt; not used by recurrent models, whose states do not grow.
        max_seqlen: tokens of the longest sequence.
        decoding_seqlens: the tokens per step to capture graphs for.
        dtype: of the states; the model's by default.
        n_warmups: calls before a capture.

    Raises:
        RuntimeError: the model is not on a CUDA device.
    """
    parameter = next(iter(model.parameters()))
    _require_cuda(parameter.device)
    dtype = parameter.dtype if dtype is None else dtype
    wanted = (parameter.device, dtype, batch_size)
    if (
        cache is None
        # The states have exactly one row per sequence, so a graph fits one batch size.
        or (cache.device, cache.dtype, cache.max_batch_size) != wanted
        or cache.max_seqlen < max_seqlen
    ):
        states = model.allocate_inference_cache(batch_size, max_seqlen, dtype)
        lengths = torch.zeros(batch_size, dtype=torch.int32, device=parameter.device)
        cache = DecodingCGCache(
            max_batch_size=batch_size,
            max_seqlen=max_seqlen,
            device=parameter.device,
            dtype=dtype,
            mempool=torch.cuda.graphs.graph_pool_handle(),
            inference_params=InferenceParams(
                max_seqlen, batch_size, key_value_memory_dict=states, lengths_per_sample=lengths
            ),
        )
    callables = cache.callables
    for tokens in decoding_seqlens:
        if (batch_size, tokens) not in callables:
            callables[batch_size, tokens] = capture_graph(
                model, cache.inference_params, batch_size, max_seqlen, tokens, cache.mempool, n_warmups
            )

    def run(input_ids: Tensor, position_ids: Tensor, seqlen: int) -> Tensor:
        return callables[input_ids.shape[0], input_ids.shape[1]](input_ids, position_ids, seqlen)

    cache.run = run
    return cache


@torch.no_grad()
def capture_graph(
    model: Any,
    inference_params: InferenceParams,
    batch_size: int,
    max_seqlen: int,
    decoding_seqlen: int = 1,
    mempool: Any = None,
    n_warmups: int = 2,
) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Capture one decoding step as a CUDA graph.

    Returns:
        A function of input_ids and position_ids, both (b, decoding_seqlen) int64, and the number of tokens
        already seen, that replays the step and returns a copy of its logits.

    Raises:
        RuntimeError: the model is not on a CUDA device.

    The captured step overwrites the states in `inference_params`; process a prompt afterwards.
    """
    device = next(iter(model.parameters())).device
    _require_cuda(device)
    input_ids = torch.zeros(batch_size, decoding_seqlen, dtype=torch.int64, device=device)
    position_ids = torch.zeros_like(input_ids)
    offset_before = inference_params.seqlen_offset
    # Any offset above 0 makes the layers take their one-step path.
    inference_params.seqlen_offset = max(max_seqlen - decoding_seqlen, 1)
    lengths = inference_params.lengths_per_sample

    def step() -> Tensor:
        output = model(
            input_ids,
            position_ids=position_ids,
            inference_params=inference_params,
            num_last_tokens=decoding_seqlen,
        )
        return output.logits

    with torch.cuda.device(device):
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(n_warmups):
                step()
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=mempool):
            logits = step()
    inference_params.seqlen_offset = offset_before

    def replay(new_input_ids: Tensor, new_position_ids: Tensor, seqlen: int) -> Tensor:
        input_ids.copy_(new_input_ids)
        position_ids.copy_(new_position_ids)
        if lengths is not None:
            lengths.fill_(seqlen)
        graph.replay()
        return logits.clone()

    return replay


def _fresh_states(model: Any, input_ids: Tensor, max_length: int, cg: bool) -> InferenceParams:
    """Return the parameters for new sequences; with `cg` those of the graphs, which are captured if need be."""
    batch_size, prompt_length = input_ids.shape
    if not cg:
        return InferenceParams(max_length, batch_size)
    cache = getattr(model, "_decoding_cache", None)
    model._decoding_cache = update_graph_cache(model, cache, batch_size, prompt_length, max_length)
    params = model._decoding_cache.inference_params
    params.reset(max_length, batch_size)
    return params


def _next_logits(model: Any, token: Tensor, params: InferenceParams, cg: bool) -> Tensor:
    """Return the logits, (b, v), after `token`: the whole prompt at first, then one token, (b, 1)."""
    if params.seqlen_offset == 0:
        output = model(token, position_ids=None, inference_params=params, num_last_tokens=1)
        return output.logits.squeeze(1)
    position_ids = torch.full_like(token, params.seqlen_offset)
    if cg:
        return model._decoding_cache.run(token, position_ids, params.seqlen_offset).squeeze(1)
    output = model(token, position_ids=position_ids, inference_params=params, num_last_tokens=1)
    return output.logits.squeeze(1)


def _check_prompt(input_ids: Tensor, max_length: int, teacher_outputs: Tensor | None) -> None:
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"`input_ids` must have shape (b, l) with l of 1 or more, got {tuple(input_ids.shape)}.")
    batch_size, length = input_ids.shape
    if max_length <= length:
        raise ValueError(f"`max_length` counts the prompt and must exceed its {length} tokens, got {max_length}.")
    if teacher_outputs is not None and (teacher_outputs.dim() != 2 or teacher_outputs.shape[0] != batch_size):
        raise ValueError(
            f"`teacher_outputs` must have shape (b, t) with b = {batch_size}, got {tuple(teacher_outputs.shape)}."
        )


def _require_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise RuntimeError(
            f"CUDA graphs need a CUDA device, but the model is on {str(device)!r}; leave `cg` out, or move the model."
        )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
