"""What comparing costs: the accumulator beside reading the arrays, plain NumPy, assert_allclose and Polygraphy.

    python benchmarks/compare.py [--quick]

Times are the least of several repeats, ratios are to reading both arrays once in the same run, by `np.sum` and by
`np.max`. The latter is three times faster where the arrays lie in the cache; whether a bound is kept is said for both,
and the exit code is that of `np.sum`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
import time
import timeit
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gate.compare import OutputAccumulator

Floats = npt.NDArray[np.float32]

TOLERANCE = 4 * 2.0**-10
CORE_BOUND, ALL_BOUND, RSS_BOUND_MIB = 8.0, 20.0, 64.0


def least_ms(call: Callable[[], object], repeats: int) -> float:
    """The shortest of several runs, in milliseconds."""
    call()
    return min(timeit.repeat(call, number=1, repeat=repeats)) * 1e3


def arrays(rows: int, columns: int, seed: int = 0) -> tuple[Floats, Floats]:
    """Reference and candidate, float32 [rows, columns], as far apart as fp16 would put them."""
    rng = np.random.default_rng(seed)
    reference = rng.standard_normal((rows, columns), dtype=np.float32)
    return reference, reference + np.float32(5e-4) * rng.standard_normal((rows, columns), dtype=np.float32)


def accumulate(reference: Floats, candidate: Floats, *, atol: float = TOLERANCE, **settings: object) -> None:
    """All of it as one batch."""
    accumulator = OutputAccumulator("scores", np.float32, atol=atol, rtol=TOLERANCE, **settings)  # type: ignore[arg-type]
    accumulator.add(reference, candidate, first_sample=0)
    accumulator.metrics()


def naive(reference: Floats, candidate: Floats) -> tuple[object, ...]:
    """The elementwise core as one would write it first."""
    d = candidate - reference
    norms = np.linalg.norm(reference, axis=1) * np.linalg.norm(candidate, axis=1)
    cosine = 1.0 - (reference * candidate).sum(axis=1) / norms
    close = np.isclose(candidate, reference, rtol=TOLERANCE, atol=TOLERANCE).mean()
    return np.abs(d).max(), np.abs(d).mean(), np.sqrt((d**2).mean()), cosine.max(), close


def polygraphy(reference: Floats, candidate: Floats) -> Callable[[], object] | None:
    """Polygraphy's comparison of the same arrays, or None where it is not installed."""
    try:
        from polygraphy.comparator import CompareFunc, IterationResult
        from polygraphy.logger import G_LOGGER
    except ImportError:
        return None
    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # renamed in a version to come
        compare = CompareFunc.simple(atol=1.0, rtol=1.0)
    ours, theirs = IterationResult({"scores": reference}), IterationResult({"scores": candidate})

    def call() -> object:
        with contextlib.redirect_stdout(io.StringIO()):
            return compare(ours, theirs)

    return call


def speed(repeats: int) -> bool:
    """The table of times; whether the bounds are kept."""
    reference, candidate = arrays(1000, 1000)
    center = reference.mean(axis=0, dtype=np.float64)
    by_sum = least_ms(lambda: (np.sum(reference), np.sum(candidate)), repeats)
    by_max = least_ms(lambda: (np.max(reference), np.max(candidate)), repeats)
    print(f"[1000, 1000] float32 pair; reading both once: {by_sum:.3f} ms by np.sum, {by_max:.3f} ms by np.max\n")
    print(f"{'':<64}{'ms':>8}{'x sum':>8}{'x max':>8}   bound: x sum, x max")
    kept = True

    def line(what: str, call: Callable[[], object], bound: float | None = None) -> None:
        nonlocal kept
        ms = least_ms(call, repeats)
        shown = ""
        if bound is not None:
            words = ("kept" if ms <= bound * read else "NOT KEPT" for read in (by_sum, by_max))
            shown = f"<= {bound:g}: " + ", ".join(words)
        kept = kept and (bound is None or ms <= bound * by_sum)
        print(f"{what:<64}{ms:>8.2f}{ms / by_sum:>8.1f}{ms / by_max:>8.1f}   {shown}")

    line(
        "core: max, mean, rel_rmse, cosine of each row, allclose",
        lambda: accumulate(reference, candidate, atol=1e-3, histogram=False, topk=False),
        CORE_BOUND,
    )
    line(
        "core, every element within atol (rtol not looked at)",
        lambda: accumulate(reference, candidate, atol=1.0, histogram=False, topk=False),
        CORE_BOUND,
    )
    line("all: with histogram, top-1 and top-5", lambda: accumulate(reference, candidate), ALL_BOUND)
    line(
        "all, and the centred cosine",
        lambda: accumulate(reference, candidate, atol=1e-3, center=center),
        ALL_BOUND,
    )
    zeros = np.zeros_like(candidate)
    line("all, candidate all zeros (every row in float64)", lambda: accumulate(reference, zeros, center=center))
    print()
    line("NumPy, naive: the core alone", lambda: naive(reference, candidate))
    line(
        "numpy.testing.assert_allclose: one yes or no",
        lambda: np.testing.assert_allclose(candidate, reference, rtol=1.0, atol=1.0),
    )
    compare = polygraphy(reference, candidate)
    if compare is None:
        print("Polygraphy is not installed: not measured")
    else:
        line("Polygraphy, CompareFunc.simple: max, mean, median, histogram", compare)
    return kept


def resident_mib() -> float:
    """The process's resident set now, in MiB.

    Not `ru_maxrss`: a child inherits its parent's peak through exec, and a rise below that peak would not show.
    """
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def stream(rows: int, *, keep: bool) -> None:
    """In a process of its own: rows of 1,000, in fresh batches of 100, and what they add to its memory.

    Args:
        rows: How many.
        keep: Keep every batch: a control, which has to show.
    """
    step = 100
    center = np.zeros(1000)
    kept = [arrays(step, 1000)]
    accumulator = OutputAccumulator("scores", np.float32, atol=TOLERANCE, rtol=TOLERANCE, center=center)
    before = peak = resident_mib()
    seconds = 0.0
    for start in range(0, rows, step):
        reference, candidate = arrays(step, 1000, seed=start)
        if keep:
            kept.append((reference, candidate))
        began = time.perf_counter()
        accumulator.add(reference, candidate, first_sample=start)
        seconds += time.perf_counter() - began
        peak = max(peak, resident_mib())
    accumulator.metrics()
    print(f"{seconds:.3f} {peak - before:.1f}")


def streamed(rows: int, *options: str) -> tuple[float, float]:
    """Seconds and rise in MiB of a stream."""
    command = [sys.executable, __file__, "--stream", str(rows), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, rise = (float(each) for each in done.stdout.split())
    return seconds, rise


def memory(rows: int) -> bool:
    """Time and memory of a stream; whether the bound is kept, and the control shows that it could be broken."""
    seconds, rise = streamed(rows)
    _, control = streamed(rows, "--keep")
    kept, seen = rise <= RSS_BOUND_MIB, control > RSS_BOUND_MIB
    print(
        f"\n{rows:,} x 1,000 in fresh batches of 100, everything: {seconds:.2f} s, RSS rise {rise:.1f} MiB"
        f"   <= {RSS_BOUND_MIB:g} MiB {'kept' if kept else 'NOT KEPT'}"
    )
    print(
        f"control that keeps every batch: RSS rise {control:.1f} MiB   {'seen' if seen else 'NOT SEEN: measure again'}"
    )
    return kept and seen


def main() -> int:
    """Print the tables; 1 where a bound is not kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, for a first look")
    parser.add_argument("--stream", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stream:
        stream(options.stream, keep=options.keep)
        return 0
    kept = [speed(5 if options.quick else 40), memory(50_000)]
    return 0 if all(kept) else 1


if __name__ == "__main__":
    raise SystemExit(main())
