"""Text on a screen: its colours, its width."""

from __future__ import annotations

import os
import re
from typing import TextIO

_COLOURED = re.compile(r"\b(PASSED|FAILED|INCONCLUSIVE|NOT RUN|REFUSED|WARNING)\b")
_STYLES = {
    "PASSED": "bold green",
    "FAILED": "bold red",
    "INCONCLUSIVE": "bold yellow",
    "NOT RUN": "bold magenta",
    "REFUSED": "bold red",
    "WARNING": "bold yellow",
}


def show(text: str, stream: TextIO) -> None:
    """Print a screen: styled on a terminal unless NO_COLOR is set, and without wrapping anywhere."""
    if not is_terminal(stream) or os.environ.get("NO_COLOR"):
        stream.write(text)
        stream.flush()
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream, soft_wrap=True, highlight=False)
    shown = Text(text.rstrip("\n"))
    for match in _COLOURED.finditer(shown.plain):
        shown.stylize(_STYLES[match[1]], match.start(), match.end())
    console.print(shown, soft_wrap=True)


def terminal_width(stream: TextIO) -> int | None:
    """Columns of the terminal that a stream is; None where it is none."""
    if not is_terminal(stream):
        return None
    import shutil

    return shutil.get_terminal_size().columns


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream is a terminal that can do more than print lines."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"
