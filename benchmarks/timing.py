"""What timing an inference adds to it, beside reading the clock twice around it.

    python -m benchmarks.timing [--quick]

An engine that does nothing is timed as two that take turns are, in legs of 8 after 2 discarded inferences: what the
clock then shows is the harness's own, and is in each `host_wall`. Exit code 1 where it is more than twice what the
clock itself takes in a bare loop.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

from gate.sessions.job import Job
from gate.steps.latency import LEG
from gate.timing import interleave

MOST = 2.0


def nothing(_number: int) -> None:
    """An inference that takes no time."""


def bare_ns(call: Callable[[int], None], count: int) -> float:
    """Median of a call between two readings of the clock, nanoseconds."""
    clock, found = time.perf_counter_ns, []
    for number in range(count):
        start = clock()
        call(number)
        found.append(clock() - start)
    return statistics.median(found)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer inferences")
    count = LEG * (500 if parser.parse_args().quick else 5_000)
    discard = Job(subjects=()).discard
    alone = bare_ns(nothing, count)
    begin = time.perf_counter_ns()
    times = interleave([nothing, nothing], kept=count, leg=LEG, discard=discard)
    whole = (time.perf_counter_ns() - begin) / (2 * count)
    timed = max(statistics.median(each.regions["host_wall"]) for each in times)
    print("| | ns |\n|---|---|")
    print(f"| clock twice around a call of nothing, median | {alone:.0f} |")
    print(f"| the same in turn with another, median: what `host_wall` holds beside the engine | {timed:.0f} |")
    print(f"| of an inference in all, discarded ones and switches included | {whole:.0f} |")
    return int(timed > MOST * alone)


if __name__ == "__main__":
    sys.exit(main())
