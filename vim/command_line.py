"""What the scripts' command lines share; imports nothing slow, so that `-h` answers at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

DEFAULT_MODEL = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
LARGEST = 1_000_000  # far above what any of the numbers on a command line can sensibly be


class UsageError(ValueError):
    """A command line that cannot be carried out; its text is one sentence for the person who typed it."""


def positive(text: str) -> int:
    """Read a whole number from 1 to `LARGEST`."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= LARGEST:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {LARGEST}, got {text!r}")
    return value


def thread_count(text: str) -> int:
    """Read a number of threads; far more than there are CPUs would end the process without a word."""
    value, most = positive(text), max(256, os.cpu_count() or 1)
    if value > most:
        raise argparse.ArgumentTypeError(f"must be at most {most}, got {text}")
    return value


def pip_install(packages: str) -> str:
    """Return the command that installs packages where this Python finds them."""
    return f"`{sys.executable} -m pip install {packages}`"


class _PictureSize(argparse.Action):
    """Store one number as it is and two as (height, width)."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        numbers = list(values) if isinstance(values, list) else []
        if len(numbers) not in (1, 2):
            raise argparse.ArgumentError(self, "takes one number (a square) or two (height and width)")
        setattr(namespace, self.dest, numbers[0] if len(numbers) == 1 else tuple(numbers))


def add_size_flag(group: Any) -> None:
    """Add the flag that says how large the model's input is."""
    group.add_argument(
        "--img-size", type=positive, nargs="+", action=_PictureSize, metavar="PIXELS",
        help="side of the model's square input, or height and width (default: the model's own)")  # fmt: skip


def add_kernel_flags(group: Any) -> None:
    """Add the flags that say on what the ops run."""
    add = group.add_argument
    add("--threads", type=thread_count, metavar="N", help="CPU threads (default: torch's choice)")
    add("--backend", choices=("auto", "cuda", "triton", "native", "torch"), default="auto",
        help="kernels of the scan and the convolution (default: the best that is there)")  # fmt: skip


def add_run_flags(parser: argparse.ArgumentParser) -> Any:
    """Add the flags that say how a model runs (size of its input, batch, device, dtype, threads, backend) as a group.

    Returns the group.
    """
    group = parser.add_argument_group("how it runs")
    add_size_flag(group)
    add = group.add_argument
    add("--batch-size", type=positive, default=1, metavar="N", help="pictures per forward pass (default: 1)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: cpu)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of weights and activations; bfloat16 halves their memory, and is faster on CPUs with instructions for it "
        "(default: float32)")  # fmt: skip
    add_kernel_flags(group)
    return group


def note(text: str) -> None:
    """Print a line on standard error."""
    print(text, file=sys.stderr, flush=True)


Errors = tuple[type[Exception], ...]


def run_script(
    parser: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace], int],
    arguments: Sequence[str] | None,
    environment: Callable[[argparse.Namespace], Errors] | None = None,
) -> int:
    """Read the command line, do the work, return the exit code: 2, after one sentence, if that fails.

    `environment` imports what the work needs, or says with a UsageError what is missing, and returns the errors whose
    text is such a sentence; without it, the environment is that of the models in PyTorch.
    """
    for stream in (sys.stdout, sys.stderr):  # file names and labels may have characters that a terminal lacks
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    args = parser.parse_args(arguments)
    try:
        code = _guarded(work, args, environment or torch_environment)
        if sys.stdout is not None:  # it is when the shell closed it with >&-
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        note("error: stopped before the end.")
        return 130
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # then the reader, such as `head`, has seen enough
            note(f"error: {error.strerror or error}.")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python flushes it again at its end
        return 1


def _guarded(
    work: Callable[[argparse.Namespace], int],
    args: argparse.Namespace,
    environment: Callable[[argparse.Namespace], Errors],
) -> int:
    expected: Errors = (UsageError,)
    try:
        expected += environment(args)
        return work(args)
    except expected as error:
        note(f"error: {str(error).rstrip('.')}.")
        return 2


def torch_environment(args: argparse.Namespace) -> Errors:
    """Import what models in PyTorch need; an `environment` of `run_script`."""
    try:
        import classify  # noqa: F401  (with it everything that the environment must have)
        from checkpoint import CheckpointError
        from labels import LabelError
        from pictures import PictureError
    except ImportError as error:
        raise UsageError(
            f"{error}; run `python3 setup_cpu_env.py` once, then this with the Python of its .venv."
        ) from error
    return CheckpointError, LabelError, PictureError
