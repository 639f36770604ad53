"""Formats of boxes, their overlap, and clipping."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gate.errors import MeasurementError
from gate.postprocess.boxes import (
    area,
    clipped,
    cxcywh_from_xyxy,
    iou_matrix,
    normalized_from_pixels,
    ordered,
    pixels_from_normalized,
    xywh_from_xyxy,
    xyxy_from,
    xyxy_from_cxcywh,
    xyxy_from_xywh,
)

BOX = np.array([[10.0, 20.0, 40.0, 80.0]])
COORDINATES = st.lists(st.integers(-50, 50), min_size=4, max_size=4)


def test_formats_of_one_box():
    assert xywh_from_xyxy(BOX).tolist() == [[10, 20, 30, 60]]
    assert cxcywh_from_xyxy(BOX).tolist() == [[25, 50, 30, 60]]
    assert normalized_from_pixels(BOX, width=100, height=200).tolist() == [[0.1, 0.1, 0.4, 0.4]]


@given(st.lists(COORDINATES, min_size=1, max_size=5))
def test_conversions_and_back_change_nothing(rows):
    boxes = np.array(rows, np.float64)
    assert np.array_equal(xyxy_from_xywh(xywh_from_xyxy(boxes)), boxes)
    assert np.array_equal(xyxy_from_cxcywh(cxcywh_from_xyxy(boxes)), boxes)
    back = pixels_from_normalized(normalized_from_pixels(boxes, width=64, height=128), width=64, height=128)
    assert np.array_equal(back, boxes)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_is_kept(dtype):
    boxes = BOX.astype(dtype)
    for name in ("xyxy", "xywh", "cxcywh"):
        assert xyxy_from(boxes, name).dtype == dtype
    assert iou_matrix(boxes, boxes).dtype == dtype
    assert clipped(boxes, width=5, height=5).dtype == dtype


def test_unknown_format_and_no_boxes_are_errors():
    with pytest.raises(MeasurementError, match="no box format 'yxyx'"):
        xyxy_from(BOX, "yxyx")
    with pytest.raises(MeasurementError, match=r"4 numbers each, got \[1, 3\]"):
        xyxy_from(BOX[:, :3], "xywh")


def test_overlap_is_of_pixels_counted_by_hand():
    boxes = np.array([[0, 0, 4, 4], [2, 2, 6, 6], [0, 0, 2, 4], [9, 9, 9, 12], [5, 5, 1, 1]], np.float64)
    iou = iou_matrix(boxes, boxes)
    assert iou[0].tolist() == [1, 4 / 28, 0.5, 0, 0]
    assert iou[3].tolist() == [0, 0, 0, 0, 0]
    assert np.array_equal(iou, iou.T)
    assert area(boxes).tolist() == [16, 16, 8, 0, 0]
    assert iou_matrix(boxes[:0], boxes).shape == (0, 5)


@given(st.lists(COORDINATES, min_size=1, max_size=8))
def test_overlap_lies_between_0_and_1_and_is_1_with_itself(rows):
    boxes = ordered(np.array(rows, np.float64))
    iou = iou_matrix(boxes, boxes)
    assert ((iou >= 0) & (iou <= 1)).all()
    assert np.array_equal(np.diag(iou), (area(boxes) > 0).astype(float))


def test_box_beyond_the_image_ends_at_its_border():
    boxes = np.array([[-5, -5, 5, 5], [90, 90, 120, 130], [200, 200, 210, 210]], np.float64)
    assert clipped(boxes, width=100, height=110).tolist() == [[0, 0, 5, 5], [90, 90, 100, 110], [100, 110, 100, 110]]
