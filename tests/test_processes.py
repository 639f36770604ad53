"""Work in other processes: the same results, and a user's script that is not run again."""

import os
import subprocess
import sys

import pytest

from gate.processes import spread, without_main


def squared(index):
    return index * index, os.getpid()


def only_here(index):
    if os.getpid() != ONLY[0]:
        raise RuntimeError("elsewhere")
    return index


ONLY = [os.getpid()]


def test_a_little_work_is_done_here():
    found = spread(squared, range(50), workers=4)
    assert [each[0] for each in found] == [index * index for index in range(50)]
    assert {each[1] for each in found} == {os.getpid()}


def test_much_work_is_done_in_processes_in_the_same_order():
    found = spread(squared, range(50), workers=2, worth_s=0.0)
    assert [each[0] for each in found] == [index * index for index in range(50)]
    assert len({each[1] for each in found}) >= 2


@pytest.mark.parametrize("function", [lambda index: index, only_here], ids=["cannot be sent", "fails there"])
def test_what_cannot_be_done_elsewhere_is_done_here(function):
    assert spread(function, range(30), workers=2, worth_s=0.0) == [*range(30)]


def test_an_error_is_the_functions_own():
    def wrong(index):
        raise ValueError(f"at {index}")

    with pytest.raises(ValueError, match="at 0"):
        spread(wrong, range(3), workers=2, worth_s=0.0)


def test_main_is_as_it_was_afterwards():
    main = sys.modules["__main__"]
    before = (main.__spec__, getattr(main, "__file__", None))
    with without_main():
        assert main.__spec__ is None
        assert not hasattr(main, "__file__")
    assert (main.__spec__, getattr(main, "__file__", None)) == before


def test_a_script_without_a_guard_is_run_once(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "print('run')\nimport operator\nfrom gate.processes import spread\n"
        "print(sum(spread(operator.neg, range(40), workers=2, worth_s=0.0)))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "run\n-780\n", "")
