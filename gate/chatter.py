"""Keeps what third-party tools print, log and warn about out of the gate's own output, and ready for its errors."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

_LOCK = threading.RLock()


@dataclass
class Chatter:
    """What was printed and warned about inside `quiet()`."""

    text: io.StringIO = field(default_factory=io.StringIO)
    warned: list[warnings.WarningMessage] = field(default_factory=list)

    def tail(self, lines: int = 8) -> tuple[str, ...]:
        """The last lines, warnings first."""
        said = [f"{each.category.__name__}: {each.message}" for each in self.warned]
        said += [line for line in self.text.getvalue().splitlines() if line.strip()]
        return tuple(said[-lines:])


@contextlib.contextmanager
def quiet() -> Iterator[Chatter]:
    """Collect stdout, stderr and warnings of Python code, and drop its log records, until the block ends.

    Handlers that the code installed on the root logger (as `logging.warning` does) are removed again.
    Exceptions pass through.
    """
    with _LOCK:
        root = logging.getLogger()
        handlers, level, disabled = root.handlers[:], root.level, root.manager.disable
        chatter = Chatter()
        logging.disable(logging.CRITICAL)
        try:
            with (
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
