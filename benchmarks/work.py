"""A call to be timed, made of what a subject computes and of the dtype and the mode of a case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.cases import Case

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


class Recipe(NamedTuple):
    """What a subject computes, in fp32.

    Attributes:
        function: takes the arguments and returns one tensor.
        arguments: all of its tensors but the parameters of `module`.
        module: holds the parameters that `function` uses; None if there are none.
        only_parameters: whether a backward pass leaves the arguments out, as of a network that reads pictures.
    """

    function: Callable[..., Any]
    arguments: tuple[Tensor, ...]
    module: nn.Module | None = None
    only_parameters: bool = False


@dataclass(frozen=True)
class Work:
    """One call and what it leaves behind.

    Attributes:
        call: what is timed.
        leaves: the tensors whose gradients it computes, parameters by their names; none without a backward pass.
    """

    call: Callable[[], Tensor]
    leaves: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, recipe: Recipe, case: Case) -> Work:
        """The work of a case, in its dtype and mode. Compiling happens at the first call."""
        function, dtype = recipe.function, DTYPES[case.dtype]
        if recipe.module is not None:
            recipe.module.to(dtype)
        arguments = tuple(value.to(dtype) for value in recipe.arguments)
        if case.mode == "train":
            leaves = _leaves(recipe, arguments)
            return cls(partial(_forward_and_backward, function, arguments, leaves), leaves)
        if case.mode == "step":
            leaves = _leaves(recipe, arguments)
            optimizer = torch.optim.AdamW(leaves, lr=0.0)
            return cls(partial(_step, optimizer, function, arguments, leaves), leaves)
        if case.mode == "compiled":
            torch.compiler.reset()  # what earlier comparisons compiled counts towards the limit of recompilations
            function = torch.compile(function, fullgraph=True)
        return cls(partial(function, *arguments))

    def result(self) -> list[Tensor]:
        """Call once; the output and every gradient."""
        out = self.call()
        return [out.detach(), *(leaf.grad for leaf in self.leaves if leaf.grad is not None)]


def _leaves(recipe: Recipe, arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
    named = dict(recipe.module.named_parameters()) if recipe.module is not None else {}
    if not recipe.only_parameters:
        for value in arguments:
            value.requires_grad_()
    return (*(() if recipe.only_parameters else arguments), *(named[name] for name in sorted(named)))


def _forward_and_backward(
    function: Callable[..., Tensor], arguments: Sequence[Tensor], leaves: Sequence[Tensor]
) -> Tensor:
    for leaf in leaves:
        leaf.grad = None
    out = function(*arguments)
    out.sum().backward()
    return out


def _step(
    optimizer: torch.optim.Optimizer,
    function: Callable[..., Tensor],
    arguments: Sequence[Tensor],
    leaves: Sequence[Tensor],
) -> Tensor:
    out = _forward_and_backward(function, arguments, leaves)
    optimizer.step()
    return out
