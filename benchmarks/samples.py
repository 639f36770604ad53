"""What it costs to hold samples to what they were, beside going through them and beside sha256 of each.

    python -m benchmarks.samples [--quick]

Images of 3 x 224 x 224 float32 in memory, batches of 32. Times are the least of several repeats, ratios are within one
run. Exit code 1 where a later pass costs more than half of what sha256 of each sample would.
"""

from __future__ import annotations

import argparse
import sys
import timeit
from collections.abc import Callable

import numpy as np

from gate.data.samples import ArraySource, DigestedSource, Samples, all_batches, digest_of
from gate.spec import InputSpec

BATCH = 32
INPUTS = {"image": InputSpec(dtype="float32", shape=("batch", 3, 224, 224), axes={})}


def least_ms(call: Callable[[], object], repeats: int) -> float:
    """The shortest of several runs, milliseconds."""
    call()
    return min(timeit.repeat(call, number=1, repeat=repeats)) * 1e3


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer images and repeats")
    quick = parser.parse_args().quick
    count, repeats = (64, 2) if quick else (512, 5)
    images = np.random.default_rng(0).standard_normal((count, 3, 224, 224)).astype(np.float32)
    source = ArraySource(Samples({"image": images}), count)
    digest = digest_of(source, inputs=INPUTS, batch=BATCH, where="images")
    held = DigestedSource(source, digest, "images")
    rows = {
        "going through": lambda: list(source.batches(BATCH)),
        "first pass: checked, sha256 of each sample": lambda: digest_of(source, inputs=INPUTS, batch=BATCH, where=""),
        "held by XXH3, a batch ahead": lambda: list(held.batches(BATCH)),
        "held by XXH3, to the end": lambda: list(all_batches(held, BATCH)),
        "held by sha256 of each sample": lambda: list(held.batches(BATCH - 1)),
    }
    print(f"{count} images, {images.nbytes / 2**20:.0f} MiB\n")
    taken = {name: least_ms(call, repeats) for name, call in rows.items()}
    for name, milliseconds in taken.items():
        print(f"{name:<46}{milliseconds:>10.1f} ms")
    ratio = taken["held by XXH3, to the end"] / taken["held by sha256 of each sample"]
    kept = ratio <= 0.5
    print(f"\nXXH3 over sha256: {ratio:.2f}, promised 0.5" + ("" if kept else ": NOT KEPT"))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
