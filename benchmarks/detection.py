"""What COCO's numbers and their resamples cost, beside pycocotools and faster-coco-eval on the same detections.

    python benchmarks/detection.py [--quick]

5,000 images, 36,000 annotations and 200,000 detections of 80 categories, from a seed; two models. Times of the libraries
hold what a user of them waits for: making their data set, evaluating, accumulating.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gate.errors import BackendUnavailable
from gate.metrics.coco import CocoStatistics, values_by_library
from gate.metrics.detection import KINDS
from gate.targets import Categories, Detections, ImageRecord, ImageTarget

SIDE = 640
CATEGORIES = Categories({each + 1: f"category {each + 1}" for each in range(80)})

FASTER_BOUND, RESAMPLE_BOUND_S, DIFFERENCE_BOUND, RISE_BOUND_MIB = 5.0, 60.0, 1e-12, 400.0
RESAMPLES = 1000


def truth(images: int, seed: int = 0) -> list[ImageTarget]:
    """Images with 7.2 annotations on average, one in fifty a crowd."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(round(images * 7.2), np.full(images, 1 / images))
    targets = []
    for image_id, count in enumerate(counts.tolist(), start=1):
        size = np.exp(rng.uniform(np.log(8), np.log(300), (count, 2)))
        corner = rng.uniform(0, 1, (count, 2)) * (SIDE - size)
        labels = rng.integers(1, 81, count).tolist()
        crowd = (rng.random(count) < 0.02).astype(int).tolist()
        annotations = tuple(
            {
                "id": place + 1,
                "category_id": labels[place],
                "bbox": [*corner[place].tolist(), *size[place].tolist()],
                "area": float(size[place].prod() * 0.7),
                "iscrowd": crowd[place],
            }
            for place in range(count)
        )
        targets.append(ImageTarget(ImageRecord(image_id, SIDE, SIDE), annotations))
    return targets


def answers(targets: list[ImageTarget], seed: int) -> list[Detections]:
    """40 detections an image on average: two in three near an annotation."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(40 * len(targets), np.full(len(targets), 1 / len(targets)))
    found = []
    for target, count in zip(targets, counts.tolist(), strict=True):
        boxes = np.array([each["bbox"] for each in target.annotations], np.float64).reshape(-1, 4)
        labels = np.array([each["category_id"] for each in target.annotations], np.int64)
        boxes = np.concatenate([boxes, [[200.0, 200.0, 100.0, 100.0]]])
        labels = np.append(labels, 1)
        source = rng.integers(0, len(labels), count)
        spread = np.where(rng.random((count, 1)) < 0.67, 0.05, 0.4)
        size = boxes[source, 2:]
        corner = boxes[source, :2] + rng.normal(0, 1, (count, 2)) * spread * size
        extent = size * np.exp(rng.normal(0, 1, (count, 2)) * spread)
        named = np.where(rng.random(count) < 0.85, labels[source], rng.integers(1, 81, count))
        scores = rng.random(count) * (1 - spread[:, 0])
        found.append(Detections(np.concatenate([corner, corner + extent], axis=1), scores, named))
    return found


def scored(targets: list[ImageTarget], detections: list[Detections], batch: int = 16) -> CocoStatistics:
    """As the gate does it: checked, batch by batch."""
    metric = KINDS[0].make({}, CATEGORIES)
    for first in range(0, len(targets), batch):
        part = slice(first, first + batch)
        metric.add(detections[part], reference=None, targets=targets[part], first_sample=first)
    statistics = metric.statistics()
    if not isinstance(statistics, CocoStatistics):
        raise TypeError(type(statistics))
    return statistics


@dataclass
class Rise:
    """How far the process's resident set rose, in MiB."""

    mib: float = math.nan


def resident_mib() -> float:
    """The process's resident set now, in MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def watched() -> Iterator[Rise]:
    """Ask for the resident set every millisecond."""
    rise, done = Rise(), threading.Event()
    before = peak = resident_mib()

    def look() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, resident_mib())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield rise
    finally:
        done.set()
        thread.join()
        rise.mib = max(peak, resident_mib()) - before


def peak(images: int) -> float:
    """In a process of its own: the rise while a model is scored, in MiB."""
    done = subprocess.run([sys.executable, __file__, "--peak", str(images)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def word(kept: bool) -> str:
    """For the last column."""
    return "kept" if kept else "NOT KEPT"


def speed(targets: list[ImageTarget], detections: list[Detections]) -> tuple[CocoStatistics, bool]:
    """The table of all numbers by each library; whether the bounds are kept."""
    began = time.perf_counter()
    statistics = scored(targets, detections)
    values = statistics.values()
    ours = time.perf_counter() - began
    print(
        f"{statistics.samples:,} images, {statistics.annotations:,} annotations that count, "
        f"{statistics.detections:,} detections\n"
    )
    print(f"{'':<58}{'s':>8}{'x ours':>8}{'largest difference':>20}")
    print(f"{'ours: checks, matching, 12 numbers, each category':<58}{ours:>8.2f}{1.0:>8.1f}")
    kept = True
    for library in ("pycocotools", "faster_coco_eval"):
        began = time.perf_counter()
        try:
            theirs = values_by_library(library, targets, detections, category_names=CATEGORIES.names)
        except BackendUnavailable:
            print(f"{library} is not installed: not measured")
            kept = kept and library != "pycocotools"
            continue
        seconds = time.perf_counter() - began
        difference = max(
            0.0 if math.isnan(values[name]) and math.isnan(value) else abs(values[name] - value)
            for name, value in theirs.items()
        )
        equal = difference <= DIFFERENCE_BOUND and theirs.keys() == values.keys()
        line = f"{library:<58}{seconds:>8.2f}{seconds / ours:>8.1f}{difference:>20.1e}"
        line += f"   <= {DIFFERENCE_BOUND:g} {word(equal)}"
        if library == "pycocotools":
            fast = seconds >= FASTER_BOUND * ours
            line += f", >= {FASTER_BOUND:g} x {word(fast)}"
            kept = kept and fast
        kept = kept and equal
        print(line)
    return statistics, kept


def drops(reference: CocoStatistics, candidate: CocoStatistics, weights: npt.NDArray[np.int64]) -> list[float]:
    """What mean AP drops by, for each row of weights."""
    names = ("mean_ap",)
    return [reference.values(row, names)["mean_ap"] - candidate.values(row, names)["mean_ap"] for row in weights]


shared: list[CocoStatistics] = []


def shared_drops(weights: npt.NDArray[np.int64]) -> list[float]:
    """`drops` of what a process inherited."""
    reference, candidate = shared
    return drops(reference, candidate, weights)


def resampled(reference: CocoStatistics, candidate: CocoStatistics, resamples: int) -> bool:
    """The table of resamples; whether the bounds are kept."""
    rng = np.random.default_rng(0)
    images = reference.samples
    weights = rng.multinomial(images, np.full(images, 1 / images), resamples)
    drops(reference, candidate, weights[:2])
    began = time.perf_counter()
    alone = drops(reference, candidate, weights)
    single = time.perf_counter() - began
    cores = len(os.sched_getaffinity(0))
    began = time.perf_counter()
    # Processes that inherit the statistics: between the many small steps threads wait for the interpreter's lock.
    shared.extend((reference, candidate))
    with multiprocessing.get_context("fork").Pool(cores) as pool:
        parts = pool.map(shared_drops, np.array_split(weights, cores * 8), chunksize=1)
    together = [each for part in parts for each in part]
    many = time.perf_counter() - began
    kept, faster = single <= RESAMPLE_BOUND_S * resamples / RESAMPLES, many < single or cores == 1
    print(f"\n{resamples:,} paired resamples of two models, mean_ap")
    print(f"{'one thread':<58}{single:>8.1f} s   <= {RESAMPLE_BOUND_S * resamples / RESAMPLES:g} s {word(kept)}")
    print(f"{f'{cores} processes':<58}{many:>8.1f} s   < one thread {word(faster)}")
    print(
        f"equal: {alone == together}; 90 % of the drops: {np.quantile(alone, 0.05):.4f} to {np.quantile(alone, 0.95):.4f}"
    )
    return kept and faster and alone == together


def main() -> int:
    """Print the tables; 1 where a bound is not kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a fifth of the images and a tenth of the resamples")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        targets = truth(options.peak)
        detections = answers(targets, 1)
        scored(targets[:20], detections[:20]).values()
        with watched() as rise:
            scored(targets, detections).values()
        print(f"{rise.mib:.1f}")
        return 0
    targets = truth(1000 if options.quick else 5000)
    first = answers(targets, 1)
    reference, fast = speed(targets, first)
    candidate = scored(targets, answers(targets, 2))
    steady = resampled(reference, candidate, RESAMPLES // 10 if options.quick else RESAMPLES)
    rise = peak(len(targets))
    small = rise <= RISE_BOUND_MIB
    stored = sum(each.nbytes for each in reference.to_arrays().values()) / 2**20
    print(f"\nRSS rise while one model is scored: {rise:.0f} MiB   <= {RISE_BOUND_MIB:g} MiB {word(small)}")
    print(f"what a baseline stores of one model, before compression: {stored:.1f} MiB")
    return 0 if fast and steady and small else 1


if __name__ == "__main__":
    raise SystemExit(main())
