"""Answers against labels, and the findings on their drop."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gate.errors import BaselineError, DataError, MeasurementError, SpecError
from gate.metrics.classification import (
    ClassificationAccumulator,
    baseline_task_finding,
    correct_from_hex,
    reference_accuracy,
    stated_metrics,
    task_findings,
)
from gate.spec import spec_from_text
from gate.statistics import agresti_min_difference, clopper_pearson
from gate.verdict import Evidence, Limit, Status

SPEC = """schema = 1
[model]
id = "m"
onnx = "m.onnx"
[inputs.x]
dtype = "float32"
shape = [1, 4]
[data]
source = "data.npz"
samples = 10
calibration = "more.npz"
[task]
kind = "classification"
[[engine]]
name = "e"
backend = "onnxruntime"
precision = "{precision}"
[engine.task]
{task}
"""


def counted(reference, candidate, labels, batch=None):
    accumulator = ClassificationAccumulator()
    step = batch or max(1, len(labels))
    for start in range(0, len(labels), step):
        part = slice(start, start + step)
        accumulator.add(reference[part], candidate[part], labels[part], first_sample=start)
    return accumulator.metrics()


def answers(right, classes=10):
    """Scores that have label 0 first where `right`, and last where not."""
    scores = np.zeros((len(right), classes), np.float32)
    scores[:, 0] = np.where(right, 1.0, -1.0)
    return scores


def outcome(n, *, b=0, c=0, both_wrong=0):
    """Metrics of n samples, b newly wrong and c newly right."""
    reference, candidate = np.ones(n, bool), np.ones(n, bool)
    candidate[:b] = False
    reference[b : b + c] = False
    reference[n - both_wrong :] = candidate[n - both_wrong :] = False
    return counted(answers(reference), answers(candidate), np.zeros(n, np.int64))


def judged(metrics, task="", precision="fp16", labels=None):
    file = spec_from_text(SPEC.format(task=task, precision=precision), path=Path("gate.toml"))
    found = task_findings(metrics, engine=file.spec.engines[0], file=file, evidence=Evidence.HOST, labels=labels)
    return {finding.check: finding for finding in found}


@given(n=st.integers(1, 70), classes=st.integers(2, 12), seed=st.integers(0, 50), batch=st.integers(1, 70))
def test_counts_are_their_definitions_in_any_batches(n, classes, seed, batch):
    rng = np.random.default_rng(seed)
    reference, candidate = rng.integers(0, 4, (2, n, classes)).astype(np.float32)
    labels = rng.integers(0, classes, n)
    metrics = counted(reference, candidate, labels, batch)
    right = candidate.argmax(axis=1) == labels
    assert metrics.samples == n
    assert metrics.top1 == np.count_nonzero(right)
    assert metrics.reference_top1 == np.count_nonzero(reference.argmax(axis=1) == labels)
    assert np.array_equal(correct_from_hex(metrics.correct, n), right)
    if classes > 5:
        five = [
            (np.argsort(-each, axis=1, kind="stable")[:, :5] == labels[:, None]).any(axis=1)
            for each in (candidate, reference)
        ]
        assert (metrics.top5, metrics.reference_top5) == tuple(np.count_nonzero(each) for each in five)
        assert metrics.top5_newly_wrong == np.count_nonzero(five[1] & ~five[0])
        assert metrics.top5_newly_right == np.count_nonzero(five[0] & ~five[1])
    else:
        assert metrics.top5 is None
        assert metrics.reference_top5 is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_wrong(value):
    good = answers(np.ones(3, bool))
    bad = good.copy()
    bad[1, 4] = value
    metrics = counted(good, bad, np.zeros(3, np.int64))
    assert (metrics.top1, metrics.reference_top1, metrics.top5) == (2, 3, 2)
    assert correct_from_hex(metrics.correct, 3).tolist() == [True, False, True]
    assert counted(bad, good, np.zeros(3, np.int64)).reference_top1 == 2


def test_equal_scores_are_answered_by_the_lower_index():
    zeros = np.zeros((2, 10), np.float32)
    metrics = counted(zeros, zeros, np.array([0, 9]))
    assert metrics.top1 == 1
    assert metrics.top5 == 1


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 10], r"sample 1 has label 10; there are 10 classes, 0 to 9"),
        ([-1, 0], r"sample 0 has label -1"),
        ([0.0, 1.0], r"labels must be integers \[N\], got float64"),
        ([True, False], r"got bool"),
        ([0], r"there are 1 labels for 2 samples"),
        ([[0], [1]], r"must be integers \[N\], got int64 \[2, 1\]"),
        (None, r"needs labels, and the samples have none"),
    ],
)
def test_labels_that_do_not_fit_are_an_error(labels, message):
    scores = answers(np.ones(2, bool))
    with pytest.raises(DataError, match=message):
        ClassificationAccumulator().add(scores, scores, None if labels is None else np.array(labels), first_sample=0)


@pytest.mark.parametrize("scores", [np.zeros((2, 1), np.float32), np.zeros(2, np.float32), np.zeros((2, 3), np.int64)])
def test_scores_that_are_none_are_an_error(scores):
    with pytest.raises(DataError, match="needs floats"):
        ClassificationAccumulator().add(scores, scores, np.zeros(2, np.int64), first_sample=0)


def test_scores_of_other_shapes_are_an_error():
    with pytest.raises(MeasurementError, match=r"the engine's scores are \[1, 10\], the reference's \[2, 10\]"):
        ClassificationAccumulator().add(answers([True, True]), answers([True]), np.zeros(2, np.int64), first_sample=0)


@pytest.mark.parametrize("first", [0, 3])
def test_a_batch_that_is_missing_or_comes_twice_is_an_error(first):
    accumulator = ClassificationAccumulator()
    scores = answers([True, True])
    accumulator.add(scores, scores, np.zeros(2, np.int64), first_sample=0)
    with pytest.raises(MeasurementError, match=f"expected the batch from sample 2, got that from {first}"):
        accumulator.add(scores, scores, np.zeros(2, np.int64), first_sample=first)


def test_no_sample_is_an_error():
    with pytest.raises(MeasurementError, match="no answer was compared"):
        ClassificationAccumulator().metrics()


def test_an_empty_table_takes_the_precisions_default():
    for precision, allowed in (("fp32", 0.1), ("fp16", 0.1), ("bf16", 0.2), ("int8", 0.5)):
        found = judged(outcome(2000), precision=precision)
        assert list(found) == ["task.top1_drop_pp"]
        limit = found["task.top1_drop_pp"].limit
        assert (limit.value, limit.source, limit.location) == (allowed, "default", None)
        assert found["task.top1_drop_pp"].status is Status.PASSED


def test_the_drop_is_paired():
    finding = judged(outcome(1000, b=30, c=10), "top1_drop_at_most_pp = 0.5")["task.top1_drop_pp"]
    change = agresti_min_difference(30, 10, 1000)
    assert finding.estimate == pytest.approx(2.0)
    assert (finding.interval.lower, finding.interval.upper) == (-100 * change.upper, -100 * change.lower)
    assert (finding.unit, finding.n, finding.status) == ("pp", 1000, Status.FAILED)
    assert finding.limit.location == "gate.toml:19"
    assert finding.detail.startswith("30 newly wrong, 10 newly right of 1000; McNemar's exact p = 0.0022")
    assert finding.detail.endswith("newly wrong: samples 0, 1, 2, 3, 4, …")


def test_too_few_samples_are_inconclusive_and_say_how_many_it_takes():
    finding = judged(outcome(797))["task.top1_drop_pp"]
    assert finding.status is Status.INCONCLUSIVE
    assert (
        "797 samples without a changed answer can show a drop of at most 0.21 pp; 0.1 pp takes 1643" in finding.detail
    )
    finding = judged(outcome(2000, b=3, c=3))["task.top1_drop_pp"]
    assert finding.status is Status.INCONCLUSIVE
    assert "at this rate of changed answers it would take about" in finding.detail
    finding = judged(outcome(2000, b=3))["task.top1_drop_pp"]
    assert "more samples would show whether" in finding.detail


def test_a_drop_of_nothing_cannot_be_shown():
    finding = judged(outcome(5000), "top1_drop_at_most_pp = 0.0")["task.top1_drop_pp"]
    assert finding.status is Status.INCONCLUSIVE
    assert "no number of samples shows a drop of at most 0" in finding.detail


def test_the_worst_class_is_named_where_labels_are_at_hand():
    labels = np.repeat([2, 7], 500)
    reference = np.zeros((1000, 10), np.float32)
    reference[np.arange(1000), labels] = 1
    candidate = reference.copy()
    candidate[600:640] = candidate[600:640, ::-1]
    finding = judged(counted(reference, candidate, labels), labels=labels)["task.top1_drop_pp"]
    assert finding.detail.endswith("worst class 7: 40 fewer right of 500")


def test_accuracy_has_its_interval():
    found = judged(outcome(1000, b=20), "top1_at_least = 0.97\ntop5_at_least = 0.5")
    interval = clopper_pearson(980, 1000)
    assert found["task.top1"].interval == interval
    assert found["task.top1"].status is Status.PASSED
    assert found["task.top5"].status is Status.PASSED
    near = judged(outcome(1000, b=20), "top1_at_least = 0.975")["task.top1"]
    assert near.status is Status.INCONCLUSIVE
    assert near.limit.location == "gate.toml:19"
    assert "980 of 1000 are right: too few to say on which side of 0.975 it is" in near.detail
    assert judged(outcome(1000, b=20), "top1_at_least = 0.995")["task.top1"].status is Status.FAILED


def test_top5_has_its_own_paired_drop():
    metrics = outcome(2000, b=100)
    found = judged(metrics, "top5_drop_at_most_pp = 0.5")
    assert list(found) == ["task.top5_drop_pp"]
    assert found["task.top5_drop_pp"].estimate == pytest.approx(5.0)
    assert found["task.top5_drop_pp"].status is Status.FAILED


@pytest.mark.parametrize("key", ["top5_at_least = 0.0", "top5_drop_at_most_pp = 100.0"])
def test_top5_of_five_classes_fails(key):
    scores = answers(np.ones(2000, bool), classes=5)
    (finding,) = judged(counted(scores, scores, np.zeros(2000, np.int64)), key).values()
    assert finding.status is Status.FAILED
    assert "top-5 needs 6 classes or more" in finding.detail


def test_counts_that_contradict_the_outcomes_are_an_error():
    metrics = outcome(100, b=3)
    for change, message in (
        ({"top1": 99}, "99 answers are said to be right, the outcomes hold 97"),
        ({"samples": 0}, "no answer"),
        ({"correct": "zz"}, "not hexadecimal"),
        ({"correct": metrics.correct[:-2]}, "not one bit for each of 100 samples"),
        ({"correct": metrics.correct[:-1] + "f"}, "not one bit for each of 100 samples"),
    ):
        broken = msgspec.structs.replace(metrics, **change)
        with pytest.raises(MeasurementError, match=message):
            judged(broken)


def test_a_baseline_is_compared_sample_by_sample():
    before, now = outcome(3000), outcome(3000, b=60)
    limit = Limit("at_most", 0.1, "baseline")
    finding = baseline_task_finding(now, before.correct, limit=limit, evidence=Evidence.HOST)
    assert finding.check == "baseline.top1_drop_pp"
    assert finding.estimate == pytest.approx(2.0)
    assert finding.status is Status.FAILED
    assert finding.limit == limit
    same = baseline_task_finding(now, now.correct, limit=limit, evidence=Evidence.HOST)
    assert same.status is Status.PASSED


@pytest.mark.parametrize("text", ["", "ff", "zz"])
def test_a_baseline_of_other_samples_is_an_error(text):
    with pytest.raises(BaselineError, match="the accepted outcomes"):
        baseline_task_finding(outcome(100), text, limit=Limit("at_most", 0.1), evidence=Evidence.HOST)


def test_the_references_own_accuracy():
    scores = answers(np.arange(100) < 31)
    labels = np.zeros(100, np.int64)
    found = reference_accuracy((labels[i : i + 30], scores[i : i + 30]) for i in range(0, 100, 30))
    assert found["top1"].value == 0.31
    assert found["top1"].upper_bound == clopper_pearson(31, 100).upper
    assert set(found) == {"top1", "top5"}
    with pytest.raises(DataError, match="needs labels"):
        reference_accuracy([(None, scores)])
    with pytest.raises(MeasurementError, match="no answer"):
        reference_accuracy([])


def test_stated_metrics_come_from_the_spec_or_a_file(tmp_path):
    assert stated_metrics({"top1": 0.985}, tmp_path, where="gate.toml:4") == {"top1": 0.985}
    (tmp_path / "metrics.json").write_text(json.dumps({"top1": 1}), encoding="utf-8")
    assert stated_metrics("metrics.json", tmp_path, where="gate.toml:4") == {"top1": 1.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("{}", "names no metric"),
        ("[0.9]", "names no metric"),
        ('{"top1": 98.5}', "a fraction from 0 to 1, got 98.5"),
        ('{"top1": NaN}', "a fraction from 0 to 1, got nan"),
        ('{"top1": true}', "a fraction from 0 to 1, got True"),
        ('{"top1": "0.9"}', "a fraction from 0 to 1, got '0.9'"),
    ],
)
def test_stated_metrics_that_are_none_are_an_error(tmp_path, text, message):
    (tmp_path / "metrics.json").write_text(text, encoding="utf-8")
    with pytest.raises(SpecError, match=message):
        stated_metrics("metrics.json", tmp_path, where="gate.toml:4")


def test_stated_metrics_in_no_file_are_an_error(tmp_path):
    with pytest.raises(SpecError, match="gate.toml:4: .*cannot be read"):
        stated_metrics("missing.json", tmp_path, where="gate.toml:4")
