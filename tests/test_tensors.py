"""Exact pairing of outputs."""

from __future__ import annotations

import numpy as np

from gate.tensors import mismatches

A = np.zeros((2, 3), np.float32)


def test_equal_outputs_have_no_mismatch() -> None:
    assert mismatches({"a": A}, {"a": A}) == ()


def test_a_missing_output_names_both_sides() -> None:
    (found,) = mismatches({"a": A, "b": A}, {"a": A})
    assert "the engine has no 'b' (it has 'a')" in str(found)
    assert "the reference has 'a', 'b'" in str(found)


def test_an_extra_output_is_a_mismatch() -> None:
    (found,) = mismatches({"a": A}, {"a": A, "c": A})
    assert "extra 'c'" in str(found)


def test_no_outputs_at_all_is_a_mismatch() -> None:
    (found,) = mismatches({"a": A}, {})
    assert "it has none" in str(found)


def test_another_shape_is_a_mismatch_also_where_it_would_broadcast() -> None:
    (found,) = mismatches({"a": A}, {"a": A[:1]})
    assert "shape [1, 3], the reference has [2, 3]" in str(found)


def test_another_dtype_is_a_mismatch_unless_floats_may_be_cast() -> None:
    half = {"a": A.astype(np.float16)}
    (found,) = mismatches({"a": A}, half)
    assert "is float16, the reference's is float32" in str(found)
    assert mismatches({"a": A}, half, cast_io=True) == ()
    assert len(mismatches({"a": A}, {"a": A.astype(np.int32)}, cast_io=True)) == 1
