"""Token logits against PyTorch and scikit-learn, and what must not be scored."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss

from gate.errors import DataError, MeasurementError, SpecError
from gate.metrics import tokens
from gate.metrics.tokens import KIND


def scored(output, targets, reference=None, batch=None, **options):
    metric = KIND.make(options, None)
    step = batch or max(1, len(output))
    for first in range(0, len(output), step):
        part = slice(first, first + step)
        ours = {"logits": output[part]}
        theirs = ours if reference is None else {"logits": reference[part]}
        metric.add(ours, reference=theirs, targets=list(targets[part]), first_sample=first)
    return metric.statistics()


def example(seed, samples=4, positions=5, vocabulary=7):
    rng = np.random.default_rng(seed)
    reference = rng.normal(size=(samples, positions, vocabulary)).astype(np.float32)
    output = reference + 0.3 * rng.normal(size=reference.shape).astype(np.float32)
    targets = rng.integers(0, vocabulary, (samples, positions))
    targets[rng.random(targets.shape) < 0.2] = -100
    targets[0, 0] = 1
    return output, targets, reference


@given(seed=st.integers(0, 200), samples=st.integers(1, 5), batch=st.integers(1, 5))
def test_values_are_pytorchs_in_any_batches(seed, samples, batch):
    output, targets, reference = example(seed, samples)
    values = scored(output, targets, reference, batch).values()
    ours, theirs = (torch.from_numpy(each).double().reshape(-1, 7) for each in (output, reference))
    wanted = torch.from_numpy(targets).reshape(-1)
    counted = wanted != -100
    likelihood = torch.nn.functional.cross_entropy(ours, wanted, ignore_index=-100)
    divergence = torch.nn.functional.kl_div(
        ours[counted].log_softmax(1), theirs[counted].log_softmax(1), log_target=True, reduction="batchmean"
    )
    best = ours.argmax(1)[counted]
    assert values["perplexity"] == pytest.approx(likelihood.exp().item(), rel=1e-12)
    assert values["kl_divergence"] == pytest.approx(divergence.item(), rel=1e-10)
    assert values["top1_agreement"] == pytest.approx((best == theirs.argmax(1)[counted]).double().mean().item())
    assert values["top1_accuracy"] == pytest.approx((best == wanted[counted]).double().mean().item())


def test_perplexity_is_scikit_learns_log_loss():
    output, targets, _ = example(1)
    counted = targets.ravel() != -100
    odds = np.exp(output.astype(np.float64)).reshape(-1, 7)[counted]
    expected = math.exp(log_loss(targets.ravel()[counted], odds / odds.sum(1, keepdims=True), labels=range(7)))
    assert scored(output, targets).values()["perplexity"] == pytest.approx(expected, rel=1e-9)


def test_small_blocks_change_nothing(monkeypatch):
    output, targets, reference = example(5)
    whole = scored(output, targets, reference).values()
    monkeypatch.setattr(tokens, "_BLOCK", 10)
    assert scored(output, targets, reference).values() == pytest.approx(whole, rel=1e-13)


def test_reference_against_itself_diverges_by_exactly_nothing():
    output, targets, _ = example(0)
    for reference in (None, output.copy()):
        values = scored(output, targets, reference).values()
        assert (values["kl_divergence"], values["top1_agreement"]) == (0.0, 1.0)


def test_agreement_looks_at_ties_from_both_sides():
    reference = np.asarray([[[1, 1, 0], [1, 1, 0], [1, 0, 0]]], np.float32)
    output = np.asarray([[[0, 1, 0], [0, 0, 1], [1, 1, 1]]], np.float32)
    values = scored(output, np.asarray([[1, 2, 0]]), reference).values()
    assert values["top1_agreement"] == pytest.approx(2 / 3)


def test_of_equal_logits_the_lower_token_is_the_answer():
    output = np.zeros((1, 2, 3), np.float32)
    assert scored(output, np.asarray([[0, 1]])).values()["top1_accuracy"] == 0.5


def test_large_logits_do_not_overflow():
    output = np.asarray([[[3e38, -3e38], [0.0, 0.0]]], np.float32)
    values = scored(output, np.asarray([[0, 1]])).values()
    assert values["perplexity"] == pytest.approx(math.sqrt(2))
    assert scored(output, np.asarray([[1, 1]])).values()["perplexity"] == math.inf


def test_logits_further_apart_than_float64_holds_are_an_error():
    with pytest.raises(MeasurementError, match="logits of sample 0 lie further apart"):
        scored(np.asarray([[[1e308, -1e308]]]), np.asarray([[1]]))


@given(
    seed=st.integers(0, 50), weights=st.lists(st.integers(0, 3), min_size=4, max_size=4).filter(lambda each: each[0])
)
def test_weights_are_the_same_as_repeating_samples(seed, weights):
    output, targets, reference = example(seed)
    chosen = np.repeat(np.arange(4), weights)
    repeated = scored(output[chosen], targets[chosen], reference[chosen]).values()
    assert scored(output, targets, reference).values(np.asarray(weights)) == pytest.approx(repeated, rel=1e-12)


def test_weights_of_one_change_nothing():
    statistics = scored(*example(0))
    assert statistics.samples == 4
    assert statistics.values(np.ones(4, np.int64)) == statistics.values()


def test_weights_of_zero_leave_every_value_undefined():
    assert all(math.isnan(each) for each in scored(*example(0)).values(np.zeros(4, np.int64)).values())


def test_sequence_of_ignored_positions_alone_counts_nothing():
    output, targets, _ = example(0)
    with_padding = targets.copy()
    with_padding[1] = 3
    with_padding[2] = -100
    kept = [0, 1, 3]
    whole, part = scored(output, with_padding), scored(output[kept], with_padding[kept])
    assert whole.values() == pytest.approx(part.values(), rel=1e-14)
    assert all(math.isnan(each) for each in whole.values(np.asarray([0, 0, 1, 0])).values())


def test_another_label_may_be_ignored():
    output, targets, reference = example(0)
    renamed = np.where(targets == -100, -1, targets)
    assert scored(output, renamed, reference, ignore_label=-1).values() == scored(output, targets, reference).values()


def test_arrays_give_back_the_statistics():
    statistics = scored(*example(3))
    weights = np.asarray([1, 2, 0, 1])
    assert KIND.read(statistics.to_arrays()).values(weights) == statistics.values(weights)


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays.pop("correct"),
        lambda arrays: arrays.update(more=np.zeros(1)),
        lambda arrays: arrays.update(correct=arrays["correct"][:-1]),
        lambda arrays: arrays.update(correct=arrays["positions"] + 1),
        lambda arrays: arrays.update(positions=arrays["positions"] * 0),
        lambda arrays: arrays.update(divergence=arrays["divergence"] * np.nan),
        lambda arrays: arrays.update(divergence=arrays["divergence"] - 9.0),
        lambda arrays: arrays.update({name: each[:0] for name, each in arrays.items()}),
    ],
)
def test_arrays_that_contradict_each_other_are_refused(change):
    arrays = scored(*example(0)).to_arrays()
    change(arrays)
    with pytest.raises(MeasurementError, match="statistics of tokens"):
        KIND.read(arrays)


def test_nothing_added_is_an_error():
    with pytest.raises(MeasurementError, match="no position was compared"):
        KIND.make({}, None).statistics()


def test_only_ignored_positions_are_an_error():
    with pytest.raises(MeasurementError, match="no position was compared"):
        scored(np.zeros((1, 2, 3), np.float32), np.full((1, 2), -100))


def test_empty_batch_is_an_error():
    outputs = {"logits": np.zeros((0, 2, 3), np.float32)}
    with pytest.raises(MeasurementError, match="the batch from sample 0 is empty"):
        KIND.make({}, None).add(outputs, reference=outputs, targets=[], first_sample=0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("who", ["model", "reference"])
def test_logits_that_are_not_finite_are_an_error(value, who):
    output, targets, reference = example(0)
    {"model": output, "reference": reference}[who][3, 1, 2] = value
    with pytest.raises(MeasurementError, match=f"the {who}'s output of sample 3 holds 1 of 35 values"):
        scored(output, targets, reference)


def test_batch_out_of_order_is_an_error():
    output, targets, _ = example(0)
    with pytest.raises(MeasurementError, match="expected the batch from sample 0, got that from 4"):
        KIND.make({}, None).add({"y": output}, reference={"y": output}, targets=targets, first_sample=4)


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ([np.zeros(5, int)] * 3, MeasurementError, "4 predictions for 3 targets"),
        ([], DataError, "the samples have none"),
        ([np.zeros(5, int)] * 3 + [None], DataError, "sample 3 has no target"),
        ([np.zeros(4, int)] * 4, MeasurementError, "output of sample 0 has 5 positions, its target 4"),
        ([np.zeros(5)] * 4, DataError, "expected tokens"),
        ([np.zeros((1, 5), int)] * 4, DataError, "expected tokens"),
        ([np.full(5, 7)] * 4, DataError, "token 7 at position 0; the vocabulary is 0 to 6"),
        ([np.full(5, -1)] * 4, DataError, r"token -1(.|\n)*ignore_label"),
    ],
)
def test_targets_that_do_not_fit_are_an_error(targets, error, message):
    output, _, _ = example(0)
    with pytest.raises(error, match=message):
        KIND.make({}, None).add({"y": output}, reference={"y": output}, targets=targets, first_sample=0)


@pytest.mark.parametrize(
    ("output", "reference", "message"),
    [
        (np.zeros((1, 2, 3), int), np.zeros((1, 2, 3)), "the model's output is int64"),
        (np.zeros((1, 2, 3)), np.zeros((1, 6)), "the reference's output is float64"),
        (np.zeros((1, 2, 1)), np.zeros((1, 2, 1)), "token logits are floats"),
        (np.zeros((1, 2, 3)), np.zeros((1, 2, 4)), r"are \[1, 2, 3\], the reference's \[1, 2, 4\]"),
    ],
)
def test_output_of_another_form_is_an_error(output, reference, message):
    with pytest.raises(MeasurementError, match=message):
        scored(output, np.zeros((1, 2), int), reference)


def test_reference_without_the_output_is_an_error():
    output, targets, _ = example(0)
    with pytest.raises(MeasurementError, match="the reference has no output 'y'; it has 'z'"):
        KIND.make({"output": "y"}, None).add({"y": output}, reference={"z": output}, targets=targets, first_sample=0)


def test_options_that_it_does_not_have_are_refused():
    with pytest.raises(SpecError, match="no option 'ignore_index'; did you mean 'ignore_label'"):
        KIND.make({"ignore_index": 1}, None)
