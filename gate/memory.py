"""The host memory that a piece of work adds at its peak, as the operating system counts it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


class HostPeak:
    """What `host_peak` gives: `mib` is set when the block ends.

    Args:
        mib: Peak resident memory above what the process held at the start, MiB; None where the system does not tell.
    """

    def __init__(self) -> None:
        self.mib: float | None = None


@contextmanager
def host_peak() -> Iterator[HostPeak]:
    """Measure the peak of resident host memory over a block.

    Source: proc(5): writing 5 to clear_refs resets VmHWM, the peak resident set size.
    """
    peak = HostPeak()
    before = _status_mib("VmRSS") if _reset() else None
    try:
        yield peak
    finally:
        after = _status_mib("VmHWM")
        if before is not None and after is not None:
            peak.mib = max(0.0, after - before)


def _reset() -> bool:
    try:
        _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        return False
    return True


def _status_mib(key: str) -> float | None:
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) / 1024
    return None
