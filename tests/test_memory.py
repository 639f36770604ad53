"""Peak host memory."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest

from gate.memory import device_peak, host_peak, peak_resident_mib, reset_host_peak, resident_mib

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")


def test_the_peak_holds_what_a_block_allocates_and_frees() -> None:
    with host_peak() as peak:
        values = np.ones(64 * 2**20, dtype=np.uint8)
        del values
    assert peak.mib is not None
    assert 60 <= peak.mib <= 100


def test_an_earlier_peak_is_not_counted() -> None:
    values = np.ones(128 * 2**20, dtype=np.uint8)
    del values
    with host_peak() as peak:
        pass
    assert peak.mib is not None
    assert peak.mib < 32


def test_device_peak_is_the_most_above_the_start():
    readings = iter([100 << 20, 400 << 20, 250 << 20])
    last = [0]

    def used():
        last[0] = next(readings, last[0])
        return last[0]

    with device_peak(used, every_s=60.0) as peak:
        peak.look()
        peak.look()
        peak.stop()
        peak.stop()
    assert peak.mib == 300.0


def test_device_peak_is_watched_in_the_background():
    readings = [100 << 20]
    seen = threading.Event()

    def used():
        if readings[0] != 100 << 20:
            seen.set()
        return readings[0]

    with device_peak(used, every_s=0.001) as peak:
        readings[0] = 228 << 20
        assert seen.wait(10)
        readings[0] = 100 << 20
    assert peak.mib == 128.0


def test_device_peak_is_unknown_where_the_driver_does_not_tell():
    with device_peak(lambda: None) as peak:
        peak.look()
    assert peak.mib is None


def test_device_peak_below_the_start_is_zero():
    readings = iter([100, 50, 50])
    with device_peak(lambda: next(readings, 50), every_s=60.0) as peak:
        peak.look()
    assert peak.mib == 0.0


def test_resident_memory_grows_with_what_is_held_and_the_peak_can_begin_anew() -> None:
    values = np.ones(64 * 2**20, dtype=np.uint8)
    del values
    assert reset_host_peak()
    before, peak = resident_mib(), peak_resident_mib()
    assert before is not None
    assert peak == pytest.approx(before, abs=16)
    held = np.ones(64 * 2**20, dtype=np.uint8)
    after, peak = resident_mib(), peak_resident_mib()
    assert held.size
    assert after is not None
    assert peak is not None
    assert 60 <= after - before <= 80
    assert peak >= after - 1
