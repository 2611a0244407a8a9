"""The one place that decides which kernel runs an op.

An op family (the causal convolution, the selective scan) registers its kernels here, per backend; `Family.choose`
picks one for the device of the tensors at hand. A backend changes the speed of a call, never its result.

    cuda     CUDA tensors, compiled CUDA kernels
    triton   CUDA tensors, kernels that triton compiles when they are first called
    native   CPU tensors, compiled C++ kernels
    torch    any device, pure PyTorch; always there

Only this module reads `CAUSAL_CONV1D_FORCE_FALLBACK` and `SELECTIVE_SCAN_FORCE_FALLBACK` (TRUE, 1, YES or ON in any
case force `torch`), at the first use of an op, not at import. `python -m causal_conv1d.backend` prints what will run.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

BACKENDS = ("cuda", "triton", "native", "torch")
DEVICE_OF = {"cuda": "cuda", "triton": "cuda", "native": "cpu"}  # the only device a compiled backend runs on
TRUE_VALUES = frozenset({"TRUE", "1", "YES", "ON"})

LIMITS = {
    "cuda": "it computes in fp32, in states of at most 256 numbers",
    "triton": "it computes real numbers in fp32",
    "native": "it computes real numbers in fp32",
}

logger = logging.getLogger("causal_conv1d.backend")
Kernel = TypeVar("Kernel", bound=Callable[..., Any])

_requested: ContextVar[str | None] = ContextVar("requested_backend", default=None)
_families: dict[str, Family] = {}


class Engine(Protocol):
    """What runs the kernels of a compiled backend.

    Attributes:
        missing: why it cannot run, as a clause that a user can act on; None where it can; "" where it was not built,
            for which the package's build notes know the reason.
        detail: what a user may want to know about it, such as the instructions that it uses; "" for nothing.
    """

    @property
    def missing(self) -> str | None: ...
    @property
    def detail(self) -> str: ...


class Family:
    """The kernels of one group of ops, and the choice among them.

    Args:
        name: what users see, for example "selective_scan".
        variable: the environment variable that forces the `torch` backend.
        package: the import name of the package that owns the kernels; its build notes say why one is missing.
        folder: the package's folder in the repository, for the command that mends a missing backend.
        engines: what runs the compiled backends.
    """

    def __init__(self, name: str, variable: str, package: str, folder: str, **engines: Engine) -> None:
        self.name = name
        self.variable = variable
        self.package = package
        self.folder = folder
        self.engines = engines
        self._kernels: dict[str, dict[str, Callable[..., Any]]] = {backend: {} for backend in BACKENDS}
        self._others: dict[str, Family] = {}
        self._compositions: set[str] = set()
        self._forced: bool | None = None
        self._told: set[str] = set()
        _families[name] = self

    def kernel(self, backend: str, op: str) -> Callable[[Kernel], Kernel]:
        """Decorator: the function is the kernel of `op` on `backend`."""

        def register(function: Kernel) -> Kernel:
            self._kernels[backend][op] = function
            return function

        return register

    def join(self, other: Family, *ops: str) -> None:
        """Let each op, which does the work of `other` too, run on what both families prefer, else on `torch`."""
        self._others.update(dict.fromkeys(ops, other))

    def compose(self, *ops: str) -> None:
        """Let the `torch` kernel of each op, made of other ops, run on backends that have none of their own."""
        self._compositions.update(ops)

    def compiled_kernel(self, backend: str, op: str, function: Callable[..., Any]) -> None:
        """Make `function` the kernel of `op` on a compiled backend.

        It returns None for a call that it cannot run: an automatic choice then takes the `torch` kernel.
        """

        def run(*args: Any) -> Any:
            result = function(*args)
            return self._stand_in(backend, op)(*args) if result is None else result

        self._kernels[backend][op] = run

    def triton_kernel(self, module: str, *ops: str) -> None:
        """Make functions of this module, of the ops' names, their kernels; imported when one is called."""

        def caller(op: str) -> Callable[..., Any]:
            return lambda *args: getattr(importlib.import_module(module), op)(*args)

        for op in ops:
            self.compiled_kernel("triton", op, caller(op))

    def _stand_in(self, backend: str, op: str) -> Callable[..., Any]:
        """The `torch` kernel, for a call whose arguments the compiled one cannot take."""
        if _requested.get() is not None:
            raise RuntimeError(
                f"the {backend} backend cannot run {op} with these arguments ({LIMITS[backend]}); use the torch backend"
            )
        self._tell_once(f"{op}: the {backend} backend cannot run these arguments; the torch backend runs them")
        return self._kernel_of("torch", op)

    @property
    def forced(self) -> bool:
        """Whether the environment forces the `torch` backend; read once, at first use."""
        if self._forced is None:
            self._forced = os.environ.get(self.variable, "").strip().upper() in TRUE_VALUES
        return self._forced

    def missing(self, backend: str) -> str | None:
        """Why a backend cannot run, as a clause; None where it can."""
        if backend == "torch":
            return None
        if self.forced:
            return f"{self.variable} is set"
        engine = self.engines.get(backend)
        if engine is not None and engine.missing:
            return engine.missing
        if not self._kernels[backend] or (engine is not None and engine.missing is not None):
            return _build_notes(self.package).get(backend, "its kernels were not built")
        return None

    def preferred(self, device_type: str) -> str:
        """The backend an automatic choice takes for tensors on a device of this type."""
        for backend in BACKENDS:
            if DEVICE_OF.get(backend, device_type) == device_type and self.missing(backend) is None:
                return backend
        raise AssertionError("the torch backend is always there")

    def backend_for(self, op: str, device_type: str) -> str:
        """The backend that runs `op` on tensors of this device type.

        Raises:
            RuntimeError: `use_backend` asked for a backend that cannot run this call.
        """
        requested = _requested.get()
        if requested is not None:
            self._require(requested, op, device_type)
            return requested
        preferred = self.preferred(device_type)
        other = self._others.get(op)
        if other is not None and other.preferred(device_type) != preferred:
            return "torch"
        if op in self._kernels[preferred]:
            return preferred
        for backend in BACKENDS[BACKENDS.index(preferred) :]:
            suits = DEVICE_OF.get(backend, device_type) == device_type
            if suits and op in self._kernels[backend] and self.missing(backend) is None:
                break
        if backend == "torch" and op not in self._compositions:
            self._tell_once(f"{op}: the {preferred} backend has no kernel for it; the torch backend runs it")
        return backend

    def choose(self, op: str, device_type: str) -> Callable[..., Any]:
        """The kernel of `backend_for`. Raises RuntimeError as it does, and if there is no kernel for the op at all."""
        backend = self.backend_for(op, device_type)
        return self._kernel_of("torch" if op not in self._kernels[backend] else backend, op)

    def _kernel_of(self, backend: str, op: str) -> Callable[..., Any]:
        found = self._kernels[backend].get(op)
        if found is None:
            raise RuntimeError(f"{op} exists for other backends or dtypes only; call the public functions instead")
        return found

    def implement(self, library: torch.library.Library, *ops: str) -> None:
        """Make each op of a library call the kernel that `choose` finds for the device of its first argument."""

        def caller(op: str) -> Callable[..., Any]:
            return lambda first, *rest: self.choose(op, first.device.type)(first, *rest)

        for op in ops:
            library.impl(op, caller(op), "CompositeExplicitAutograd")

    def require(self, backend: str) -> None:
        """Raise RuntimeError, with the reason and the mend, if a backend is not there."""
        reason = self.missing(backend)
        if reason is not None:
            mend = (
                f"unset {self.variable}"
                if self.forced
                else f"install ./{self.folder} again with what is missing in place, or use the torch backend"
            )
            raise RuntimeError(f"the {backend} backend of {self.name} cannot run: {reason}; {mend}")

    def _require(self, backend: str, op: str, device_type: str) -> None:
        for family in filter(None, (self, self._others.get(op))):
            family.require(backend)
        device = DEVICE_OF.get(backend, device_type)
        if device != device_type:
            raise RuntimeError(
                f"the {backend} backend runs {device} tensors and {op} got {device_type} tensors; "
                f"move them with .to({device!r}) or use the torch backend"
            )
        if op not in self._kernels[backend] and op not in self._compositions:
            raise RuntimeError(f"the {backend} backend has no kernel for {op}; use the torch backend")

    def _tell_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            logger.info(message)


def require_one_device(**tensors: Any) -> None:
    """Raise RuntimeError, naming two arguments, if these tensors (None: not given) are not all on one device.

    An op would take any of them on "meta" for a question about shapes, and answer with memory that nobody filled.
    """
    given = [(name, value.device) for name, value in tensors.items() if value is not None]
    for name, device in given[1:]:
        if device != given[0][1]:
            raise RuntimeError(
                f"all tensors must be on one device, and `{given[0][0]}` is on {given[0][1]} while `{name}` is on "
                f"{device}; move them with .to(...)"
            )


def differentiates_forward() -> bool:
    """Whether tensors may carry tangents here, which an op would drop."""
    return forward_ad._current_level >= 0


def refuse_forward_mode(function: str, *tensors: Tensor | None) -> None:
    """Raise NotImplementedError if one of these carries a tangent: an op would drop it, and answer with zeros."""
    if not differentiates_forward():
        return
    if any(value is not None and forward_ad.unpack_dual(value).tangent is not None for value in tensors):
        definition = function.removesuffix("_fn") + "_ref"
        raise NotImplementedError(f"{function} has no forward-mode derivative; differentiate {definition} instead")


def no_second_derivative(function: str) -> Callable[..., Any]:
    """The backward of an op that is itself a backward: refuses, where PyTorch would go on with zeros."""

    def refuse(ctx: Any, *gradients: Any) -> Any:
        definition = function.removesuffix("_fn") + "_ref"
        raise NotImplementedError(f"{function} has no second derivative; differentiate {definition} twice instead")

    return refuse


@cache
def _build_notes(package: str) -> dict[str, str]:
    """What the package's set-up left out, and why: {backend: reason}. Empty when it was not built by its set-up."""
    try:
        return importlib.import_module(f"{package}._build").REASONS
    except ModuleNotFoundError:
        return {}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for every op called inside, gradients included if `backward()` is called inside too.

    Args:
        name: "cuda", "triton", "native" or "torch".

    Raises:
        ValueError: an unknown name.
        RuntimeError: the backend is not there, or a call inside cannot run on it; says why and what to do.
    """
    if name not in BACKENDS:
        raise ValueError(f"`name` must be one of {', '.join(BACKENDS)}, got {name!r}")
    for family in _families.values():
        family.require(name)
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def families() -> list[Family]:
    """Every op family imported so far."""
    return list(_families.values())


def available_backends() -> dict[str, dict[str, str | None]]:
    """{family: {backend: None where it can run, else why not}} for every op family imported so far."""
    return {name: {backend: family.missing(backend) for backend in BACKENDS} for name, family in _families.items()}


def report() -> str:
    """What runs on CPU and on CUDA tensors, and why, as the lines a person reads."""
    lines = []
    for name, family in _families.items():
        lines.append(
            f"{name}: CPU tensors run on '{family.preferred('cpu')}', CUDA tensors on '{family.preferred('cuda')}'"
        )
        for backend in BACKENDS:
            reason = family.missing(backend)
            engine = family.engines.get(backend)
            how = f" ({engine.detail})" if engine is not None and engine.detail else ""
            lines.append(f"  {backend:<7}{f'available{how}' if reason is None else 'not available: ' + reason}")
    return "\n".join(lines)
