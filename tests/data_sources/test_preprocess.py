import json

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gate.data.image_spec import ImagesSpec, Preprocess
from gate.data.preprocess import (
    boxes_to_image,
    boxes_to_input,
    described,
    geometry,
    image_record,
    input_shape,
    preprocessed,
)
from gate.errors import DataError

RAW = {"scale": 1.0, "interpolation": "nearest"}


def made(image, **settings):
    return preprocessed(image, Preprocess(**settings), image_id=7, file_name="a.png")


def red_corner(height=40, width=60):
    """Black, with a red top left quarter and one blue pixel at the bottom right."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2] = (200, 0, 0)
    image[-1, -1] = (0, 0, 250)
    return image


def test_letterbox_puts_the_image_in_the_middle_and_pads_with_grey():
    values, record = made(red_corner(), size=(60, 60), **RAW)
    assert values.shape == (3, 60, 60)
    assert values.dtype == np.float32
    assert (record.left, record.top, record.scale_x, record.scale_y) == (0.0, 10.0, 1.0, 1.0)
    assert (record.image_id, record.width, record.height, record.file_name) == (7, 60, 40, "a.png")
    assert np.all(values[:, :10] == 114)
    assert np.all(values[:, 50:] == 114)
    assert np.all(values[0, 10:30, :30] == 200)
    assert np.all(values[1:, 10:30, :30] == 0)
    assert values[2, 49, 59] == 250


def test_an_odd_pixel_of_padding_is_right_and_below():
    _, record = made(np.zeros((10, 7, 3), np.uint8), size=(10, 10), **RAW)
    assert (record.left, record.top) == (1.0, 0.0)
    _, record = made(np.zeros((7, 10, 3), np.uint8), size=(10, 10), **RAW)
    assert (record.left, record.top) == (0.0, 1.0)


def test_scales_are_those_of_the_rounded_size_not_of_the_ratio():
    record = image_record(Preprocess(size=(64, 64)), 100, 33, image_id=1)
    placed = geometry(Preprocess(size=(64, 64)), 100, 33)
    assert placed.resized == (21, 64)
    assert record.scale_y == 21 / 33
    assert record.scale_x == 0.64


def test_letterbox_enlarges_only_where_it_may():
    assert image_record(Preprocess(size=(80, 80)), 20, 10, image_id=1).scale_x == 4.0
    record = image_record(Preprocess(size=(80, 80), enlarge=False), 20, 10, image_id=1)
    assert (record.scale_x, record.left, record.top) == (1.0, 30.0, 35.0)


def test_a_line_of_one_pixel_does_not_vanish():
    values, record = made(np.full((1, 500, 3), 9, np.uint8), size=(32, 32), **RAW)
    assert record.scale_y == 1.0
    assert np.all(values[:, 15] == 9)


def test_stretch_fills_the_input():
    values, record = made(red_corner(), resize="stretch", size=(20, 120), **RAW)
    assert (record.scale_x, record.scale_y, record.left, record.top) == (2.0, 0.5, 0.0, 0.0)
    assert np.all(values[0, :10, :60] == 200)


def test_center_crop_is_torchvisions_resize_and_crop():
    # Resize(256) of 500 x 375 gives 341 x 256, CenterCrop(224) begins at round(58.5) = 58 and 16.
    config = Preprocess(resize="center_crop", size=(224, 224), crop_fraction=0.875)
    placed = geometry(config, 500, 375)
    assert (placed.resized, placed.left, placed.top) == ((256, 341), -58, -16)
    record = image_record(config, 500, 375, image_id=1)
    assert (record.left, record.top, record.scale_x) == (-58.0, -16.0, 341 / 500)


def test_center_crop_keeps_the_centre():
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 50
    values, record = made(image, resize="center_crop", size=(10, 10), **RAW)
    assert np.all(values == 50)
    assert record.left == -10.0


@pytest.mark.parametrize("width, height", [(30, 10), (10, 30), (17, 23), (224, 224), (225, 223), (1, 400)])
@pytest.mark.parametrize("size", [(224, 224), (32, 64), (64, 32)])
def test_center_crop_covers_the_input_whatever_the_proportions(width, height, size):
    placed = geometry(Preprocess(resize="center_crop", size=size, crop_fraction=0.9), width, height)
    for first, length, whole in zip((placed.top, placed.left), placed.resized, size, strict=True):
        assert first <= 0
        assert first + length >= whole


def test_none_leaves_the_image_and_refuses_another_size():
    image = red_corner()
    values, record = made(image, resize="none", **RAW)
    assert np.array_equal(values, image.transpose(2, 0, 1))
    assert (record.scale_x, record.left) == (1.0, 0.0)
    with pytest.raises(DataError, match=r"is 60 x 40 pixels, \[preprocess\] says size = \[40, 61\]"):
        made(image, resize="none", size=(40, 61))


def test_channels_come_in_the_order_asked_for():
    image = np.zeros((2, 2, 3), np.uint8)
    image[:] = (10, 20, 30)
    rgb, _ = made(image, resize="none", **RAW)
    bgr, _ = made(image, resize="none", channels="bgr", **RAW)
    assert rgb[:, 0, 0].tolist() == [10, 20, 30]
    assert bgr[:, 0, 0].tolist() == [30, 20, 10]


def test_gray_is_one_channel_of_luma():
    image = np.zeros((2, 2, 3), np.uint8)
    image[:] = (100, 200, 50)
    values, _ = made(image, resize="none", channels="gray", **RAW)
    assert values.shape == (1, 2, 2)
    assert values[0, 0, 0] == round(0.299 * 100 + 0.587 * 200 + 0.114 * 50)


def test_gray_images_are_repeated_for_three_channels_and_kept_for_one():
    image = np.arange(6, dtype=np.uint8).reshape(2, 3)
    three, _ = made(image, resize="none", **RAW)
    one, _ = made(image, resize="none", channels="gray", **RAW)
    assert np.array_equal(three, np.stack([image] * 3))
    assert np.array_equal(one, image[None])


def test_mean_and_std_follow_the_scale_per_channel():
    image = np.full((1, 1, 3), 255, np.uint8)
    values, _ = made(image, resize="none", mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    assert values[:, 0, 0].tolist() == pytest.approx([1.0, 3.0, 0.5], abs=1e-6)


def test_padding_is_normalised_as_the_image_is():
    values, _ = made(np.full((4, 8, 3), 114, np.uint8), size=(8, 8), mean=(0.4,), std=(0.2,))
    assert len(np.unique(values)) == 1


def test_nhwc_is_nchw_with_the_channels_last():
    image = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    first, _ = made(image, size=(32, 32), mean=(0.1, 0.2, 0.3))
    last, _ = made(image, size=(32, 32), mean=(0.1, 0.2, 0.3), layout="nhwc")
    assert last.shape == (32, 32, 3) == input_shape(Preprocess(size=(32, 32), layout="nhwc"), 50, 30)
    assert np.array_equal(first, last.transpose(2, 0, 1))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "area", "nearest"])
def test_shrinking_is_antialiased_but_for_nearest(interpolation):
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, ::2] = 200
    values, _ = made(image, resize="stretch", size=(16, 16), scale=1.0, interpolation=interpolation)
    is_mean = np.abs(values[:, 4:-4, 4:-4] - 100).max() <= 1
    assert is_mean == (interpolation != "nearest")


settings_of = st.builds(
    lambda resize, size, enlarge: Preprocess(resize=resize, size=size, enlarge=enlarge),
    st.sampled_from(["letterbox", "stretch", "center_crop"]),
    st.tuples(st.integers(1, 700), st.integers(1, 700)),
    st.booleans(),
)


@given(settings_of, st.integers(1, 4000), st.integers(1, 4000), st.lists(st.floats(-500, 4500), min_size=4, max_size=8))
def test_boxes_find_their_way_back(config, width, height, numbers):
    boxes = np.array(numbers[: len(numbers) // 4 * 4]).reshape(-1, 4)
    record = image_record(config, width, height, image_id=1)
    there = boxes_to_input(boxes, record)
    assert np.allclose(boxes_to_image(there, record), boxes, rtol=1e-9, atol=1e-6 / min(record.scale_x, record.scale_y))


@given(settings_of, st.integers(1, 4000), st.integers(1, 4000))
def test_the_whole_image_becomes_where_it_lies_in_the_input(config, width, height):
    placed = geometry(config, width, height)
    record = image_record(config, width, height, image_id=1)
    whole = boxes_to_input(np.array([[0.0, 0.0, width, height]]), record)[0]
    expected = [placed.left, placed.top, placed.left + placed.resized[1], placed.top + placed.resized[0]]
    assert np.allclose(whole, expected, atol=1e-6)
    if config.resize == "letterbox":
        assert placed.left >= 0
        assert placed.left + placed.resized[1] <= config.size[1]
        assert placed.top + placed.resized[0] <= config.size[0]


def test_a_marked_rectangle_lies_where_its_box_says():
    image = np.zeros((90, 160, 3), np.uint8)
    image[20:60, 40:120] = 255
    values, record = made(image, size=(320, 320), scale=1.0)
    x0, y0, x1, y1 = boxes_to_input(np.array([[40, 20, 120, 60]]), record)[0].round().astype(int)
    assert (x0, y0, x1, y1) == (80, 110, 240, 190)
    assert values[:, y0 + 2 : y1 - 2, x0 + 2 : x1 - 2].min() == 255
    assert values[:, 75:108].max() == 0


def test_boxes_are_clipped_where_asked():
    record = image_record(Preprocess(size=(100, 100)), 200, 100, image_id=1)
    boxes = np.array([[-10.0, 0.0, 150.0, 100.0]])
    assert boxes_to_image(boxes, record)[0].tolist() == [-20.0, -50.0, 300.0, 150.0]
    assert boxes_to_image(boxes, record, clip=True)[0].tolist() == [0.0, 0.0, 200.0, 100.0]
    assert boxes_to_input(boxes, record, clip_to=(100, 60))[0].tolist() == [0.0, 25.0, 60.0, 75.0]
    assert boxes.tolist() == [[-10.0, 0.0, 150.0, 100.0]]
    assert boxes_to_image(np.empty((0, 4)), record, clip=True).shape == (0, 4)


@pytest.mark.parametrize("boxes", [np.zeros(4), np.zeros((2, 5)), np.empty(0)])
def test_boxes_of_another_shape_are_refused(boxes):
    record = image_record(Preprocess(size=(8, 8)), 8, 8, image_id=1)
    with pytest.raises(DataError, match=r"boxes must be \[n, 4\]"):
        boxes_to_image(boxes, record)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
    ],
)
def test_what_is_no_image_is_refused(image):
    with pytest.raises(DataError, match=r"a.png: an image must be uint8 \[H, W\] or \[H, W, 3\]"):
        made(image, size=(8, 8))


def test_an_image_without_pixels_is_refused():
    with pytest.raises(DataError, match="0 x 4 pixels holds nothing"):
        made(np.zeros((4, 0, 3), np.uint8), size=(8, 8))


@pytest.mark.parametrize(
    "table, message",
    [
        ({}, 'resize = "letterbox" needs size'),
        ({"size": [8, 8], "mean": [0.1, 0.2]}, "mean has 2 values, expected one or 3 for rgb"),
        ({"size": [8, 8], "channels": "gray", "std": [1, 1, 1]}, "std has 3 values, expected one or 1 for gray"),
        ({"size": [8, 8], "std": [0.0]}, "std must be above 0"),
        ({"size": [8, 8], "scale": 0.0}, "scale must be finite and not 0"),
        ({"size": [8, 8], "scale": float("nan")}, "scale must be finite"),
        ({"size": [8, 8], "mean": [float("nan")]}, "mean must be finite"),
        ({"size": [8, 8], "crop_fraction": 0.5}, 'crop_fraction is for resize = "center_crop"'),
        ({"size": [0, 8]}, "`int` >= 1"),
        ({"size": [8, 8], "pad": 256}, "`int` <= 255"),
        ({"size": [8, 8], "colour": "rgb"}, "unknown field `colour`"),
    ],
)
def test_a_contradictory_table_is_refused(table, message):
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert(table, Preprocess)


@pytest.mark.parametrize(
    "table, message",
    [
        ({"kind": "coco", "path": "a"}, "needs annotations"),
        ({"kind": "csv", "path": "a", "annotations": "b"}, 'are for kind = "coco", not "csv"'),
        ({"kind": "coco", "path": "a", "annotations": "b", "classes": ["x"]}, "the json names its categories"),
        ({"kind": "folder", "path": "a", "classes": ["x", "x"]}, "names a class twice"),
        ({"kind": "folder", "path": "a", "workers": -1}, "`int` >= 0"),
    ],
)
def test_a_contradictory_place_of_images_is_refused(table, message):
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert(table, ImagesSpec)


def test_what_is_done_is_described_whole():
    record = described(Preprocess(size=(8, 16), channels="bgr", interpolation="area"))
    assert json.loads(json.dumps(record)) == record
    assert record["size"] == [8, 16]
    assert record["channels"] == "bgr"
    assert record["resized_by"].startswith("Pillow ")
    assert record["resized_by"].endswith(" BOX")
    assert record["antialiased"] is True
    assert described(Preprocess(size=(8, 16), interpolation="nearest"))["antialiased"] is False
