"""Embeddings against scikit-learn, and what must not be scored."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics.pairwise import cosine_similarity

from gate.errors import DataError, MeasurementError, SpecError
from gate.metrics import embedding
from gate.metrics.embedding import KIND, EmbeddingStatistics


def scored(output, identities, reference=None, batch=None, **options):
    metric = KIND.make(options, None)
    step = batch or max(1, len(output))
    for first in range(0, len(output), step):
        part = slice(first, first + step)
        ours = {"e": output[part]}
        theirs = ours if reference is None else {"e": reference[part]}
        metric.add(ours, reference=theirs, targets=list(identities[part]), first_sample=first)
    return metric.statistics()


def example(seed, samples=24, size=6, identities=8):
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, identities, samples)
    centres = rng.normal(size=(identities, size))
    reference = (centres[chosen] + 0.7 * rng.normal(size=(samples, size))).astype(np.float32)
    return reference + 0.2 * rng.normal(size=reference.shape).astype(np.float32), chosen, reference


def recall(output, identities, k):
    """By its definition, from scikit-learn's cosines, one query at a time."""
    cosines = cosine_similarity(output.astype(np.float64))
    hits = []
    for query in range(len(output)):
        others = [each for each in range(len(output)) if each != query]
        if not any(identities[each] == identities[query] for each in others):
            continue
        # Of equal cosines (rounded, so that rounding does not part them) another identity first.
        order = sorted(
            others, key=lambda each: (-round(cosines[query, each], 9), identities[each] == identities[query])
        )
        hits.append(any(identities[each] == identities[query] for each in order[:k]))
    return np.mean(hits) if hits else math.nan


@given(seed=st.integers(0, 100), samples=st.integers(13, 30), batch=st.integers(1, 30))
def test_values_are_their_definitions_in_any_batches(seed, samples, batch):
    output, identities, reference = example(seed, samples)
    values = scored(output, identities, reference, batch, recall_at=[1, 5, 10]).values()
    cosines = np.diag(cosine_similarity(output.astype(np.float64), reference.astype(np.float64)))
    assert values["mean_cosine_to_reference"] == pytest.approx(cosines.mean(), abs=1e-12)
    assert values["worst_cosine_to_reference"] == pytest.approx(cosines.min(), abs=1e-12)
    for k in (1, 5, 10):
        assert values[f"recall_at_{k}"] == pytest.approx(recall(output, identities, k), nan_ok=True)


def test_small_blocks_change_nothing(monkeypatch):
    output, identities, reference = example(5)
    whole = scored(output, identities, reference)
    monkeypatch.setattr(embedding, "_BLOCK", 50)
    blocks = scored(output, identities, reference)
    assert np.array_equal(whole.nearer, blocks.nearer)


def test_reference_against_itself_is_exactly_one():
    output, identities, _ = example(0)
    for reference in (None, output.copy()):
        values = scored(output, identities, reference).values()
        assert values["mean_cosine_to_reference"] == values["worst_cosine_to_reference"] == 1.0


@pytest.mark.parametrize("value", [1.0, 0.1, -3.7])
def test_equal_embeddings_find_nothing(value):
    output = np.full((20, 7), value, np.float32) * np.linspace(0.5, 3.0, 20, dtype=np.float32)[:, None]
    values = scored(output, np.arange(20) // 4).values()
    assert values["recall_at_1"] == values["recall_at_5"] == 0.0


def test_identity_that_occurs_once_is_not_counted():
    output = np.asarray([[1, 0], [1, 0.1], [0, 1], [-1, 0]], np.float32)
    assert scored(output, [7, 7, 1, 2]).values()["recall_at_1"] == 1.0
    assert list(scored(output, [7, 7, 1, 2]).nearer) == [0, 0, -1, -1]


def test_recall_without_any_pair_is_undefined():
    output, _, _ = example(0)
    assert math.isnan(scored(output, np.arange(len(output))).values()["recall_at_1"])


def test_recall_among_fewer_than_would_tell_is_undefined():
    output, _, _ = example(0, samples=6)
    values = scored(output, [0, 0, 1, 1, 2, 2]).values()
    assert math.isnan(values["recall_at_5"])
    assert not math.isnan(values["recall_at_1"])


@given(seed=st.integers(0, 50), weights=st.lists(st.integers(0, 3), min_size=12, max_size=12).filter(any))
def test_weights_are_the_same_as_repeating_queries(seed, weights):
    statistics = scored(*example(seed, samples=12, identities=4))
    chosen = np.repeat(np.arange(12), weights)
    repeated = EmbeddingStatistics(
        statistics.cosines[chosen], statistics.nearer[chosen], statistics.gallery, statistics.recall_at
    )
    assert statistics.values(np.asarray(weights)) == pytest.approx(repeated.values(), abs=1e-12, nan_ok=True)


def test_worst_cosine_is_of_samples_that_are_drawn():
    output, identities, reference = example(0)
    statistics = scored(output, identities, reference)
    weights = np.ones(len(output), np.int64)
    weights[statistics.cosines.argmin()] = 0
    assert statistics.values(weights)["worst_cosine_to_reference"] == np.sort(statistics.cosines)[1]


def test_weights_of_one_change_nothing():
    statistics = scored(*example(0))
    assert statistics.samples == 24
    assert statistics.values(np.ones(24, np.int64)) == statistics.values()


def test_weights_of_zero_leave_every_value_undefined():
    assert all(math.isnan(each) for each in scored(*example(0)).values(np.zeros(24, np.int64)).values())


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_length_of_an_embedding_does_not_matter(scale):
    output, identities, reference = example(0)
    scaled = scored(output.astype(np.float64) * scale, identities, reference).values()
    assert scaled == pytest.approx(scored(output, identities, reference).values(), abs=1e-12)


def test_arrays_give_back_the_statistics():
    statistics = scored(*example(3), recall_at=[10])
    weights = np.random.default_rng(0).integers(0, 3, 24)
    assert KIND.read(statistics.to_arrays()).values(weights) == statistics.values(weights)
    assert "recall_at_10" in statistics.values()


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays.pop("cosines"),
        lambda arrays: arrays.update(more=np.zeros(1)),
        lambda arrays: arrays.update(nearer=arrays["nearer"][:-1]),
        lambda arrays: arrays.update(nearer=arrays["nearer"] + 24),
        lambda arrays: arrays.update(gallery=np.asarray([4])),
        lambda arrays: arrays.update(cosines=arrays["cosines"] * np.nan),
        lambda arrays: arrays.update(cosines=arrays["cosines"] + 2.0),
        lambda arrays: arrays.update(recall_at=np.asarray([5])),
        lambda arrays: arrays.update(cosines=arrays["cosines"][:0], nearer=arrays["nearer"][:0]),
    ],
)
def test_arrays_that_contradict_each_other_are_refused(change):
    arrays = scored(*example(0)).to_arrays()
    change(arrays)
    with pytest.raises(MeasurementError, match="statistics of embedding"):
        KIND.read(arrays)


def test_nothing_added_is_an_error():
    with pytest.raises(MeasurementError, match="there are no samples"):
        KIND.make({}, None).statistics()


def test_empty_batch_is_an_error():
    outputs = {"e": np.zeros((0, 2), np.float32)}
    with pytest.raises(MeasurementError, match="the batch from sample 0 is empty"):
        KIND.make({}, None).add(outputs, reference=outputs, targets=[], first_sample=0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("who", ["model", "reference"])
def test_embedding_that_is_not_finite_is_an_error(value, who):
    output, identities, reference = example(0)
    {"model": output, "reference": reference}[who][3, 1] = value
    with pytest.raises(MeasurementError, match=f"the {who}'s output of sample 3 holds 1 of 6 values"):
        scored(output, identities, reference)


@pytest.mark.parametrize("who", ["model", "reference"])
def test_embedding_of_length_zero_is_an_error(who):
    output, identities, reference = example(0)
    {"model": output, "reference": reference}[who][5] = 0.0
    with pytest.raises(MeasurementError, match=f"the {who}'s embedding of sample 5 is zero"):
        scored(output, identities, reference, batch=4)


def test_batch_out_of_order_is_an_error():
    output, identities, _ = example(0)
    with pytest.raises(MeasurementError, match="expected the batch from sample 0, got that from 1"):
        KIND.make({}, None).add({"e": output}, reference={"e": output}, targets=identities, first_sample=1)


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ([1] * 23, MeasurementError, "24 predictions for 23 targets"),
        ([], DataError, "the samples have none"),
        ([1] * 23 + [None], DataError, "sample 23 has no target"),
        ([1.0] * 24, DataError, "target of sample 0 is 1.0; expected an identity"),
        ([True] * 24, DataError, "expected an identity"),
        ([[1, 2]] * 24, DataError, "expected an identity"),
    ],
)
def test_targets_that_do_not_fit_are_an_error(targets, error, message):
    output, _, _ = example(0)
    with pytest.raises(error, match=message):
        KIND.make({}, None).add({"e": output}, reference={"e": output}, targets=targets, first_sample=0)


@pytest.mark.parametrize(
    ("output", "reference", "message"),
    [
        (np.ones((2, 3), int), np.ones((2, 3)), "embeddings are floats"),
        (np.ones((2, 3, 1)), np.ones((2, 3, 1)), "embeddings are floats"),
        (np.ones((2, 0)), np.ones((2, 0)), "embeddings are floats"),
        (np.ones((2, 3)), np.ones((2, 4)), r"are \[2, 3\], the reference's \[2, 4\]"),
    ],
)
def test_output_of_another_form_is_an_error(output, reference, message):
    with pytest.raises(MeasurementError, match=message):
        scored(output, [0, 0], reference)


def test_size_of_embeddings_may_not_change():
    metric = KIND.make({}, None)
    for first, size in ((0, 3), (1, 4)):
        outputs = {"e": np.ones((1, size), np.float32)}
        if first == 0:
            metric.add(outputs, reference=outputs, targets=[0], first_sample=0)
            continue
        with pytest.raises(MeasurementError, match=r"embeddings are \[4\], those before were \[3\]"):
            metric.add(outputs, reference=outputs, targets=[0], first_sample=1)


@pytest.mark.parametrize("given", [[0], [1.5], "1", 3, [True]])
def test_recalls_are_at_whole_numbers(given):
    with pytest.raises(SpecError, match="whole numbers from 1"):
        KIND.make({"recall_at": given}, None)


def test_options_that_it_does_not_have_are_refused():
    with pytest.raises(SpecError, match="no option 'recal_at'; did you mean 'recall_at'"):
        KIND.make({"recal_at": [1]}, None)
