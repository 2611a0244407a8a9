"""How far an evaluation is: pictures done, pictures per second, time left."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A bar on a terminal; elsewhere (a log file, a pipe) a line now and then, and one at the end.

    Args:
        label: what is going on, at the start of the line.
        total: number of pictures, None if it is not known.
        stream: where to write, standard error by default.
    """

    def __init__(self, label: str, total: int | None, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._label, self._total, self._done = label, total, 0
        self._start = self._last_line = time.monotonic()
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(desc=label, total=total, unit="img", file=self._stream, dynamic_ncols=True)

    def advance(self, pictures: int) -> None:
        """Count `pictures` more as done."""
        self._done += pictures
        if self._bar is not None:
            self._bar.update(pictures)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._write_line()

    def close(self) -> None:
        """Write the last line, with the rate over the whole run."""
        if self._bar is not None:
            self._bar.close()
        else:
            self._write_line()

    def _write_line(self) -> None:
        self._last_line = time.monotonic()
        elapsed = max(self._last_line - self._start, 1e-9)
        rate = self._done / elapsed
        text = f"{self._label}: {self._done}"
        if self._total is not None:
            text += f"/{self._total}"
        text += f" images, {rate:.1f} images/s, {format_seconds(elapsed)} elapsed"
        if self._total is not None and rate > 0:
            text += f", {format_seconds((self._total - self._done) / rate)} left"
        print(text, file=self._stream, flush=True)


def format_seconds(seconds: float) -> str:
    """Return a time in seconds as h:mm:ss, rounded to full seconds.

    >>> format_seconds(3671.4)
    '1:01:11'
    """
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
