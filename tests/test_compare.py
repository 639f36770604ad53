"""The accumulator against plain float64 arithmetic, and its bits against every way to split the same samples."""

import itertools
import math
from decimal import Context, Decimal, localcontext

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gate.compare import OutputAccumulator, kind_of
from gate.errors import MeasurementError


def measure(reference, candidate, *, first_sample=0, **settings):
    accumulator = OutputAccumulator("scores", np.asarray(reference).dtype, **settings)
    accumulator.add(reference, candidate, first_sample=first_sample)
    return accumulator.metrics()


def pair(shape, *, noise=1e-3, scale=1.0, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    reference = (rng.standard_normal(shape) * scale).astype(dtype)
    candidate = (reference + rng.standard_normal(shape) * noise * scale).astype(dtype)
    return reference, candidate


def bits(metrics):
    return msgspec.json.encode(msgspec.structs.asdict(metrics)), repr(metrics)


def cosine_distances(r, c):
    """By the definition, in as many digits as it takes."""
    found = []
    with localcontext(Context(prec=60)):
        for a, b in zip(r.tolist(), c.tolist(), strict=True):
            pairs = [(Decimal(x), Decimal(y)) for x, y in zip(a, b, strict=True)]
            product = sum(x * x for x, _ in pairs).sqrt() * sum(y * y for _, y in pairs).sqrt()
            found.append(float(1 - sum(x * y for x, y in pairs) / product))
    return np.array(found)


def require_plain(metrics, r, c, *, rel=2e-6):
    """Every metric equals its definition in float64."""
    r, c = r.astype(np.float64).reshape(len(r), -1), c.astype(np.float64).reshape(len(c), -1)
    d = c - r
    assert metrics.elements == r.size
    assert metrics.samples == len(r)
    assert metrics.max_abs == pytest.approx(np.abs(d).max(), rel=rel)
    assert metrics.mean_abs == pytest.approx(np.abs(d).mean(), rel=rel)
    assert metrics.rms_reference == pytest.approx(math.sqrt((r**2).mean()), rel=rel)
    relative = math.sqrt((d**2).sum()) / math.sqrt((r**2).sum())
    assert metrics.rel_rmse == pytest.approx(relative, rel=rel)
    assert metrics.sqnr_db == pytest.approx(-20 * math.log10(relative), abs=1e-4)
    errors = np.sqrt((d**2).sum(axis=1) / (r**2).sum(axis=1))
    assert [error for _, error in metrics.worst_samples] == pytest.approx(sorted(errors, reverse=True)[:5], rel=rel)
    for index, error in metrics.worst_samples:
        assert errors[index] == pytest.approx(error, rel=rel)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (40, 10), (7, 3, 5, 2), (300, 1000), (2, 20_011), (1, 8193)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_metrics_are_their_definitions(shape, dtype):
    r, c = pair(shape, noise=1e-2, dtype=dtype)
    metrics = measure(r, c)
    require_plain(metrics, r, c)
    flat_r, flat_c = r.reshape(len(r), -1).astype(np.float64), c.reshape(len(r), -1).astype(np.float64)
    d = np.abs(flat_c - flat_r)
    assert d[metrics.max_abs_sample, metrics.max_abs_element] == pytest.approx(d.max(), rel=1e-6)
    assert metrics.mismatch_fraction == np.count_nonzero(d) / d.size


@pytest.mark.parametrize("scale", [1e38, 1e30, 1e-18, 1e-30, 1e-36])
@pytest.mark.parametrize("noise", [1e-2, 1e-6, 0.9])
def test_values_whose_squares_leave_float32_are_measured_right(scale, noise):
    r, c = pair((6, 40), noise=noise, scale=scale / 5)
    metrics = measure(r, c)
    require_plain(metrics, r, c)
    assert metrics.cosine_distance == pytest.approx(cosine_distances(r, c).max(), rel=1e-3)


def test_a_difference_above_float32_is_measured():
    metrics = measure(np.array([[3e38, 1.0]], np.float32), np.array([[-3e38, 1.0]], np.float32))
    assert metrics.max_abs == pytest.approx(6e38)
    assert metrics.rel_rmse == pytest.approx(2.0)
    assert metrics.cosine_distance == pytest.approx(2.0)


def test_rows_out_of_reach_and_rows_within_are_measured_together():
    r, c = pair((50, 20), noise=1e-2)
    r[::7] *= 1e-30
    c[::7] *= 1e-30
    r[3], c[3] = 0.0, 0.0
    c[4] = 0.0
    metrics = measure(r, c, atol=1e-2, rtol=0.0)
    d = np.abs(c.astype(np.float64) - r)
    assert metrics.mean_abs == pytest.approx(d.mean(), rel=1e-6)
    assert metrics.allclose_fraction == np.count_nonzero(d <= np.float32(1e-2)) / d.size
    assert metrics.mismatch_fraction == np.count_nonzero(d) / d.size
    assert metrics.cosine_distance == 1.0


@pytest.mark.parametrize("noise", [1e-7, 1e-5, 1e-3, 0.1, 0.5, 3.0])
def test_cosine_distance_is_accurate_near_zero_and_far(noise):
    r, c = pair((20, 64), noise=noise)
    expected = cosine_distances(r, c)
    metrics = measure(r, c)
    assert metrics.cosine_distance == pytest.approx(expected.max(), rel=1e-4)
    assert metrics.mean_cosine_distance == pytest.approx(expected.mean(), rel=1e-4)


@pytest.mark.parametrize("factor", [0.1, 0.5, 2.0, 1000.0])
def test_a_scaled_output_has_no_cosine_distance(factor):
    r, _ = pair((20, 64))
    metrics = measure(r, (r * np.float32(factor)))
    assert metrics.cosine_distance < 1e-7
    assert metrics.rel_rmse == pytest.approx(abs(factor - 1), rel=1e-5)


def test_zero_vectors():
    zero, one = np.zeros((2, 4), np.float32), np.ones((2, 4), np.float32)
    assert measure(zero, zero).cosine_distance == 0.0
    assert measure(zero, zero).rel_rmse == 0.0
    assert measure(zero, zero).sqnr_db == math.inf
    assert measure(zero, one).cosine_distance == 1.0
    assert measure(zero, one).rel_rmse == math.inf
    assert measure(zero, one).sqnr_db == -math.inf
    assert measure(one, zero).cosine_distance == 1.0
    assert measure(one, -one).cosine_distance == pytest.approx(2.0)


@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_centered_cosine_sees_through_a_common_offset(offset):
    rng = np.random.default_rng(1)
    r = (rng.standard_normal((30, 10)) + offset).astype(np.float32)
    c = (rng.standard_normal((30, 10)) + offset).astype(np.float32)
    center = r.mean(axis=0, dtype=np.float64)
    metrics = measure(r, c, center=center)
    assert metrics.centered_cosine_distance == pytest.approx(cosine_distances(r - center, c - center).max(), rel=1e-3)
    if offset:
        assert metrics.cosine_distance < 2e-3
        assert metrics.centered_cosine_distance > 0.5


def test_centered_cosine_of_small_noise_is_accurate():
    r, c = pair((30, 10), noise=1e-3)
    center = r.mean(axis=0, dtype=np.float64)
    expected = cosine_distances(r - center, c - center).max()
    assert measure(r, c, center=center).centered_cosine_distance == pytest.approx(expected, rel=1e-3)


def test_centered_cosine_of_a_constant_answer_is_one():
    r, _ = pair((30, 10))
    center = r.mean(axis=0, dtype=np.float64)
    c = np.broadcast_to(center, r.shape).astype(np.float32)
    assert measure(r, c, center=center).centered_cosine_distance > 0.3


def test_without_a_center_there_is_no_centered_cosine():
    assert measure(*pair((3, 4))).centered_cosine_distance is None


def test_a_center_of_another_shape_is_an_error():
    with pytest.raises(MeasurementError, match=r"shape is \[4\], its centre's \[5\]"):
        measure(*pair((3, 4)), center=np.zeros(5))


def test_quantiles_are_within_their_bins():
    r, c = pair((200, 500), noise=0.1)
    d = np.abs(c - r).ravel()
    d.sort()
    found = measure(r, c).quantiles
    assert list(found) == ["p50", "p90", "p99", "p99_9"]
    for (_, value), q in zip(found.items(), (0.5, 0.9, 0.99, 0.999), strict=True):
        assert value == pytest.approx(d[math.ceil(q * d.size) - 1], rel=0.0313)


def test_quantiles_of_equal_outputs_are_zero():
    r, _ = pair((5, 5))
    metrics = measure(r, r)
    assert set(metrics.quantiles.values()) == {0.0}
    assert metrics.max_abs == metrics.rel_rmse == metrics.cosine_distance == metrics.mismatch_fraction == 0.0
    assert metrics.worst_samples == ()
    assert metrics.top1_agree == 5


def test_allclose_counts_what_numpy_counts():
    r, c = pair((100, 100), noise=1e-2)
    metrics = measure(r, c, atol=5e-3, rtol=5e-3)
    assert metrics.allclose_fraction == pytest.approx(np.isclose(c, r, atol=5e-3, rtol=5e-3).mean(), abs=1e-4)
    assert (metrics.allclose_atol, metrics.allclose_rtol) == (5e-3, 5e-3)


def test_allclose_without_a_tolerance_is_nan():
    metrics = measure(*pair((4, 4)))
    assert math.isnan(metrics.allclose_fraction)
    assert math.isnan(metrics.allclose_atol)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["reference", "candidate", "both"])
@pytest.mark.parametrize("shape", [(20, 10), (2, 9000)])
def test_what_is_not_finite_is_counted_and_makes_every_number_nan(value, side, shape):
    r, c = pair(shape)
    center = r.mean(axis=0, dtype=np.float64)
    if side in ("reference", "both"):
        r[1, 7] = value
    if side in ("candidate", "both"):
        c[1, 7] = value
    metrics = measure(r, c, atol=1.0, rtol=1.0, center=center)
    assert metrics.nonfinite_reference == (side != "candidate")
    assert metrics.nonfinite_candidate == (side != "reference")
    assert metrics.max_abs == math.inf
    assert (metrics.max_abs_sample, metrics.max_abs_element) == (1, 7)
    numbers = [
        getattr(metrics, name)
        for name in (
            "mean_abs", "rms_reference", "rel_rmse", "sqnr_db", "cosine_distance", "mean_cosine_distance",
            "centered_cosine_distance", "allclose_fraction", "mismatch_fraction",
        )
    ]  # fmt: skip
    assert all(math.isnan(each) for each in numbers)
    assert all(math.isnan(each) for each in metrics.quantiles.values())
    assert metrics.worst_samples[0] == (1, math.inf)
    assert metrics.top1_agree == shape[0] - 1


def test_top1_and_top5_agreement_are_counted():
    rng = np.random.default_rng(3)
    r = rng.standard_normal((400, 12)).astype(np.float32)
    c = (r + rng.standard_normal(r.shape)).astype(np.float32)
    best = r.argmax(axis=1)
    metrics = measure(r, c)
    assert metrics.top1_agree == np.count_nonzero(best == c.argmax(axis=1))
    top5 = np.argsort(-c, axis=1, kind="stable")[:, :5]
    assert metrics.top5_agree == np.count_nonzero((top5 == best[:, None]).any(axis=1))
    assert metrics.topk_samples == 400


def test_a_constant_answer_does_not_agree_by_ties():
    r = np.eye(10, dtype=np.float32)
    metrics = measure(r, np.zeros_like(r))
    assert metrics.top1_agree == 1
    assert metrics.top5_agree == 5


def test_near_ties_are_told_apart():
    r = np.array([[1.0, 0.999, 0.0], [5.0, 0.0, 0.0]], np.float32)
    c = np.array([[0.999, 1.0, 0.0], [0.0, 1.0, 0.0]], np.float32)
    metrics = measure(r, c)
    assert metrics.top1_agree == 0
    assert metrics.top1_near_ties == 2
    c[1] = [1.0, 1.5, 0.0]
    assert measure(r, c).top1_near_ties == 2
    r[1] = [9.0, 0.0, 0.0]
    c[1] = [4.6, 4.7, 0.0]
    assert measure(r, c).top1_near_ties == 2
    assert measure(r[1:], r[1:]).top1_near_ties == 0


def test_top5_of_five_classes_says_nothing():
    metrics = measure(*pair((8, 5)))
    assert metrics.top1_agree is not None
    assert metrics.top5_agree is None


@pytest.mark.parametrize("shape", [(8, 1), (8, 3, 4), (8,)])
def test_only_rows_of_classes_have_agreement(shape):
    assert measure(*pair(shape)).top1_agree is None


def test_integers_are_compared_exactly():
    r = np.arange(40, dtype=np.int64).reshape(4, 10)
    c = r.copy()
    c[2, 3] += 5
    c[2, 4] -= 2
    metrics = measure(r, c)
    assert metrics.kind == "exact"
    assert metrics.mismatch_fraction == 2 / 40
    assert metrics.allclose_fraction == 38 / 40
    assert (metrics.max_abs, metrics.max_abs_sample, metrics.max_abs_element) == (5.0, 2, 3)
    assert metrics.mean_abs == 7 / 40
    assert metrics.worst_samples == ((2, 0.2),)
    assert metrics.cosine_distance is None
    assert metrics.sqnr_db is None
    assert metrics.top1_agree is None
    assert metrics.quantiles == {}


@pytest.mark.parametrize(
    ("dtype", "a", "b", "distance"),
    [
        (np.int64, -(2**63), 2**63 - 1, 2.0**64),
        (np.int64, 2**62, 2**62 + 1, 1.0),
        (np.uint8, 3, 250, 247.0),
        (np.int8, -128, 127, 255.0),
        (np.bool_, True, False, 1.0),
    ],
)
def test_a_difference_of_integers_does_not_overflow(dtype, a, b, distance):
    metrics = measure(np.array([[a]], dtype), np.array([[b]], dtype))
    assert metrics.max_abs == distance
    assert metrics.mismatch_fraction == 1.0


def test_an_output_without_a_batch_axis_is_one_sample_a_batch():
    accumulator = OutputAccumulator("scale", np.float32, batch_axis=False)
    for first in (0, 4, 8):
        accumulator.add(np.float32(2.0), np.float32(2.5 if first == 4 else 2.0), first_sample=first)
    metrics = accumulator.metrics()
    assert (metrics.samples, metrics.elements) == (3, 3)
    assert (metrics.max_abs, metrics.max_abs_sample) == (0.5, 4)


def test_a_scalar_needs_to_be_said_to_have_no_batch_axis():
    with pytest.raises(MeasurementError, match="batch_axis=False"):
        measure(np.float32(2.0), np.float32(2.0))


def test_samples_may_differ_in_shape():
    accumulator = OutputAccumulator("boxes", np.float32)
    accumulator.add(*pair((2, 3, 4), seed=1), first_sample=0)
    accumulator.add(np.zeros((1, 0, 4), np.float32), np.zeros((1, 0, 4), np.float32), first_sample=2)
    accumulator.add(*pair((1, 9, 4), seed=2), first_sample=3)
    metrics = accumulator.metrics()
    assert metrics.samples == 4
    assert metrics.elements == 24 + 36


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_nothing_compared_is_an_error(shape, dtype):
    with pytest.raises(MeasurementError, match="nothing was compared"):
        measure(np.zeros(shape, dtype), np.zeros(shape, dtype))


def test_other_shapes_are_an_error():
    with pytest.raises(MeasurementError, match=r"the engine's shape is \[3, 4\], the reference's \[4, 3\]"):
        measure(np.zeros((4, 3), np.float32), np.zeros((3, 4), np.float32))


def test_floats_are_not_compared_with_integers():
    with pytest.raises(MeasurementError, match="the engine's dtype is int32, expected float"):
        measure(np.zeros((4, 3), np.float32), np.zeros((4, 3), np.int32))


def test_complex_outputs_are_refused():
    with pytest.raises(MeasurementError, match="complex64 cannot be compared"):
        kind_of(np.complex64)


def test_accumulators_of_other_settings_do_not_merge():
    one = OutputAccumulator("a", np.float32)
    for other in (
        OutputAccumulator("b", np.float32),
        OutputAccumulator("a", np.int32),
        OutputAccumulator("a", np.float32, atol=1.0),
        OutputAccumulator("a", np.float32, center=np.zeros(3)),
        OutputAccumulator("a", np.float32, histogram=False),
    ):
        with pytest.raises(MeasurementError, match="other settings"):
            one.merge(other)


def test_outputs_that_are_not_contiguous_give_the_same():
    r, c = pair((30, 24))
    whole = measure(r, c)
    strided = measure(np.asfortranarray(r), np.repeat(c, 2, axis=1)[:, ::2])
    assert bits(strided) == bits(whole)


def test_the_caller_keeps_its_arrays():
    r, c = pair((30, 24))
    r[0] *= 1e-30
    before = r.copy(), c.copy()
    measure(r, c, atol=1e-3, rtol=1e-3, center=r.mean(axis=0))
    assert np.array_equal(r, before[0])
    assert np.array_equal(c, before[1])


def _awkward(seed, n, size, dtype):
    """Samples of every kind that takes its own way through the code."""
    r, c = pair((n, size), noise=10.0 ** -(seed % 6), seed=seed, dtype=dtype)
    rng = np.random.default_rng(seed)
    for row in range(n):
        match int(rng.integers(8)):
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
            case 5 if row % 5 == 0 and seed % 3 == 0:
                c[row, int(rng.integers(size))] = np.nan
    return r, c


@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 40),
    size=st.sampled_from([1, 2, 5, 7, 33, 100]),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    data=st.data(),
)
def test_any_split_any_order_and_any_merge_give_the_same_bits(seed, n, size, dtype, data):
    r, c = _awkward(seed, n, size, dtype)
    center = np.random.default_rng(seed).standard_normal(size)
    settings = {"atol": 1e-3, "rtol": 1e-3, "center": center}
    whole = OutputAccumulator("x", dtype, **settings)
    whole.add(r, c, first_sample=0)
    cuts = sorted(data.draw(st.sets(st.integers(0, n), max_size=6)) | {0, n})
    parts = data.draw(st.permutations(list(itertools.pairwise(cuts))))
    shards = [OutputAccumulator("x", dtype, **settings) for _ in range(3)]
    for start, stop in parts:
        shard = data.draw(st.sampled_from(shards))
        shard.add(r[start:stop], c[start:stop], first_sample=start)
        if data.draw(st.booleans()) and shard._samples and shard._elements:
            shard.metrics()
    first, *others = data.draw(st.permutations(shards))
    for other in others:
        first.merge(other)
    assert bits(first.metrics()) == bits(whole.metrics())


@given(seed=st.integers(0, 100), cut=st.integers(0, 5))
def test_samples_longer_than_a_segment_split_into_the_same_bits(seed, cut):
    r, c = _awkward(seed, 5, 20_000, np.float32)
    one, other = OutputAccumulator("scores", np.float32), OutputAccumulator("scores", np.float32)
    one.add(r[cut:], c[cut:], first_sample=cut)
    other.add(r[:cut], c[:cut], first_sample=0)
    one.merge(other)
    assert bits(one.metrics()) == bits(measure(r, c))


@given(seed=st.integers(0, 100), cut=st.integers(0, 30))
def test_integers_split_into_the_same_bits(seed, cut):
    rng = np.random.default_rng(seed)
    r = rng.integers(-(2**62), 2**62, (30, 4))
    c = np.where(rng.random(r.shape) < 0.1, r + 3, r)
    whole, one, other = (OutputAccumulator("x", np.int64) for _ in range(3))
    whole.add(r, c, first_sample=0)
    one.add(r[cut:], c[cut:], first_sample=cut)
    other.add(r[:cut], c[:cut], first_sample=0)
    other.merge(one)
    assert bits(other.metrics()) == bits(whole.metrics())


def test_many_samples_settle_on_the_way():
    r, c = pair((10_000, 3))
    accumulator = OutputAccumulator("scores", np.float32)
    for start in range(0, len(r), 97):
        accumulator.add(r[start : start + 97], c[start : start + 97], first_sample=start)
    assert accumulator._pending_samples < 5000
    assert bits(accumulator.metrics()) == bits(measure(r, c))


def test_equal_errors_are_listed_by_index():
    r = np.ones((9, 4), np.float32)
    c = r.copy()
    c[[8, 2, 5, 0, 7, 3]] = 2.0
    metrics = measure(r, c)
    assert metrics.worst_samples == tuple((index, 1.0) for index in (0, 2, 3, 5, 7))
    assert (metrics.max_abs_sample, metrics.max_abs_element) == (0, 0)


@pytest.mark.parametrize("size", [1, 10, 1000, 9000])
def test_numpy_before_2_gives_the_same_numbers_and_splits_into_the_same_bits(monkeypatch, size):
    r, c = pair((60, size), noise=1e-2)
    now = measure(r, c)
    monkeypatch.setattr("gate.compare._vecdot", None)
    whole = measure(r, c)
    assert whole.rel_rmse == pytest.approx(now.rel_rmse, rel=1e-6)
    assert whole.cosine_distance == pytest.approx(now.cosine_distance, rel=1e-5)
    accumulator = OutputAccumulator("scores", np.float32)
    for start, stop in ((40, 60), (0, 1), (1, 40)):
        accumulator.add(r[start:stop], c[start:stop], first_sample=start)
    assert bits(accumulator.metrics()) == bits(whole)
