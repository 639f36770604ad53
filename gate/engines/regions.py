"""The regions of an inference on a GPU, told apart by four events: what the runners there have in common."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from gate.engines.interface import RegionTimes, Unread
from gate.errors import RunError

E = TypeVar("E")


def require_alike(batches: Sequence[Mapping[str, Any]], *, where: str) -> None:
    """Refuse batches that cannot take turns without another shape being set.

    Args:
        batches: Per batch what has a `shape`, by input name; the names are those of the engine.
        where: What to name in errors.

    Raises:
        RunError: There is none, or two differ in shape.
    """
    if not batches:
        raise RunError("there is no batch to time", where=where)
    for index, batch in enumerate(batches):
        for name, array in batch.items():
            first, shape = list(batches[0][name].shape), list(array.shape)
            if shape != first:
                raise RunError(
                    f"batches that take turns have one shape: input {name!r} is {first} in batch 0 and {shape} in "
                    f"batch {index}",
                    where=where,
                )


def released_with(
    once: Callable[..., object], close: Callable[[], None], others: Sequence[weakref.finalize[..., Any]]
) -> list[weakref.finalize[..., Any]]:
    """What frees the buffers of a function as soon as nobody holds it, with those of others that are still held.

    Args:
        once: The function.
        close: Frees them; called once.
        others: Of the same runner.
    """
    release = weakref.finalize(once, close)
    release.atexit = False
    return [*(each for each in others if each.alive), release]


def unread_regions(
    elapsed_ns: Callable[[E, E], int], events: tuple[E, E, E, E], *, enqueue: int, transfers: bool
) -> Unread:
    """What asks the events of an inference for its regions, once the last of them is reached.

    Args:
        elapsed_ns: Gives the nanoseconds between two events that are reached.
        events: Before the copies in, before the engine, after it, and after the copies out; the outer two are not
            looked at without transfers.
        enqueue: The host's time to launch the engine, nanoseconds.
        transfers: Whether there were copies.
    """

    def read() -> RegionTimes:
        first, start, end, last = events
        return RegionTimes(
            gpu_compute=elapsed_ns(start, end),
            enqueue=enqueue,
            h2d=elapsed_ns(first, start) if transfers else None,
            d2h=elapsed_ns(end, last) if transfers else None,
        )

    return read
