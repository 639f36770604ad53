"""A run that was asked for the tests that need a GPU must not be green because it skipped them."""

import subprocess
import sys
from pathlib import Path

import pytest

from gate.device import gpu

TESTS = Path(__file__).parent


@pytest.mark.skipif(gpu() is not None, reason="there is a GPU here, so nothing is skipped")
@pytest.mark.parametrize("expression", ["gpu", "gpu and not slow"])
def test_asked_for_gpu_tests_that_are_all_skipped_fail_the_run(expression):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            expression,
            str(TESTS / "engines" / "tensorrt"),
            "-p",
            "no:cacheprovider",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=TESTS.parent,
    )
    assert done.returncode == 1, done.stdout[-2000:]
    assert "were skipped: nothing was shown" in done.stdout


def test_a_run_that_was_not_asked_for_them_is_not_failed_by_their_absence():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", str(TESTS / "engines" / "test_registry.py")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stdout[-2000:]
