"""Peak host memory."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from gate.memory import host_peak

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
