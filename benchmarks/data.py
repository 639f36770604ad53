"""Whether loading images keeps an engine busy: images a second, and how long their consumer waits.

    python benchmarks/data.py [--quick]

JPEG files of about 480 x 640 pixels, generated from a seed, are letterboxed to 640 x 640. The consumer sleeps as long as an
engine would compute that is 1.3 times slower than all cores decode: sleeping takes no core, as a GPU takes none. The share
of the wall time that it spends waiting for its next batch is promised to be at most 10 % with one worker a core.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gate.data.image_spec import Preprocess
from gate.data.images import ImageItem, ImageSet, ImageSource
from gate.device import usable_cores

WAIT_BOUND = 0.10
SLOWER = 1.3
BATCH = 8
PREPROCESS = Preprocess(size=(640, 640), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Pass:
    """One pass through all images: how many, how long it took, and how much of that was waiting."""

    images: int
    seconds: float
    waited: float

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / self.seconds

    @property
    def share(self) -> float:
        """Of the wall time, what was spent waiting."""
        return self.waited / self.seconds


def generated(folder: Path, count: int, seed: int = 0) -> ImageSet:
    """JPEG files with edges, gradients and noise, so that they decode as slowly as photographs do."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    items = []
    for index in range(count):
        height, width = int(rng.integers(440, 521)), int(rng.integers(600, 681))
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(image, np.int16) + rng.integers(-12, 13, (height, width, 3), dtype=np.int16)
        path = folder / f"{index:05}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        items.append(ImageItem(str(path), index, path.name, label=0))
    return ImageSet(tuple(items), str(folder))


def passed(source: ImageSource, engine_seconds: float) -> Pass:
    """Go through all images; the consumer sleeps so long for each of them.

    The time of an engine that is done late, because the system woke this process late, is the engine's and no waiting.
    """
    began = time.perf_counter()
    waited, images = 0.0, 0
    batches = source.batches(BATCH)
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        waited += time.perf_counter() - asked
        if batch is None:
            break
        images += batch.size
        if engine_seconds:
            time.sleep(engine_seconds * batch.size)
    return Pass(images, time.perf_counter() - began, waited)


def main() -> int:
    """Print the table; 1 where the promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer images, for a first look")
    options = parser.parse_args()
    count, cores = (240 if options.quick else 1000), usable_cores()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        found = generated(Path(folder), count)
        size = sum(path.stat().st_size for path in Path(folder).iterdir()) / count
        print(
            f"{count} JPEG files of {size / 1024:.0f} KiB generated in {time.perf_counter() - began:.1f} s; {cores} cores"
        )
        shares: dict[int, float] = {}
        engine_seconds = 0.0
        print(f"\n{'workers':>7}{'examined/s':>12}{'images/s':>10}{'engine ms':>11}{'waits':>8}{'first ms':>10}")
        for workers in sorted({0, 1, 2, cores}):
            began = time.perf_counter()
            with ImageSource(found, preprocess=PREPROCESS, input_name="images", workers=workers) as source:
                examined = count / (time.perf_counter() - began)
                alone = passed(source, 0.0)
                if workers == 0:
                    engine_seconds = alone.seconds / count / cores * SLOWER
                busy = passed(source, engine_seconds)
                began = time.perf_counter()
                next(batches := source.batches(BATCH))
                first_ms = (time.perf_counter() - began) * 1e3
                batches.close()
            shares[workers] = busy.share
            print(
                f"{workers:>7}{examined:>12.0f}{alone.rate:>10.0f}{engine_seconds * 1e3:>11.2f}{busy.share:>8.1%}"
                f"{first_ms:>10.1f}"
            )
    kept = shares[cores] <= WAIT_BOUND
    words = "kept" if kept else "NOT KEPT"
    print(f"\nwaiting for data with {cores} workers: {shares[cores]:.1%}   <= {WAIT_BOUND:.0%} {words}")
    seen = shares[0] > WAIT_BOUND
    print(f"control without workers: {shares[0]:.1%}   {'seen' if seen else 'NOT SEEN: measure again'}")
    return 0 if kept and seen else 1


if __name__ == "__main__":
    sys.exit(main())
