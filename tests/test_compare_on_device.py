"""The accumulator on a device against NumPy's, on tensors of the CPU: its arithmetic has the same bits on every device."""

import builtins
import itertools
import math
import sys

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gate import compare_on_device
from gate.compare import OutputAccumulator
from gate.compare_on_device import (
    LEAST_ELEMENTS,
    LEAST_ELEMENTS_A_SAMPLE,
    DeviceAccumulator,
    described,
    has_cuda,
    host_array,
    is_large,
)
from gate.errors import MeasurementError

COUNTS = (
    "output", "kind", "samples", "elements", "nonfinite_reference", "nonfinite_candidate", "max_abs", "max_abs_sample",
    "max_abs_element", "allclose_fraction", "allclose_atol", "allclose_rtol", "mismatch_fraction", "quantiles",
    "top1_agree", "top5_agree", "topk_samples", "top1_near_ties",
)  # fmt: skip
SUMS = ("mean_abs", "rms_reference", "rel_rmse")
DISTANCES = ("cosine_distance", "mean_cosine_distance", "centered_cosine_distance")


def tensor(values, device="cpu"):
    values = np.ascontiguousarray(values)
    return torch.from_numpy(values if values.flags.writeable else values.copy()).to(device)


def measure(accumulator, reference, candidate):
    accumulator.add(reference, candidate, first_sample=0)
    return accumulator.metrics()


def both(reference, candidate, *, wide=False, device="cpu", **settings):
    """Metrics by the device and by NumPy; `wide` gives NumPy the same values in float64."""
    reference, candidate = np.asarray(reference), np.asarray(candidate)
    here = DeviceAccumulator("x", reference.dtype, **settings)
    here.add(reference, tensor(candidate, device), first_sample=0)
    if wide:
        reference, candidate = reference.astype(np.float64), candidate.astype(np.float64)
    there = OutputAccumulator("x", reference.dtype, **settings)
    there.add(reference, candidate, first_sample=0)
    if not wide:
        require_same_state(here, there)
    return here.metrics(), there.metrics()


def require_same_state(here, there):
    """What is counted, where the metrics made of it are NaN too."""
    for name in ("_close", "_mismatches", "_top1", "_top5", "_near_ties", "_largest"):
        assert getattr(here, name) == getattr(there, name), name
    assert (here._histogram is None) == (there._histogram is None)
    assert here._histogram is None or np.array_equal(here._histogram, there._histogram)


def same(a, b):
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def require_same_counts(here, there):
    for name in COUNTS:
        a, b = getattr(here, name), getattr(there, name)
        if name == "quantiles":
            assert list(a) == list(b)
            assert all(same(x, y) for x, y in zip(a.values(), b.values(), strict=True)), (a, b)
        else:
            assert same(a, b), (name, a, b)


def require_near(here, there, *, rel, distance):
    """Sums within `rel`; cosine distances within `distance`, relative, and what rounding leaves of a 0."""
    for name in SUMS:
        assert getattr(here, name) == pytest.approx(getattr(there, name), rel=rel, nan_ok=True), name
    for name in DISTANCES:
        a, b = getattr(here, name), getattr(there, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert a == pytest.approx(b, rel=distance, abs=distance * 1e-3, nan_ok=True), name
    assert len(here.worst_samples) == len(there.worst_samples)
    assert [error for _, error in here.worst_samples] == pytest.approx(
        [error for _, error in there.worst_samples], rel=rel
    )


def bits(metrics):
    return msgspec.json.encode(msgspec.structs.asdict(metrics)), repr(metrics)


def pair(shape, *, noise=1e-3, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    reference = rng.standard_normal(shape).astype(dtype)
    return reference, (reference + rng.standard_normal(shape) * noise).astype(dtype)


def awkward(seed, n, size, dtype):
    """Samples of every kind that NumPy's accumulator treats in its own way."""
    r, c = pair((n, size), noise=10.0 ** -(seed % 6), seed=seed, dtype=dtype)
    rng = np.random.default_rng(seed)
    for row in range(n):
        match int(rng.integers(10)):
            case 0:
                c[row] = r[row]
            case 1:
                r[row] = 0
            case 2:
                c[row] = 0
            case 3:
                r[row], c[row] = r[row] * dtype(1e-30), c[row] * dtype(1e-30)
            case 4 if dtype != np.float16:
                r[row], c[row] = r[row] * dtype(1e30), c[row] * dtype(1e30)
            case 5 if seed % 3 == 0:
                c[row, int(rng.integers(size))] = np.nan
            case 6 if seed % 3 == 0:
                r[row, int(rng.integers(size))] = np.inf
            case 7:
                r[row], c[row] = np.round(r[row]), np.round(c[row])  # ties
    return r, c


SEEDS = st.integers(0, 1000)
DTYPES = st.sampled_from([np.float16, np.float32, np.float64])


@given(seed=SEEDS, n=st.integers(1, 40), size=st.sampled_from([1, 2, 3, 5, 6, 33, 100]), dtype=DTYPES)
def test_counts_are_those_of_numpy_and_sums_are_near(seed, n, size, dtype):
    r, c = awkward(seed, n, size, dtype)
    center = np.random.default_rng(seed).standard_normal(size)
    here, there = both(r, c, atol=1e-3, rtol=1e-3, center=center)
    require_same_counts(here, there)
    require_near(
        here, there, rel=1e-12 if dtype == np.float64 else 3e-6, distance=1e-9 if dtype == np.float64 else 1e-3
    )


@given(seed=SEEDS, n=st.integers(1, 20), size=st.sampled_from([1, 2, 33, 1000]), dtype=DTYPES)
def test_sums_are_those_of_numpy_in_float64_to_1e_12(seed, n, size, dtype):
    r, c = awkward(seed, n, size, dtype)
    here, there = both(r, c, wide=True)
    require_near(here, there, rel=1e-12, distance=1e-9)


@pytest.mark.parametrize("noise", [0.5, 0.7, 0.9, 2.0])
@pytest.mark.parametrize("offset", [0.0, 1.5, 50.0])
def test_errors_as_large_as_the_reference_are_counted_in_float64_where_numpy_does(noise, offset):
    r, c = pair((200, 30), noise=noise)
    r, c = r + np.float32(offset), c + np.float32(offset)
    for row in range(0, 200, 10):
        part = slice(row, row + 10)
        here, there = both(r[part], c[part], atol=0.3, rtol=1e-3, center=np.full(30, offset + 1e-9))
        require_same_counts(here, there)
        require_near(here, there, rel=3e-6, distance=1e-3)


@pytest.mark.parametrize("size", [8191, 8192, 8193, 20_011])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_samples_longer_than_a_segment(seed, size, dtype):
    r, c = awkward(seed, 6, size, dtype)
    center = np.random.default_rng(seed).standard_normal(size)
    here, there = both(r, c, atol=1e-3, rtol=1e-3, center=center)
    require_same_counts(here, there)
    require_near(
        here, there, rel=1e-12 if dtype == np.float64 else 3e-6, distance=1e-6 if dtype == np.float64 else 1e-3
    )


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("shape", [(1, 70_000), (5, 20_000), (300, 33), (3, 8192)])
def test_blocks_of_any_size_give_the_same_bits(monkeypatch, shape, bad):
    r, c = pair(shape, noise=0.3)
    if bad:
        r[-1, shape[1] // 2] = np.nan
    c[-1, -1] += 10
    settings = {"atol": 1e-2, "rtol": 1e-2, "center": r[0].astype(np.float64)}
    whole = DeviceAccumulator("x", np.float32, **settings)
    few = DeviceAccumulator("x", np.float32, **settings)
    whole.add(r, tensor(c), first_sample=0)
    monkeypatch.setattr(compare_on_device, "_BLOCK", 8192)
    few.add(r, tensor(c), first_sample=0)
    assert bits(few.metrics()) == bits(whole.metrics())
    require_same_state(few, whole)


@given(seed=SEEDS, n=st.integers(1, 40), size=st.sampled_from([1, 5, 7, 33]), dtype=DTYPES, data=st.data())
def test_any_split_any_order_and_any_merge_give_the_same_bits(seed, n, size, dtype, data):
    r, c = awkward(seed, n, size, dtype)
    settings = {"atol": 1e-3, "rtol": 1e-3, "center": np.random.default_rng(seed).standard_normal(size)}
    whole = DeviceAccumulator("x", dtype, **settings)
    whole.add(r, tensor(c), first_sample=0)
    cuts = sorted(data.draw(st.sets(st.integers(0, n), max_size=5)) | {0, n})
    parts = data.draw(st.permutations(list(itertools.pairwise(cuts))))
    shards = [DeviceAccumulator("x", dtype, **settings) for _ in range(2)]
    for start, stop in parts:
        data.draw(st.sampled_from(shards)).add(r[start:stop], tensor(c[start:stop]), first_sample=start)
    shards[0].merge(shards[1])
    assert bits(shards[0].metrics()) == bits(whole.metrics())


def test_the_same_twice_gives_the_same_bits_under_any_switch_for_determinism():
    r, c = pair((300, 1000), noise=0.2)
    first = measure(DeviceAccumulator("x", np.float32, atol=1e-2), r, tensor(c))
    torch.use_deterministic_algorithms(True)
    try:
        second = measure(DeviceAccumulator("x", np.float32, atol=1e-2), r, tensor(c))
    finally:
        torch.use_deterministic_algorithms(False)
    assert bits(first) == bits(second)


def test_it_merges_with_an_accumulator_of_the_host():
    r, c = pair((40, 10), noise=0.3)
    whole = measure(OutputAccumulator("x", np.float32), r, c)
    here, there = DeviceAccumulator("x", np.float32), OutputAccumulator("x", np.float32)
    here.add(r[:20], tensor(c[:20]), first_sample=0)
    there.add(r[20:], c[20:], first_sample=20)
    here.merge(there)
    require_same_counts(here.metrics(), whole)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["reference", "candidate", "both"])
@pytest.mark.parametrize("shape", [(20, 10), (2, 9000)])
def test_what_is_not_finite_is_counted_and_makes_every_number_nan(value, side, shape):
    r, c = pair(shape)
    if side in ("reference", "both"):
        r[1, 7] = value
    if side in ("candidate", "both"):
        c[1, 7] = value
    here, there = both(r, c, atol=1.0, rtol=1.0, center=np.zeros(shape[1]))
    require_same_counts(here, there)
    assert here.nonfinite_reference == (side != "candidate")
    assert here.nonfinite_candidate == (side != "reference")
    assert (here.max_abs, here.max_abs_sample, here.max_abs_element) == (math.inf, 1, 7)
    assert all(math.isnan(getattr(here, name)) for name in (*SUMS, *DISTANCES, "sqnr_db", "mismatch_fraction"))
    assert here.worst_samples[0] == (1, math.inf)
    assert here.top1_agree == shape[0] - 1


def test_an_infinite_difference_of_finite_elements_is_placed_where_numpy_places_it():
    r, c = np.full((2, 4), 1e308), np.full((2, 4), 1e308)
    c[1, 2] = c[1, 3] = -1e308
    here, there = both(r, c)
    assert here.max_abs == there.max_abs == math.inf
    assert (here.max_abs_sample, here.max_abs_element) == (there.max_abs_sample, there.max_abs_element) == (1, 2)


def test_of_equal_differences_the_first_counts():
    r = np.ones((9, 40), np.float32)
    c = r.copy()
    c[[8, 2, 5], 7:] = 2.0
    here, there = both(r, c)
    require_same_counts(here, there)
    assert (here.max_abs_sample, here.max_abs_element) == (2, 7)


@given(seed=SEEDS, classes=st.sampled_from([2, 5, 6, 12, 40]), levels=st.integers(1, 6))
def test_agreement_breaks_ties_as_numpy_does(seed, classes, levels):
    rng = np.random.default_rng(seed)
    r = rng.integers(0, levels, (30, classes)).astype(np.float32)
    c = rng.integers(0, levels, (30, classes)).astype(np.float32)
    here, there = both(r, c, atol=0.0)
    require_same_counts(here, there)


@given(scale=st.sampled_from([1e-3, 1.0, 1e3]), seed=SEEDS)
def test_a_difference_at_the_tolerance_is_counted_as_numpy_counts_it(scale, seed):
    rng = np.random.default_rng(seed)
    r = (rng.integers(-8, 9, (20, 16)) * scale).astype(np.float32)
    c = (r * (1 + rng.integers(-2, 3, r.shape) * np.float32(1e-3)) + np.float32(1e-3) * scale).astype(np.float32)
    here, there = both(r, c, atol=1e-3 * scale, rtol=1e-3)
    assert here.allclose_fraction == there.allclose_fraction


INTEGERS = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]


@given(seed=SEEDS, dtype=st.sampled_from([*INTEGERS, np.bool_]), size=st.sampled_from([1, 4, 100]))
def test_integers_and_booleans_are_compared_exactly(seed, dtype, size):
    rng = np.random.default_rng(seed)
    if dtype == np.bool_:
        r, other = rng.random((20, size)) < 0.5, rng.random((20, size)) < 0.5
    else:
        info = np.iinfo(dtype)
        r, other = (rng.integers(info.min, info.max, (20, size), dtype, endpoint=True) for _ in range(2))
    c = np.where(rng.random(r.shape) < 0.3, other, r)
    here, there = both(r, c)
    require_same_counts(here, there)
    assert here.kind == "exact"
    assert here.mean_abs == pytest.approx(there.mean_abs, rel=1e-12)
    assert here.rms_reference == pytest.approx(there.rms_reference, rel=1e-12)
    assert here.worst_samples == there.worst_samples


@pytest.mark.parametrize(
    ("dtype", "a", "b", "distance"),
    [(np.int64, -(2**63), 2**63 - 1, 2.0**64), (np.uint64, 0, 2**64 - 1, 2.0**64), (np.uint64, 2**63, 2**63 + 1, 1.0)],
)
def test_a_difference_of_integers_does_not_overflow(dtype, a, b, distance):
    here, there = both(np.array([[a]], dtype), np.array([[b]], dtype))
    assert here.max_abs == there.max_abs == distance


def test_long_rows_of_integers_are_compared_exactly():
    rng = np.random.default_rng(0)
    r = rng.integers(-100, 100, (3, 20_000)).astype(np.int32)
    c = np.where(rng.random(r.shape) < 1e-3, r + 1, r)
    here, there = both(r, c)
    require_same_counts(here, there)
    assert here.mean_abs == there.mean_abs


def test_bfloat16_is_taken_as_float32():
    r, c = pair((30, 20), noise=1e-2)
    brain = tensor(c).to(torch.bfloat16)
    here = measure(DeviceAccumulator("x", np.float32), r, brain)
    there = measure(OutputAccumulator("x", np.float32), r, brain.float().numpy())
    require_same_counts(here, there)
    assert np.array_equal(host_array(brain), brain.float().numpy())


def test_floats_of_two_types_are_compared_in_the_wider():
    r, c = pair((30, 20), noise=1e-2)
    for one, other in ((r, c.astype(np.float16)), (r.astype(np.float16), c), (r, c.astype(np.float64))):
        here, there = both(one, other, atol=1e-3, rtol=1e-3)
        require_same_counts(here, there)


def test_integers_of_two_types_are_compared_on_the_host():
    here, there = both(np.array([[-1, 3]], np.int64), np.array([[1, 3]], np.int8))
    assert bits(here) == bits(there)


def test_an_output_without_a_batch_axis_is_one_sample_a_batch():
    accumulator = DeviceAccumulator("scale", np.float32, batch_axis=False)
    for first in (0, 4, 8):
        accumulator.add(np.float32(2.0), torch.tensor(2.5 if first == 4 else 2.0), first_sample=first)
    metrics = accumulator.metrics()
    assert (metrics.samples, metrics.elements) == (3, 3)
    assert (metrics.max_abs, metrics.max_abs_sample) == (0.5, 4)
    here, there = both(*pair((30, 20)), batch_axis=False)
    require_same_counts(here, there)
    assert here.samples == 1


def test_outputs_that_are_not_contiguous_writable_or_detached_give_the_same():
    r, c = pair((30, 24), noise=0.1)
    whole = measure(DeviceAccumulator("x", np.float32), r, tensor(c))
    frozen = np.asfortranarray(r)
    frozen.setflags(write=False)
    strided = torch.from_numpy(np.repeat(c, 2, axis=1).copy())[:, ::2].requires_grad_()
    assert bits(measure(DeviceAccumulator("x", np.float32), frozen, strided)) == bits(whole)
    assert bits(measure(DeviceAccumulator("x", np.float32), r.astype(">f4"), tensor(c))) == bits(whole)


def test_the_caller_keeps_its_arrays():
    r, c = pair((30, 24))
    r[3, 3] = np.nan
    there = tensor(c)
    before = r.copy(), there.clone()
    measure(DeviceAccumulator("x", np.float32, atol=1e-3, center=np.ones(24)), r, there)
    assert np.array_equal(r, before[0], equal_nan=True)
    assert torch.equal(there, before[1])


def test_without_histogram_and_agreement_they_are_left_out():
    here, there = both(*pair((8, 10)), histogram=False, topk=False)
    require_same_counts(here, there)
    assert here.quantiles == {}
    assert here.top1_agree is None


def test_many_samples_settle_on_the_way_and_keep_nothing_of_what_was_transferred():
    r, c = pair((10_000, 3))
    accumulator = DeviceAccumulator("x", np.float32)
    for start in range(0, len(r), 97):
        accumulator.add(r[start : start + 97], tensor(c[start : start + 97]), first_sample=start)
    assert accumulator._pending_samples < 5000
    for _, rows, _ in accumulator._pending:
        assert rows.largest.base.nbytes <= 8 * 8 * 97
    require_same_counts(accumulator.metrics(), measure(OutputAccumulator("x", np.float32), r, c))


def test_what_a_block_came_to_does_not_keep_the_block():
    sums = compare_on_device._folded(torch.ones((5, 4, 1000), dtype=torch.float64))
    assert sums.untyped_storage().nbytes() == 5 * 4 * 8
    assert (sums == 1000).all()


def test_a_batch_is_brought_back_in_one_transfer(monkeypatch):
    brought = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: brought.append(self.shape) or original(self))
    for name in ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "nonzero"):
        method = getattr(torch.Tensor, name)

        def watched(self, *args, name=name, method=method):
            if name != "numpy":
                raise AssertionError(f"{name} waits for the device")
            return method(self, *args)

        monkeypatch.setattr(torch.Tensor, name, watched)
    r, c = awkward(3, 20, 9000, np.float32)
    measure(DeviceAccumulator("x", np.float32, atol=1e-3, center=np.zeros(9000)), r, tensor(c))
    assert len(brought) == 1


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_nothing_compared_is_an_error(shape, dtype):
    with pytest.raises(MeasurementError, match="nothing was compared"):
        both(np.zeros(shape, dtype), np.zeros(shape, dtype))


def test_an_empty_batch_among_others_counts_nothing():
    r, c = pair((8, 10))
    accumulator = DeviceAccumulator("x", np.float32)
    accumulator.add(r[:0], tensor(c[:0]), first_sample=0)
    accumulator.add(r, tensor(c), first_sample=0)
    assert bits(accumulator.metrics()) == bits(measure(DeviceAccumulator("x", np.float32), r, tensor(c)))


def test_other_shapes_are_an_error():
    with pytest.raises(MeasurementError, match=r"the engine's shape is \[3, 4\], the reference's \[4, 3\]"):
        both(np.zeros((4, 3), np.float32), np.zeros((3, 4), np.float32))


def test_fewer_samples_than_the_reference_has_are_an_error():
    with pytest.raises(MeasurementError, match=r"the engine's shape is \[3, 4\], the reference's \[4, 4\]"):
        both(np.zeros((4, 4), np.float32), np.zeros((3, 4), np.float32))


def test_floats_are_not_compared_with_integers():
    with pytest.raises(MeasurementError, match="the engine's dtype is int32, expected float"):
        both(np.zeros((4, 3), np.float32), np.zeros((4, 3), np.int32))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_dtypes_without_a_comparison_are_refused(dtype):
    with pytest.raises(MeasurementError, match=f"{str(dtype).removeprefix('torch.')} cannot be compared"):
        DeviceAccumulator("x", np.float32).add(
            np.zeros((2, 2), np.float32), torch.zeros((2, 2), dtype=dtype), first_sample=0
        )


def test_a_scalar_needs_to_be_said_to_have_no_batch_axis():
    with pytest.raises(MeasurementError, match="batch_axis=False"):
        DeviceAccumulator("x", np.float32).add(np.float32(2.0), torch.tensor(2.0), first_sample=0)


def test_a_center_of_another_shape_is_an_error():
    with pytest.raises(MeasurementError, match=r"shape is \[4\], its centre's \[5\]"):
        both(*pair((3, 4)), center=np.zeros(5))


def test_what_is_no_tensor_is_refused():
    with pytest.raises(MeasurementError, match="'x' is a list, which cannot be compared"):
        DeviceAccumulator("x", np.float32).add(np.zeros((2, 2), np.float32), [[0.0, 0.0]], first_sample=0)
    with pytest.raises(MeasurementError, match="layout torch.sparse_coo"):
        DeviceAccumulator("x", np.float32).add(
            np.zeros((2, 2), np.float32), torch.zeros((2, 2)).to_sparse(), first_sample=0
        )


def test_a_failure_of_the_device_is_an_error_that_counts_nothing(monkeypatch):
    def fails(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore words")

    accumulator = DeviceAccumulator("x", np.float32)
    monkeypatch.setattr(torch, "isfinite", fails)
    r, c = pair((3, 4))
    with pytest.raises(
        MeasurementError, match="'x' cannot be compared on its device: CUDA out of memory.*GiB"
    ) as caught:
        accumulator.add(r, tensor(c), first_sample=0)
    assert "more words" not in str(caught.value)
    assert "as NumPy arrays" in str(caught.value)
    with pytest.raises(MeasurementError, match="nothing was compared"):
        accumulator.metrics()


def test_arrays_of_the_host_are_compared_by_numpy():
    r, c = pair((30, 24), noise=0.1)
    assert bits(measure(DeviceAccumulator("x", np.float32), r, c)) == bits(
        measure(OutputAccumulator("x", np.float32), r, c)
    )


class Buffer:
    """An object with a CUDA array interface alone."""

    def __init__(self, shape, typestr="<f4", *, owner=None, dtype=None, **interface):
        self.owner = owner
        self.dtype = dtype
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": typestr, "data": (0, False), "version": 3, "stream": None, **interface,
        }  # fmt: skip


def test_a_batch_is_large_with_enough_elements_and_no_tiny_samples():
    per_sample = LEAST_ELEMENTS_A_SAMPLE
    samples = LEAST_ELEMENTS // per_sample
    assert is_large((samples, per_sample))
    assert not is_large((samples - 1, per_sample))
    assert not is_large((2 * samples, per_sample - 1))
    assert not is_large((LEAST_ELEMENTS,))
    assert is_large((LEAST_ELEMENTS,), batch_axis=False)
    assert not is_large(())


def test_cuda_is_what_pytorch_finds(monkeypatch):
    for found in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        assert has_cuda() is found


@pytest.mark.parametrize("error", [ModuleNotFoundError, OSError])
def test_without_a_pytorch_that_loads_there_is_no_cuda(monkeypatch, error):
    original = builtins.__import__

    def without_torch(name, *args, **kwargs):
        if name == "torch":
            raise error("No module named 'torch'")
        return original(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(builtins, "__import__", without_torch)
    assert not has_cuda()


def test_an_output_is_described_without_its_memory():
    huge = described("x", Buffer((1 << 20, 1 << 20)))
    assert (huge.shape, huge.dtype) == ((1 << 20, 1 << 20), np.float32)
    brain = described("x", torch.ones((2, 3), dtype=torch.bfloat16))
    assert (brain.shape, brain.dtype) == ((2, 3), np.float32)
    array = np.ones((2, 3), np.int8)
    assert described("x", array) is array
    with pytest.raises(MeasurementError, match="output 'x' is a list"):
        described("x", [1.0])


def test_a_copy_on_the_host_stays_as_it_was():
    output = torch.ones((2, 3))
    copy = host_array(output)
    output.fill_(7)
    assert (copy == 1).all()


def test_tensors_of_inference_mode_are_compared():
    r, c = pair((30, 24), noise=0.1)
    with torch.inference_mode():
        floats, whole = tensor(c), tensor(np.arange(720, dtype=np.uint16).reshape(30, 24))
    assert bits(measure(DeviceAccumulator("x", np.float32), r, floats)) == bits(
        measure(DeviceAccumulator("x", np.float32), r, tensor(c))
    )
    same_bits = np.arange(720, dtype=np.uint16).reshape(30, 24)
    assert measure(DeviceAccumulator("x", np.uint16), same_bits, whole).max_abs == 0


@pytest.mark.parametrize(
    ("interface", "message"),
    [
        ({"mask": object()}, "has a mask"),
        ({"shape": None}, "malformed __cuda_array_interface__"),
        ({"data": ()}, "malformed __cuda_array_interface__"),
        ({"strides": (4, "x")}, "malformed __cuda_array_interface__"),
    ],
)
def test_a_malformed_interface_is_an_error(interface, message):
    buffer = Buffer((2, 2))
    buffer.__cuda_array_interface__ |= interface
    for call in (
        lambda: described("x", buffer),
        lambda: host_array(buffer),
        lambda: DeviceAccumulator("x", np.float32).add(np.zeros((2, 2), np.float32), buffer, first_sample=0),
    ):
        with pytest.raises(MeasurementError, match=message):
            call()


def test_an_interface_of_two_bytes_without_a_type_is_refused():
    with pytest.raises(MeasurementError, match=r"void16|\|V2|<V2"):
        DeviceAccumulator("x", np.float32).add(np.zeros((2, 2), np.float32), Buffer((2, 2), "<V2"), first_sample=0)


def test_shapes_of_an_interface_are_checked_before_its_memory_is_read():
    with pytest.raises(MeasurementError, match=r"the engine's shape is \[2, 3\]"):
        DeviceAccumulator("x", np.float32).add(np.zeros((2, 2), np.float32), Buffer((2, 3)), first_sample=0)
    assert host_array(Buffer((0, 3))).shape == (0, 3)


def on_gpu(values, **interface):
    """A NumPy array on the GPU, behind nothing but a CUDA array interface."""
    owner = tensor(values, "cuda")
    torch.cuda.synchronize()
    values = np.asarray(values)
    return Buffer(values.shape, values.dtype.str, owner=owner, data=(owner.data_ptr(), True), **interface)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(40, 10), (6, 20_011), (300, 1000)])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_a_gpu_gives_the_bits_of_the_cpu(dtype, shape, seed):
    r, c = awkward(seed, *shape, dtype)
    settings = {"atol": 1e-3, "rtol": 1e-3, "center": np.random.default_rng(seed).standard_normal(shape[1])}
    here = measure(DeviceAccumulator("x", dtype, **settings), r, tensor(c))
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            there = measure(DeviceAccumulator("x", dtype, **settings), r, tensor(c, "cuda"))
        finally:
            torch.use_deterministic_algorithms(False)
        assert bits(there) == bits(here)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*INTEGERS, np.bool_])
def test_integers_on_a_gpu_give_the_bits_of_the_cpu(dtype):
    rng = np.random.default_rng(0)
    r, c = (rng.integers(0, 2, (20, 9000)).astype(dtype) for _ in range(2))
    here = measure(DeviceAccumulator("x", dtype), r, tensor(c))
    assert bits(measure(DeviceAccumulator("x", dtype), r, on_gpu(c))) == bits(here)


@pytest.mark.gpu
@pytest.mark.parametrize("interface", [{}, {"stream": 1}, {"stream": 2}])
def test_an_object_with_a_cuda_array_interface_alone_is_compared(interface):
    r, c = pair((60, 500), noise=0.1)
    here = measure(DeviceAccumulator("x", np.float32), r, tensor(c))
    assert bits(measure(DeviceAccumulator("x", np.float32), r, on_gpu(c, **interface))) == bits(here)
    assert np.array_equal(host_array(on_gpu(c, **interface)), c)


@pytest.mark.gpu
def test_the_memory_of_an_interface_is_read_without_a_copy():
    buffer = on_gpu(np.zeros((4, 4), np.float32))
    output = compare_on_device._output_of("x", buffer)
    assert output.tensor().data_ptr() == buffer.owner.data_ptr()


@pytest.mark.gpu
def test_bfloat16_behind_an_interface_is_named_by_its_dtype():
    r, c = pair((60, 500), noise=0.1)
    brain = tensor(c, "cuda").to(torch.bfloat16)
    buffer = Buffer((60, 500), "<V2", owner=brain, dtype="bfloat16", data=(brain.data_ptr(), False))
    here = measure(DeviceAccumulator("x", np.float32), r, brain.cpu())
    assert bits(measure(DeviceAccumulator("x", np.float32), r, buffer)) == bits(here)


@pytest.mark.gpu
def test_a_producer_on_another_stream_is_waited_for():
    r, c = pair((60, 500), noise=0.1)
    here = measure(DeviceAccumulator("x", np.float32), r, tensor(c))
    source, target = tensor(c, "cuda"), torch.zeros((60, 500), device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        target.copy_(source)
    buffer = Buffer((60, 500), owner=(source, target), data=(target.data_ptr(), False), stream=stream.cuda_stream)
    assert bits(measure(DeviceAccumulator("x", np.float32), r, buffer)) == bits(here)


@pytest.mark.gpu
def test_memory_on_the_gpu_is_bounded_by_blocks():
    r, c = pair((64, 1 << 18), noise=0.1)
    there = tensor(c, "cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    measure(DeviceAccumulator("x", np.float32, atol=1e-3, center=np.zeros(1 << 18)), r, there)
    assert torch.cuda.max_memory_allocated() - before < r.nbytes + 256 * 2**20


@pytest.mark.gpu
def test_pytorch_finds_the_gpu_that_its_tests_run_on():
    assert has_cuda()
