"""Tiles cover an image, and what is found in them is found once."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gate.errors import MeasurementError
from gate.postprocess.tiling import Tile, merged, overlap_px, tile_pixels, tiles_of
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


def test_object_larger_than_any_tile_is_found_whole_where_the_whole_image_is_one_tile_more():
    tiles = (*tiles_of(100, 100, size=40, overlap=0.5), Tile(0, 0, 100, 100))
    large = np.array([[1, 1, 99, 99]], np.float64)
    none = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
    found = [none] * (len(tiles) - 1) + [Detections(large, np.array([0.9]), np.array([1]))]
    whole = merged(found, tiles, ImageRecord(1, 100, 100), overlap=20, iou_threshold=0.5, max_detections=9)
    assert np.array_equal(whole.boxes, large)


def test_classes_are_suppressed_together_only_where_asked():
    tile = Tile(0, 0, 50, 50)
    boxes = np.array([[5, 5, 20, 20]] * 2, np.float64)
    found = [Detections(boxes, np.array([0.9, 0.8]), np.array([3, 4]))]
    arguments = {"overlap": 0, "iou_threshold": 0.5, "max_detections": 9}
    image = ImageRecord(1, 50, 50)
    assert merged(found, [tile], image, **arguments).labels.tolist() == [3, 4]
    assert merged(found, [tile], image, **arguments, class_agnostic=True).labels.tolist() == [3]


def test_pixels_of_a_tile_are_those_of_the_image_at_its_offset():
    image = np.arange(6 * 10 * 3, dtype=np.uint8).reshape(6, 10, 3)
    tiles = tiles_of(10, 6, size=8, overlap=0.25)
    assert tiles == (Tile(0, 0, 8, 6), Tile(2, 0, 8, 6))
    assert np.array_equal(tile_pixels(image, tiles[1]), image[:, 2:])
    assert tile_pixels(image[..., 0], tiles[0]).shape == (6, 8)


@settings(max_examples=100)
@given(st.integers(1, 90), st.integers(1, 70), st.integers(16, 64), st.floats(0, 0.5))
def test_what_lies_in_a_tile_lies_in_the_image_at_its_offset(width, height, size, overlap):
    image = np.arange(width * height).reshape(height, width)
    put_back = np.full_like(image, -1)
    for tile in tiles_of(width, height, size=size, overlap=overlap):
        put_back[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width] = tile_pixels(image, tile)
    assert np.array_equal(put_back, image)


def test_image_smaller_than_a_tile_is_one_tile_of_its_own_size():
    assert tiles_of(30, 500, size=64, overlap=0.2)[0] == Tile(0, 0, 30, 64)
    assert tiles_of(30, 20, size=64, overlap=0.2) == (Tile(0, 0, 30, 20),)


def test_boxes_of_each_tile_are_moved_by_its_own_offset():
    tiles = tiles_of(100, 80, size=60, overlap=0.25)
    found = [Detections(np.array([[20.0, 20, 30, 30]]), np.array([0.5]), np.array([at])) for at in range(len(tiles))]
    whole = merged(found, tiles, ImageRecord(1, 100, 80), overlap=15, iou_threshold=0.5, max_detections=9)
    expected = {at: [tile.left + 20, tile.top + 20] for at, tile in enumerate(tiles)}
    assert {int(label): box[:2].tolist() for label, box in zip(whole.labels, whole.boxes, strict=True)} == expected
    assert np.array_equal(whole.boxes[:, 2:] - whole.boxes[:, :2], np.full((len(tiles), 2), 10.0))


def test_more_than_is_kept_of_an_image_are_the_best_of_all_its_tiles():
    tiles = tiles_of(100, 40, size=60, overlap=0.25)
    found = [
        Detections(np.array([[20.0, 5 + 8 * at, 28, 12 + 8 * at]]), np.array([0.1 + 0.2 * at]), np.array([1]))
        for at in range(len(tiles))
    ]
    whole = merged(found, tiles, ImageRecord(1, 100, 40), overlap=15, iou_threshold=0.5, max_detections=1)
    assert whole.scores.tolist() == [pytest.approx(0.1 + 0.2 * (len(tiles) - 1))]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_box_that_is_not_finite_is_an_error(value):
    found = [Detections(np.array([[5.0, 5, value, 20]]), np.array([0.9]), np.array([3]))]
    with pytest.raises(MeasurementError, match="not finite"):
        merged(found, [Tile(0, 0, 50, 50)], ImageRecord(1, 50, 50), overlap=0, iou_threshold=0.5, max_detections=9)


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
        tile_pixels(np.zeros((20, 20)), Tile(15, 0, 9, 9))
    with pytest.raises(MeasurementError, match="does not fit"):
        tile_pixels(np.zeros((20, 20)), Tile(-3, 0, 9, 9))
