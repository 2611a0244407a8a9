"""Choose the next token from logits: filters, repetition penalty, sampling.

The filters change the logits in place, (..., v) over the vocabulary v: what may not be drawn becomes -inf.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "modify_logit_for_repetition_penalty",
    "modify_logits_for_min_p_filtering",
    "modify_logits_for_top_k_filtering",
    "modify_logits_for_top_p_filtering",
    "sample",
]


def modify_logits_for_min_p_filtering(logits: Tensor, min_p: float) -> None:
    """Keep the tokens that are at least `min_p` times as probable as the likeliest one.

    `min_p` from 0 (keep all) to 1 (keep only the likeliest). Source: arXiv 2407.01082.
    """
    _check_fraction("min_p", min_p)
    if min_p > 0.0:
        threshold = logits.amax(dim=-1, keepdim=True) + math.log(min_p)
        logits.masked_fill_(logits < threshold, -math.inf)


def modify_logits_for_top_k_filtering(logits: Tensor, top_k: int) -> None:
    """Keep the `top_k` largest logits and what equals the smallest of them; 0 keeps all."""
    if top_k < 0:
        raise ValueError(f"`top_k` must be at least 0, got {top_k}.")
    if 0 < top_k < logits.shape[-1]:
        smallest_kept = torch.topk(logits, top_k, dim=-1).values[..., -1:]
        logits.masked_fill_(logits < smallest_kept, -math.inf)


def modify_logits_for_top_p_filtering(logits: Tensor, top_p: float) -> None:
    """Keep the fewest likeliest tokens whose probabilities add up to at least `top_p`; 0 and 1 keep all.

    Source: arXiv 1904.09751.
    """
    _check_fraction("top_p", top_p)
    if top_p in (0.0, 1.0):
        return
    ordered, order = torch.sort(logits, dim=-1, descending=True)
    probabilities = torch.softmax(ordered, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    mass_before = probabilities.cumsum(dim=-1) - probabilities
    dropped = mass_before >= top_p
    dropped[..., 0] = False  # the likeliest stays, however rounding treats a tiny top_p
    logits.masked_fill_(torch.zeros_like(dropped).scatter_(-1, order, dropped), -math.inf)


def modify_logit_for_repetition_penalty(
    logits: Tensor, prev_output_tokens: Tensor, repetition_penalty: float = 1.0
) -> Tensor:
    """Make tokens that occurred less likely, in place, and return the logits.

    Args:
        logits: (b, v).
        prev_output_tokens: (b, l) int64. How often a token occurred does not matter.
        repetition_penalty: positive logits are divided by it, negative ones multiplied; 1 changes nothing.

    Source: arXiv 1909.05858, section 4.1.
    """
    if repetition_penalty <= 0.0:
        raise ValueError(f"`repetition_penalty` must be above 0, got {repetition_penalty}.")
    if repetition_penalty == 1.0:
        return logits
    seen = torch.gather(logits, 1, prev_output_tokens)
    penalised = torch.where(seen < 0, seen * repetition_penalty, seen / repetition_penalty)
    return logits.scatter_(1, prev_output_tokens, penalised)


def sample(logits: Tensor, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """Draw one token per row from softmax(filtered logits / temperature), with torch's global generator.

    Args:
        logits: (b, v), left unchanged.
        top_k: 1 takes the likeliest token and ignores the rest; 0 does not limit the number of tokens.
        min_p, top_p, top_k: see the filters; they act in the order top-k, min-p, temperature, top-p.
        temperature: above 0.

    Returns:
        (b,) int64.

    Raises:
        ValueError: a number is out of its range.
    """
    if top_k == 1:
        return logits.argmax(dim=-1)
    if temperature <= 0.0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}; `top_k=1` takes the likeliest token.")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    modify_logits_for_top_k_filtering(logits, top_k)
    modify_logits_for_min_p_filtering(logits, min_p)
    logits /= temperature
    modify_logits_for_top_p_filtering(logits, top_p)
    return torch.multinomial(torch.softmax(logits, dim=-1), num_samples=1).squeeze(-1)


def _check_fraction(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"`{name}` must be between 0 and 1, got {value}.")
