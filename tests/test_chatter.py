"""What third parties print, log and warn about stays inside."""

import ctypes
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from gate.chatter import quiet


def test_prints_warnings_and_logs_are_kept_inside(capsys, caplog):
    with quiet() as chatter:
        sys.stdout.write("printed\n")
        sys.stderr.write("complained\n")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        logging.getLogger("some.tool").error("logged")
    assert chatter.tail() == ("DeprecationWarning: old", "printed", "complained")
    assert capsys.readouterr() == ("", "")
    assert not caplog.records


def test_tail_is_the_last_lines():
    with quiet() as chatter:
        sys.stdout.write("a\n\nb\nc\n")
    assert chatter.tail(2) == ("b", "c")


def test_logging_is_as_before_afterwards():
    root = logging.getLogger()
    before = (list(root.handlers), root.level, root.manager.disable)
    with quiet():
        logging.warning("installs a handler")  # noqa: LOG015 - what a careless library does
        root.addHandler(logging.StreamHandler())
        root.setLevel(1)
    assert (list(root.handlers), root.level, root.manager.disable) == before


def test_exceptions_pass_and_the_rest_is_put_back():
    with pytest.raises(ValueError, match="through"), quiet():
        raise ValueError("through")
    assert logging.getLogger().manager.disable == 0


def test_native_prints_are_kept_inside(capfd):
    with quiet() as chatter:
        os.write(1, b"on descriptor 1\n")
        os.write(2, b"on descriptor 2\n")
        ctypes.CDLL(None).puts(b"held back by the C library")
        assert chatter.tail(3) == ("on descriptor 1", "on descriptor 2", "held back by the C library")
    assert chatter.tail(1) == ("held back by the C library",)
    os.write(1, b"after\n")
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr() == ("after\n", "")


def test_native_prints_of_a_block_in_another_are_those_of_the_inner_one(capfd):
    with quiet() as outer:
        os.write(1, b"a\n")
        with quiet() as inner:
            os.write(1, b"b\n")
        os.write(2, b"c\n")
    assert (outer.tail(), inner.tail()) == (("a", "c"), ("b",))
    assert capfd.readouterr() == ("", "")


def _descriptors():
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def test_a_child_writes_into_it_and_descriptors_do_not_leak():
    before = _descriptors()
    with quiet() as chatter:
        subprocess.run([sys.executable, "-c", "print('child')"], check=True, timeout=60)
    assert chatter.tail() == ("child",)
    assert _descriptors() == before


def test_native_prints_are_given_back_when_an_exception_passes(capfd):
    def fail():
        os.write(2, b"cause\n")
        raise ValueError("through")

    with pytest.raises(ValueError, match="through"), quiet() as chatter:
        fail()
    os.write(2, b"after\n")
    assert chatter.tail() == ("cause",)
    assert capfd.readouterr() == ("", "after\n")


def test_what_was_printed_before_comes_out_and_nothing_of_the_inside():
    code = (
        "import ctypes, os, sys\n"
        "from gate.chatter import quiet\n"
        "sys.stdout.write('before ')\n"
        "with quiet():\n"
        "    ctypes.CDLL(None).printf(b'inside')\n"
        "    os.write(2, b'inside')\n"
        "print('after')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("before after\n", "")


@pytest.mark.parametrize("closed", [1, 2])
def test_a_closed_descriptor_is_no_obstacle(closed):
    code = (
        "import os\n"
        "from gate.chatter import quiet\n"
        f"os.close({closed})\n"
        "with quiet() as chatter:\n"
        f"    os.write({3 - closed}, b'inside')\n"
        f"os.write({3 - closed}, chatter.native().encode().upper())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout + done.stderr).startswith("INSIDE")
