"""What an engine finds in the tiles of large images, beside what it found in the whole images."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from gate.data.batches import Batch
from gate.data.images import ImageSource
from gate.data.preprocess import image_record
from gate.data.samples import undigested
from gate.device import usable_cores
from gate.engines.interface import Runner
from gate.errors import DataError, MeasurementError
from gate.metrics.findings import asked_limits, task_findings, with_tiled
from gate.metrics.interface import MetricKind, SampleStatistics
from gate.metrics.resampling import seed_from
from gate.postprocess.config import Postprocess, Tiling
from gate.postprocess.tiling import Tile, merged, overlap_px, tile_pixels, tiles_of
from gate.processes import spread
from gate.reference import batch_size
from gate.results import TaskValues
from gate.spec import EngineSpec
from gate.steps.compare import run_batch
from gate.steps.context import Context, data_where
from gate.steps.task import TaskMeasured, detections_of, empty_metric, nms_outputs, task_kind
from gate.targets import Detections, ImageRecord, ImageTarget
from gate.tensors import Array
from gate.verdict import Evidence, Finding


@dataclass(frozen=True)
class TiledMeasured:
    """What tiles gave.

    Args:
        values: Of whole images, and of tiles behind `tiled_`.
        findings: One for each limit on tiles.
    """

    values: TaskValues
    findings: tuple[Finding, ...]


def tiled_answers(
    run: Context,
    engine: EngineSpec,
    runner: Runner,
    measured: TaskMeasured,
    evidence: Evidence,
    *,
    engine_sha256: str = "",
) -> TiledMeasured:
    """The task's values with those over tiles beside them; as they are where the spec has no `[tiling]`.

    Both are of the same engine on the same images, and paired image by image: what tiles gain is theirs.

    Args:
        run: The samples.
        engine: What is asked for.
        runner: It, loaded.
        measured: What it gave on whole images.
        evidence: Of the findings.
        engine_sha256: Of the engine's file; resamples are drawn by it.

    Raises:
        DataError: The samples are no images with annotations, or an image changed.
        RunError: The engine failed.
        MeasurementError: Its answers are malformed or not finite, or there is nothing to score.
    """
    tiling, task, kind, config = run.spec.tiling, run.spec.task, task_kind(run), run.spec.postprocess
    if tiling is None or task is None or kind is None or config is None:
        return TiledMeasured(measured.values, ())
    tiled = _statistics(run, engine, runner, kind, tiling=tiling, config=config)
    values = with_tiled(measured.values, tiled, kind=kind)
    findings = task_findings(
        [each for each in asked_limits(kind, engine, run.file) if each.tiled],
        tiled,
        measured.statistics,
        kind=kind,
        evidence=evidence,
        seed=seed_from(engine_sha256, "whole images", run.digest.data_sha256),
        resamples=task.resamples,
        over=partial(spread, workers=usable_cores()),
    )
    return TiledMeasured(values, findings)


def _statistics(
    run: Context, engine: EngineSpec, runner: Runner, kind: MetricKind, *, tiling: Tiling, config: Postprocess
) -> SampleStatistics:
    """Every tile through the engine, and what was found in the tiles of an image scored as the image's.

    One decoded image and one batch of tiles are in memory at a time.
    """
    source = _images(run)
    metric = empty_metric(run, kind)
    with run.stage("tiles", engine=engine.name, total=len(source)):
        batches = _batches(_cuts(source, tiling), batch_size(run.file))
        seen = _seen(run, engine, runner, batches, input_name=source.input_name, config=config)
        scored = 0
        for index, group in itertools.groupby(seen, key=lambda each: each.cut.index):
            found = list(group)
            record, annotations = source.records[index], source.items[index].annotations
            if annotations is None:
                raise DataError("has no annotations, so tiles have nothing to be scored by", where=record.file_name)
            answer = merged(
                [each.detections for each in found],
                [each.cut.tile for each in found],
                record,
                overlap=overlap_px(tiling.size, tiling.overlap),
                iou_threshold=config.iou_threshold,
                max_detections=config.max_detections,
                class_agnostic=config.class_agnostic,
            )
            target = ImageTarget(record, annotations)
            metric.add((answer,), reference=(answer,), targets=(target,), first_sample=index)
            scored += 1
            run.observer.advance()
        if scored != len(source):
            raise MeasurementError(f"tiles of {scored} images were scored, and there are {len(source)} images")
        return metric.statistics()


@dataclass(frozen=True)
class _Cut:
    """A tile of an image: its index, the tile, the model's input [1, ...], and how it became that."""

    index: int
    tile: Tile
    values: Array
    record: ImageRecord


@dataclass(frozen=True)
class _Seen:
    """A tile and what was found in it, in its pixels."""

    cut: _Cut
    detections: Detections


def _cuts(source: ImageSource, tiling: Tiling) -> Iterator[_Cut]:
    """Every tile of every image, in order."""
    for index, image in enumerate(source.records):
        pixels = source.pixels(index)
        for tile in image_tiles(image, tiling):
            name = f"{image.file_name}, tile of {tile.width} x {tile.height} at {tile.left}, {tile.top}"
            yield _Cut(
                index,
                tile,
                source.input_of(tile_pixels(pixels, tile), name=name),
                image_record(source.preprocess, tile.width, tile.height, image_id=image.image_id, file_name=name),
            )


def image_tiles(image: ImageRecord, tiling: Tiling) -> tuple[Tile, ...]:
    """The tiles of an image; with `full_image` the whole of it is one more.

    Raises:
        MeasurementError: The image is empty.
    """
    tiles = tiles_of(image.width, image.height, size=tiling.size, overlap=tiling.overlap)
    whole = Tile(0, 0, image.width, image.height)
    return (*tiles, whole) if tiling.full_image and whole not in tiles else tiles


def _batches(cuts: Iterable[_Cut], size: int) -> Iterator[list[_Cut]]:
    """Consecutive tiles of equal shape, at most so many; those of several images go together."""
    held: list[_Cut] = []
    for cut in cuts:
        if held and (len(held) == size or held[0].values.shape != cut.values.shape):
            yield held
            held = []
        held.append(cut)
    if held:
        yield held


def _seen(
    run: Context,
    engine: EngineSpec,
    runner: Runner,
    batches: Iterable[Sequence[_Cut]],
    *,
    input_name: str,
    config: Postprocess,
) -> Iterator[_Seen]:
    """What the engine finds in each tile, in order."""
    for cuts in batches:
        values = np.concatenate([cut.values for cut in cuts])
        batch = Batch(first=cuts[0].index, inputs={input_name: values}, labels=None)
        outputs = run_batch(runner, batch, engine=engine, run=run)
        if engine.nms is not None:
            outputs |= nms_outputs(outputs)
        found = detections_of(outputs, [cut.record for cut in cuts], config, run=run, batch=batch, nms=engine.nms)
        yield from (_Seen(cut, detections) for cut, detections in zip(cuts, found, strict=True))


def _images(run: Context) -> ImageSource:
    """The images that the samples were made of.

    Raises:
        DataError: They were made of none.
    """
    source = undigested(run.source)
    if isinstance(source, ImageSource):
        return source
    raise DataError(
        f"[tiling] needs images, and the samples are a {type(source).__name__}",
        where=data_where(run.spec.data, "source"),
        hint="Give [data.images], or a function that returns images (gate.read_images).",
    )
