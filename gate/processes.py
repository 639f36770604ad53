"""Other processes: started without running the user's script again, and work spread over them."""

from __future__ import annotations

import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

_Result = TypeVar("_Result")
_LOCK = threading.RLock()

_TRIED = 20
WORTH_S = 8.0
"""Starting processes takes about two seconds; work of less than some seconds is not worth it."""


@contextmanager
def without_main() -> Iterator[None]:
    """Processes that are spawned inside do not import `__main__`: a script without a guard is not run again in each.

    Source: `get_preparation_data` of CPython's `multiprocessing/spawn.py`, which names it to the new process by these two.
    """
    with _LOCK:
        main = sys.modules["__main__"]
        kept = {name: getattr(main, name) for name in ("__spec__", "__file__") if hasattr(main, name)}
        main.__spec__ = None
        main.__dict__.pop("__file__", None)
        try:
            yield
        finally:
            for name, value in kept.items():
                setattr(main, name, value)


def spread(
    function: Callable[[int], _Result], indices: Sequence[int], *, workers: int, worth_s: float = WORTH_S
) -> list[_Result]:
    """The function's results in the order of the indices, in processes where they take seconds.

    Where the function cannot be sent to another process, or fails there, it is called here.

    Args:
        function: Takes an index; the same index gives the same result.
        indices: At least one.
        workers: Processes.
        worth_s: The least estimated work that processes are started for.
    """
    began = time.perf_counter()
    found = [function(index) for index in indices[:_TRIED]]
    left = indices[len(found) :]
    seconds = (time.perf_counter() - began) / max(len(found), 1) * len(left)
    if workers > 1 and left and seconds > worth_s:
        return [*found, *_in_processes(function, left, workers)]
    return [*found, *map(function, left)]


def _in_processes(function: Callable[[int], _Result], indices: Sequence[int], workers: int) -> list[_Result]:
    parts = [indices[start::workers] for start in range(min(workers, len(indices)))]
    context = multiprocessing.get_context("spawn")
    try:
        pool = ProcessPoolExecutor(len(parts), mp_context=context, initializer=_keep, initargs=(function,))
        with pool:
            with without_main():
                pending = [pool.submit(_called, part) for part in parts]
            scored = [each.result() for each in pending]
    except Exception:  # noqa: BLE001 - whatever went wrong there goes wrong here, where its error is seen
        return [function(index) for index in indices]
    by_index = {
        index: each for part, found in zip(parts, scored, strict=True) for index, each in zip(part, found, strict=True)
    }
    return [by_index[index] for index in indices]


_KEPT: list[Callable[[int], Any]] = []


def _keep(function: Callable[[int], Any]) -> None:
    _KEPT.append(function)


def _called(indices: Sequence[int]) -> list[Any]:
    return [_KEPT[-1](index) for index in indices]
