"""Name what is in pictures with a classifier, whatever runs it; needs Pillow and numpy."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image

from pictures import PictureError, open_picture

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Prediction:
    """One class with its probability (0 to 1)."""

    index: int
    label: str
    probability: float


@dataclass(frozen=True)
class Result:
    """What became of one picture: its predictions, likeliest first, or the error that prevented them."""

    source: str
    picture: Image.Image | None = None
    predictions: tuple[Prediction, ...] = ()
    error: str | None = None


class PictureClassifier(Protocol):
    """What goes from pictures to probabilities, and knows the names of its classes."""

    @property
    def names(self) -> list[str]:
        """Names by class number."""

    def probabilities(self, pictures: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Return (b, classes) fp32 for b RGB pictures of any size."""


def classify(
    classifier: PictureClassifier, sources: Sequence[str], *, top: int = 5, batch_size: int = 1
) -> Iterator[Result]:
    """Yield a result for every source, in order, as batches are done; a bad picture does not stop the others.

    Args:
        sources: paths or addresses; "-" is standard input.
        top: number of predictions, at most the number of classes.
        batch_size: pictures per forward pass.
    """
    for start in range(0, len(sources), batch_size):
        opened = [_open(source) for source in sources[start : start + batch_size]]
        pictures = [result.picture for result in opened if result.picture is not None]
        rows = iter(classifier.probabilities(pictures) if pictures else ())
        for result in opened:
            yield result if result.picture is None else _name(classifier.names, result, next(rows), top)


def _open(source: str) -> Result:
    try:
        if source == "-" and (sys.stdin is None or sys.stdin.isatty()):
            raise PictureError("Nothing was piped into standard input; for example: cat cat.jpg | ... --image -.")
        return Result(source, open_picture(sys.stdin.buffer if source == "-" else source))
    except PictureError as error:
        return Result(source, error=str(error))


def _name(names: Sequence[str], opened: Result, probabilities: NDArray[np.float32], top: int) -> Result:
    if not np.isfinite(probabilities).all():
        message = f"The model's scores for {opened.source!r} are not finite numbers; the weights may be damaged."
        return Result(opened.source, error=message)
    best = np.argsort(-probabilities, kind="stable")[:top].tolist()
    predictions = tuple(Prediction(index, names[index], float(probabilities[index])) for index in best)
    return Result(opened.source, opened.picture, predictions)
