"""Keeps what third-party tools print, log and warn about out of the gate's own output, and ready for its errors."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

_LOCK = threading.RLock()
_STANDARD = (1, 2)
"""File descriptors of stdout and stderr, which native code writes to past Python's own streams."""

_KEPT_BYTES = 1 << 20
"""Of what native code writes, the last so much is kept."""


@dataclass
class Chatter:
    """What was printed and warned about inside `quiet()`."""

    text: io.StringIO = field(default_factory=io.StringIO)
    warned: list[warnings.WarningMessage] = field(default_factory=list)
    _file: int | None = None
    _said: str = ""

    def native(self) -> str:
        """What native code has written to file descriptors 1 and 2 by now, its end where it is long."""
        if self._file is None:
            return self._said
        _flush()
        start = max(os.fstat(self._file).st_size - _KEPT_BYTES, 0)
        return os.pread(self._file, _KEPT_BYTES, start).decode(errors="replace")

    def tail(self, lines: int = 8) -> tuple[str, ...]:
        """The last lines: warnings first, then what Python code printed, then native code."""
        said = [f"{each.category.__name__}: {each.message}" for each in self.warned]
        said += [line for line in self.text.getvalue().splitlines() if line.strip()]
        said += [line for line in self.native().splitlines() if line.strip()]
        return tuple(said[-lines:])


@contextlib.contextmanager
def quiet() -> Iterator[Chatter]:
    """Collect stdout, stderr and warnings of Python and native code, and drop log records, until the block ends.

    Handlers that the code installed on the root logger (as `logging.warning` does) are removed again. File descriptors 1
    and 2 are those of the process: what another thread or a child writes to them meanwhile is collected too.
    Exceptions pass through.
    """
    with _LOCK:
        root = logging.getLogger()
        handlers, level, disabled = root.handlers[:], root.level, root.manager.disable
        chatter = Chatter()
        logging.disable(logging.CRITICAL)
        try:
            with (
                _redirected(chatter),
                warnings.catch_warnings(record=True) as warned,
                contextlib.redirect_stdout(chatter.text),
                contextlib.redirect_stderr(chatter.text),
            ):
                warnings.simplefilter("always")
                chatter.warned = warned
                yield chatter
        finally:
            logging.disable(disabled)
            root.handlers[:] = handlers
            root.setLevel(level)


@contextlib.contextmanager
def _redirected(chatter: Chatter) -> Iterator[None]:
    """File descriptors 1 and 2 into a file of their own; one that is closed stays closed."""
    _flush()
    kept: dict[int, int] = {}
    with tempfile.TemporaryFile() as file:
        try:
            for number in _STANDARD:
                with contextlib.suppress(OSError):
                    kept[number] = os.dup(number)
            chatter._file = file.fileno()  # noqa: SLF001 - of this module
            for number in kept:
                os.dup2(file.fileno(), number)
            yield
        finally:
            try:
                chatter._said = chatter.native()  # noqa: SLF001 - of this module
            finally:
                chatter._file = None  # noqa: SLF001 - of this module
                for number, copy in kept.items():
                    os.dup2(copy, number)
                    os.close(copy)


def _flush() -> None:
    """Hand on what Python and the C library hold back, so that it goes where it was written to."""
    for stream in (sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()  # type: ignore[union-attr]
    with contextlib.suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).fflush(None)
