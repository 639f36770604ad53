"""The memory that a piece of work adds at its peak: the host's as the system counts it, a GPU's as its driver does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
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
    before = resident_mib() if reset_host_peak() else None
    try:
        yield peak
    finally:
        after = peak_resident_mib()
        if before is not None and after is not None:
            peak.mib = max(0.0, after - before)


class DevicePeak:
    """What `device_peak` gives.

    Args:
        used: Bytes of device memory in use, on the whole GPU; None where that cannot be told.
        every_s: Seconds between two looks.
    """

    def __init__(self, used: Callable[[], int | None], every_s: float) -> None:
        self._used = used
        self._every_s = every_s
        self._before = used()
        self._most = self._before
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="device-memory", daemon=True)
        if self._before is not None:
            self._thread.start()

    @property
    def mib(self) -> float | None:
        """The most that was in use above the start, MiB; None where it could not be told.

        It counts what other processes of the GPU do too: measure on one that is yours alone.
        """
        if self._before is None or self._most is None:
            return None
        return max(0, self._most - self._before) / 2**20

    def stop(self) -> None:
        """Look no more: before latency is measured, which the watching would disturb. Harmless twice."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self) -> None:
        """Look once, now."""
        now = self._used() if self._before is not None else None
        if now is not None:
            self._most = max(self._most or 0, now)

    def _watch(self) -> None:
        while not self._end.wait(self._every_s):
            self.look()


@contextmanager
def device_peak(used: Callable[[], int | None], *, every_s: float = 0.01) -> Iterator[DevicePeak]:
    """Watch the device memory in use over a block, or until `stop`.

    Args:
        used: Bytes in use on the whole GPU; None where that cannot be told.
        every_s: Seconds between two looks; a peak that is shorter may be missed.
    """
    peak = DevicePeak(used, every_s)
    try:
        yield peak
    finally:
        peak.stop()


def resident_mib() -> float | None:
    """Resident memory of this process now, MiB; None where the system does not tell."""
    return _status_mib("VmRSS")


def peak_resident_mib() -> float | None:
    """The most resident memory of this process since its start or the last reset, MiB; None as in `resident_mib`."""
    return _status_mib("VmHWM")


def reset_host_peak() -> bool:
    """Let the peak of resident memory begin anew at what is resident now.

    Returns:
        Whether the system did so.

    Source: proc(5), clear_refs.
    """
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
