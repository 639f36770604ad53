"""Faults of an engine, a clock or a disk, for processes that import this file as `sitecustomize`.

Python imports a module of that name before anything else, so that what the gate starts meets the fault as it would a real
one; the package itself knows nothing of it. FAULT names it. FAULT_IN says where: `check` is any process that is no
session; numbers, such as `3,5`, are sessions in the order in which they begin. FAULT_FOLDER is where they are counted.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

AFTER = 40
"""Inferences before the fault, past warming up."""


def _number() -> int:
    """Which session of the test this process is, from 1."""
    number = 1
    while True:
        try:
            os.close(os.open(Path(os.environ["FAULT_FOLDER"]) / f"session-{number}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            number += 1
        else:
            return number


def _is_meant() -> bool:
    if "FAULT" not in os.environ:
        return False
    meant = os.environ["FAULT_IN"]
    if "gate.sessions.child" in " ".join(sys.orig_argv):
        return meant != "check" and str(_number()) in meant.split(",")
    return meant == "check"


def _at_inference(fault: Callable[[], object]) -> None:
    """Let ONNX Runtime do what the fault does at one inference."""
    import onnxruntime

    calls = 0
    for name in ("run", "run_with_iobinding"):
        original = getattr(onnxruntime.InferenceSession, name)

        def faulty(self: Any, *args: Any, original: Any = original, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == AFTER:
                fault()
            return original(self, *args, **more)

        setattr(onnxruntime.InferenceSession, name, faulty)


def _fail() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def _stepping_clock() -> None:
    """A clock that is set back by a second at one inference."""
    back = 0
    wall = time.perf_counter_ns

    def perf_counter_ns() -> int:
        return wall() - back

    def step() -> None:
        nonlocal back
        back = 10**9

    time.perf_counter_ns = perf_counter_ns
    time.perf_counter = lambda: perf_counter_ns() / 1e9
    _at_inference(step)


def _frozen_clock() -> None:
    """A clock that stands still from one inference on."""
    stopped: list[int] = []
    wall = time.perf_counter_ns

    def perf_counter_ns() -> int:
        return stopped[0] if stopped else wall()

    time.perf_counter_ns = perf_counter_ns
    _at_inference(lambda: stopped.append(wall()))


def _answering(change: Callable[[bytes], bytes]) -> None:
    """Change what the session wrote, right before its process ends."""
    leave = os._exit

    def _exit(code: int) -> None:
        # The folder is the only quoted text that the session's command line gives to `run`.
        found = re.search(r"run\('([^']+)'\)", " ".join(sys.orig_argv))
        assert found is not None, sys.orig_argv
        path = Path(found[1]) / "times.json"
        path.write_bytes(change(path.read_bytes()))
        leave(code)

    os._exit = _exit


def _durations(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[bytes], bytes]:
    """Change the list of each region; where no inference was timed, the seconds of the usage."""

    def changed(data: bytes) -> bytes:
        found, count = re.subn(
            rb'("host_wall":\[)([^\]]*)', lambda each: each[1] + b",".join(change(each[2].split(b","))), data
        )
        if count:
            return found
        return re.sub(rb'("usage":\[\{"seconds":)[^,]*', lambda each: each[1] + change([b"1"] * 20)[-1], data)

    return changed


def _printing() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.buffer.write(b'\xff\xfe{"cells": []}\0\x1b[2J NaN\n' * 1000)
        stream.flush()


def _full_disk() -> None:
    """No file of this process grows beyond 1 KiB: the error is EFBIG, where a full disk gives ENOSPC."""
    import resource

    _at_inference(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024)))


FAULTS: dict[str, Callable[[], object]] = {
    "killed": lambda: _at_inference(lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "ending well": lambda: _at_inference(lambda: os._exit(0)),
    "hanging": lambda: _at_inference(lambda: time.sleep(120)),
    "failing": lambda: _at_inference(_fail),
    "clock back": _stepping_clock,
    "clock frozen": _frozen_clock,
    "full disk": _full_disk,
    "printing": _printing,
    "negative": lambda: _answering(_durations(lambda each: [*each[:-1], b"-" + each[-1]])),
    "NaN": lambda: _answering(_durations(lambda each: [*each[:-1], b"NaN"])),
    "one too few": lambda: _answering(_durations(lambda each: each[:-1])),
    "truncated": lambda: _answering(lambda data: data[: len(data) // 2]),
    "busy GPU": lambda: _answering(lambda data: data.replace(b'"busy_percent":null', b'"busy_percent":97')),
    "garbage": lambda: _answering(lambda _: b"\xff\xfe\0 segmentation fault\n"),
}

if _is_meant():
    FAULTS[os.environ["FAULT"]]()
