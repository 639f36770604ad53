"""Tiles cover an image, and what is found in them is found once."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gate.errors import MeasurementError
from gate.postprocess.tiling import Tile, merged, overlap_px, tile_batches, tile_pixels, tile_record, tiles_of
from gate.targets import Detections, ImageRecord


@settings(max_examples=200)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(4, 64), st.floats(0, 0.7))
def test_tiles_cover_every_pixel_and_stay_within_the_image(width, height, size, overlap):
    seen = np.zeros((height, width), np.bool_)
    tiles = tiles_of(width, height, size=size, overlap=overlap)
    for tile in tiles:
        assert tile.left >= 0
        assert tile.top >= 0
        assert tile.left + tile.width <= width
        assert tile.top + tile.height <= height
        seen[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width] = True
    assert seen.all()
    assert len(set(tiles)) == len(tiles)
    lefts = sorted({tile.left for tile in tiles})
    assert all(after - before <= size - overlap_px(size, overlap) for before, after in itertools.pairwise(lefts))


def detect(boxes, tile):
    """A perfect detector on a tile: what of each object it sees, in the tile's pixels, at least 2 pixels a side."""
    corner = np.array([tile.left, tile.top, tile.left, tile.top], np.float64)
    seen = np.clip(boxes - corner, 0, [tile.width, tile.height] * 2)
    visible = ((seen[:, 2:] - seen[:, :2]) >= 2).all(axis=1)
    labels = np.arange(len(boxes))[visible]
    return Detections(seen[visible], 0.9 - 0.001 * labels, labels)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 180), st.integers(0, 130), st.integers(6, 19), st.integers(6, 19)), max_size=12),
    st.sampled_from([0.36, 0.4, 0.5]),
)
def test_object_smaller_than_the_overlap_is_found_once_and_whole(objects, overlap):
    rows = [(x, y, min(x + w, 200), min(y + h, 150)) for x, y, w, h in objects]
    boxes = np.array(rows, np.float64).reshape(-1, 4)
    tiles = tiles_of(200, 150, size=64, overlap=overlap)
    whole = merged(
        [detect(boxes, tile) for tile in tiles],
        tiles,
        ImageRecord(1, 200, 150),
        overlap=overlap_px(64, overlap),
        iou_threshold=0.5,
        max_detections=100,
    )
    assert whole.labels.tolist() == list(range(len(boxes)))
    assert np.array_equal(whole.boxes, boxes)


def test_object_larger_than_the_overlap_is_not_lost():
    tiles = tiles_of(100, 40, size=60, overlap=0.3)
    boxes = np.array([[10, 5, 90, 35]], np.float64)
    found = [detect(boxes, tile) for tile in tiles]
    image = ImageRecord(1, 100, 40)
    whole = merged(found, tiles, image, overlap=18, iou_threshold=0.5, max_detections=9)
    assert len(whole.boxes) >= 1


def test_classes_are_suppressed_together_only_where_asked():
    tile = Tile(0, 0, 50, 50)
    boxes = np.array([[5, 5, 20, 20]] * 2, np.float64)
    found = [Detections(boxes, np.array([0.9, 0.8]), np.array([3, 4]))]
    arguments = {"overlap": 0, "iou_threshold": 0.5, "max_detections": 9}
    image = ImageRecord(1, 50, 50)
    assert merged(found, [tile], image, **arguments).labels.tolist() == [3, 4]
    assert merged(found, [tile], image, **arguments, class_agnostic=True).labels.tolist() == [3]


def test_pixels_of_tiles_come_in_batches_and_are_filled_beyond_the_image():
    image = np.arange(6 * 10, dtype=np.uint8).reshape(6, 10)
    tiles = tiles_of(10, 6, size=8, overlap=0.25)
    batches = list(tile_batches(tiles, 1))
    assert [len(each) for each in batches] == [1, 1]
    first = tile_pixels(image, tiles, size=8, fill=114)
    assert first.shape == (2, 8, 8)
    assert np.array_equal(first[1, :6], image[:, 2:])
    assert (first[:, 6:] == 114).all()
    assert tile_pixels(np.zeros((8, 8, 3), np.float32), [Tile(0, 0, 8, 8)], size=8).shape == (1, 8, 8, 3)


def test_tile_is_an_image_of_its_own():
    record = tile_record(ImageRecord(7, 100, 80, scale_x=2.0, file_name="a.png"), Tile(10, 20, 64, 60))
    assert record == ImageRecord(7, 64, 60, file_name="a.png")


@pytest.mark.parametrize(
    "arguments", [{"size": 0, "overlap": 0.1}, {"size": 8, "overlap": 1.0}, {"size": 8, "overlap": -0.1}]
)
def test_tiles_that_cannot_be_are_an_error(arguments):
    with pytest.raises(MeasurementError, match="tiles of"):
        tiles_of(20, 20, **arguments)


def test_empty_image_is_an_error():
    with pytest.raises(MeasurementError, match="no tiles"):
        tiles_of(0, 20, size=8, overlap=0)


def test_detections_that_do_not_fit_the_tiles_are_an_error():
    image, none = ImageRecord(1, 20, 20), Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
    arguments = {"overlap": 2, "iou_threshold": 0.5, "max_detections": 9}
    with pytest.raises(MeasurementError, match="detections of 1 tiles, and 2 tiles"):
        merged([none], [Tile(0, 0, 9, 9)] * 2, image, **arguments)
    with pytest.raises(MeasurementError, match="0 tiles"):
        merged([], [], image, **arguments)
    with pytest.raises(MeasurementError, match="reaches beyond the image"):
        merged([none], [Tile(15, 0, 9, 9)], image, **arguments)
    with pytest.raises(MeasurementError, match="does not fit"):
        tile_pixels(np.zeros((20, 20)), [Tile(15, 0, 9, 9)], size=9)
    with pytest.raises(MeasurementError, match="at least one tile"):
        list(tile_batches([Tile(0, 0, 9, 9)], 0))
