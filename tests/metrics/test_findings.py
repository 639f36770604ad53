"""Findings of a task: which limits there are, what status follows, and what a baseline keeps."""

import base64
import math
import zlib
from dataclasses import dataclass

import numpy as np
import pytest

from gate.errors import MeasurementError, SpecError
from gate.metadata import sealed_scores
from gate.metrics.findings import (
    Asked,
    asked_limits,
    baseline_finding,
    implausible_gain,
    measured_values,
    packed,
    task_findings,
    unpacked,
)
from gate.metrics.interface import MetricKind, MetricValue
from gate.metrics.kinds import kind_named
from gate.metrics.resampling import seed_from
from gate.spec import spec_from_text
from gate.verdict import Evidence, Limit, Status

SPEC = """schema = 1

[model]
id = "m"
factory = "model:load"

[inputs.input]
dtype = "float32"
shape = ["batch", 4]
batch = { min = 1, opt = 2, max = 4 }

[data]
source = "data:evaluation"
samples = 8

[task]
kind = "toy"

[[engine]]
name = "e"
backend = "onnxruntime"
precision = "PRECISION"
  [engine.task]
"""


@dataclass(frozen=True)
class Scored:
    """A score and an error of each sample."""

    score: np.ndarray
    error: np.ndarray

    @property
    def samples(self):
        return len(self.score)

    def values(self, weights=None):
        weights = np.ones(len(self.score)) if weights is None else weights
        with np.errstate(invalid="ignore"):
            return {
                "score": float(weights @ self.score / weights.sum()),
                "error": float(weights @ self.error / weights.sum()),
                "part.a": float(weights @ self.score / weights.sum()),
            }

    def to_arrays(self):
        return {"score": self.score, "error": self.error}


KIND = MetricKind(
    name="toy",
    values={"score": MetricValue(), "error": MetricValue(higher_is_better=False, unit="px")},
    make=lambda options, categories: pytest.fail("nothing is made here"),
    read=lambda arrays: Scored(**arrays),
    default_drop={"fp32": 0.001, "int8": 0.02},
    named=("part.",),
)


def asked(text, *, kind=KIND, precision="fp32"):
    from pathlib import Path

    file = spec_from_text(SPEC.replace("PRECISION", precision) + text, path=Path("gate.toml"))
    return asked_limits(kind, file.spec.engines[0], file)


def scored(score, error=0.5, n=50):
    """n samples that all score alike."""
    return Scored(np.full(n, float(score)), np.full(n, float(error)))


def found(text, ours, theirs):
    (finding,) = task_findings(asked(text), ours, theirs, kind=KIND, evidence=Evidence.HOST, seed=3, resamples=200)
    return finding


@pytest.mark.parametrize(
    ("text", "check", "value", "form", "limit"),
    [
        ("score_at_least = 0.6", "task.score", "score", "value", Limit("at_least", 0.6, "spec", "gate.toml:24")),
        (
            "score_drop_at_most = 0.1",
            "task.score_drop",
            "score",
            "change",
            Limit("at_most", 0.1, "spec", "gate.toml:24"),
        ),
        (
            "score_ratio_at_least = 0.99",
            "task.score_ratio",
            "score",
            "ratio",
            Limit("at_least", 0.99, "spec", "gate.toml:24"),
        ),
        ("error_at_most = 3.0", "task.error", "error", "value", Limit("at_most", 3.0, "spec", "gate.toml:24")),
        (
            "error_rise_at_most = 0.0",
            "task.error_rise",
            "error",
            "change",
            Limit("at_most", 0.0, "spec", "gate.toml:24"),
        ),
        (
            "error_ratio_at_most = 1.1",
            "task.error_ratio",
            "error",
            "ratio",
            Limit("at_most", 1.1, "spec", "gate.toml:24"),
        ),
        (
            '"part.a_drop_at_most" = 0.1',
            "task.part.a_drop",
            "part.a",
            "change",
            Limit("at_most", 0.1, "spec", "gate.toml:24"),
        ),
    ],
)
def test_a_key_is_a_value_and_how_it_is_limited(text, check, value, form, limit):
    (each,) = asked(text)
    assert (each.check, each.value, each.form, each.limit) == (check, value, form, limit)
    assert each.key == text.partition(" =")[0].strip('"')


def test_several_keys_are_several_limits_in_the_order_of_the_spec():
    names = [each.check for each in asked("error_at_most = 2\nscore_at_least = 0.5\nscore_drop_at_most = 0.1")]
    assert names == ["task.error", "task.score", "task.score_drop"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("score_drop_at_mots = 0.1", "has no key 'score_drop_at_mots' for toy; did you mean 'score_drop_at_most'?"),
        ("scor_at_least = 0.1", "did you mean 'score_at_least'?"),
        ("zzz = 0.1", "it takes score_at_least, score_drop_at_most"),
        ("score_drop_at_most = -0.1", "score_drop_at_most = -0.1: expected 0 or more"),
        ("error_rise_at_most = -1.0", "error_rise_at_most = -1.0: expected 0 or more"),
        ("score_drop_at_most = nan", "score_drop_at_most = nan: expected a finite number"),
        ("score_at_least = inf", "score_at_least = inf: expected a finite number"),
        ("error_drop_at_most = 1.0", "has no key 'error_drop_at_most' for toy; did you mean 'error_r"),
        ("error_at_least = 1.0", "has no key 'error_at_least'"),
        ("score_rise_at_most = 1.0", "has no key 'score_rise_at_most'"),
        ("score_at_most = 1.0", "has no key 'score_at_most'"),
        ('"part.a_rise_at_most" = 1.0', "has no key 'part.a_rise_at_most'"),
        ("tiled_score_at_least = 0.5", r"needs \[tiling\]"),
    ],
)
def test_a_key_that_is_no_limit_is_refused_with_file_and_line(text, message):
    with pytest.raises(SpecError, match=message) as caught:
        asked(text)
    assert "gate.toml:24" in str(caught.value.where or caught.value)


def test_without_a_key_the_first_value_may_drop_as_the_precision_allows():
    (each,) = asked("")
    assert each == Asked("task.score_drop", "score", "change", Limit("at_most", 0.001, "default"), None)


def test_without_a_key_and_without_a_default_the_spec_is_refused():
    with pytest.raises(
        SpecError, match=r"\[engine.task\] is empty, and toy has no default for fp16; it takes score_at"
    ):
        asked("", precision="fp16")


@pytest.mark.parametrize(
    ("text", "ours", "status"),
    [
        ("score_at_least = 0.7", 0.8, Status.PASSED),
        ("score_at_least = 0.9", 0.8, Status.FAILED),
        ("score_drop_at_most = 0.05", 0.77, Status.PASSED),
        ("score_drop_at_most = 0.05", 0.7, Status.FAILED),
        ("score_drop_at_most = 0.05", 0.95, Status.PASSED),
        ("score_ratio_at_least = 0.9", 0.75, Status.PASSED),
        ("score_ratio_at_least = 0.9", 0.7, Status.FAILED),
    ],
)
def test_a_value_is_held_against_its_limit(text, ours, status):
    finding = found(text, scored(ours), scored(0.8))
    assert finding.status is status
    assert finding.interval.lower <= finding.estimate <= finding.interval.upper
    assert finding.n == 50


@pytest.mark.parametrize(
    ("text", "ours", "status"),
    [
        ("error_at_most = 1.0", 0.9, Status.PASSED),
        ("error_at_most = 1.0", 1.1, Status.FAILED),
        ("error_rise_at_most = 0.2", 0.65, Status.PASSED),
        ("error_rise_at_most = 0.2", 0.8, Status.FAILED),
        ("error_rise_at_most = 0.2", 0.1, Status.PASSED),
        ("error_ratio_at_most = 1.5", 0.7, Status.PASSED),
        ("error_ratio_at_most = 1.5", 0.8, Status.FAILED),
    ],
)
def test_where_less_is_better_a_rise_is_what_is_limited(text, ours, status):
    finding = found(text, scored(0.8, error=ours), scored(0.8, error=0.5))
    assert finding.status is status
    assert finding.unit == ("" if "ratio" in text else "px")


def test_a_drop_that_may_be_chance_is_inconclusive():
    random = np.random.default_rng(0)
    theirs = random.random(40)
    ours = theirs - random.normal(0.02, 0.1, 40)
    finding = found("score_drop_at_most = 0.05", Scored(ours, ours), Scored(theirs, theirs))
    assert finding.status is Status.INCONCLUSIVE


def test_one_sample_is_inconclusive_and_says_why():
    finding = found("score_drop_at_most = 0.1", scored(0.8, n=1), scored(0.8, n=1))
    assert finding.status is Status.INCONCLUSIVE
    assert "a single sample leaves nothing to draw from" in finding.detail


@pytest.mark.parametrize("text", ["score_at_least = 0.0", "score_drop_at_most = 1.0", "score_ratio_at_least = 0.0"])
def test_a_value_that_is_nan_fails(text):
    finding = found(text, scored(math.nan), scored(0.8))
    assert finding.status is Status.FAILED
    assert "score is not defined on these samples" in finding.detail


@pytest.mark.parametrize("text", ["score_drop_at_most = 0.1", "score_ratio_at_least = 0.0"])
def test_a_reference_that_is_nan_or_nothing_fails(text):
    assert found(text, scored(0.8), scored(math.nan)).status is Status.FAILED
    assert found(text, scored(0.0), scored(0.0)).status is Status.FAILED


def test_a_drop_that_is_all_of_the_reference_is_no_limit_and_fails():
    finding = found("score_drop_at_most = 0.1", scored(0.08), scored(0.09))
    assert finding.status is Status.FAILED
    assert finding.detail.startswith("The reference's score is 0.09: a drop of 0.1 from that is all of it")
    assert found("score_drop_at_most = 0.1", scored(0.11), scored(0.11)).status is Status.PASSED


def test_a_value_that_may_be_negative_is_held_against_its_limit_there_too():
    assert found("score_drop_at_most = 0.1", scored(-0.5), scored(-0.45)).status is Status.PASSED
    assert found("score_drop_at_most = 0.1", scored(-0.7), scored(-0.45)).status is Status.FAILED


def test_another_number_of_samples_is_an_error():
    with pytest.raises(MeasurementError, match="the engine was scored on 24 samples, what it is held against on 48"):
        found("score_drop_at_most = 0.1", scored(0.8, n=24), scored(0.8, n=48))


def test_a_category_that_was_not_measured_is_an_error():
    with pytest.raises(MeasurementError, match=r"nothing was measured as 'part.b'; there is score, error, part.a"):
        found('"part.b_at_least" = 0.5', scored(0.8), scored(0.8))


def test_the_interval_is_the_same_every_time_and_follows_the_seed():
    random = np.random.default_rng(0)
    ours, theirs = Scored(*random.random((2, 40))), Scored(*random.random((2, 40)))
    limits = asked("score_drop_at_most = 0.1")

    def interval(seed):
        (each,) = task_findings(limits, ours, theirs, kind=KIND, evidence=Evidence.HOST, seed=seed, resamples=200)
        return each.interval

    assert interval(1) == interval(1)
    assert interval(1) != interval(2)


def test_the_seed_follows_from_engine_reference_and_data():
    seeds = {
        seed_from("a", "b", "c"),
        seed_from("x", "b", "c"),
        seed_from("a", "x", "c"),
        seed_from("a", "b", "x"),
    }
    assert len(seeds) == 4


@pytest.mark.parametrize(("before", "status"), [(0.8, Status.PASSED), (0.9, Status.FAILED), (0.03, Status.FAILED)])
def test_the_baseline_limits_the_change_of_the_first_value(before, status):
    finding = baseline_finding(
        scored(0.79 if before > 0.1 else 0.03),
        scored(before),
        kind=KIND,
        limit=Limit("at_most", 0.05, "spec"),
        evidence=Evidence.HOST,
        seed=1,
        resamples=100,
    )
    assert finding.check == "baseline.score_drop"
    assert finding.status is status
    assert "the baseline" in finding.detail.lower()


def test_a_gain_that_no_engine_has_is_noted():
    note = implausible_gain({"score": 0.86}, {"score": 0.8}, KIND)
    assert note is not None
    assert "score is 0.86, and the reference's 0.8" in note
    assert implausible_gain({"score": 0.83}, {"score": 0.8}, KIND) is None
    assert implausible_gain({"score": 0.2}, {"score": 0.8}, KIND) is None


def test_where_less_is_better_a_gain_is_a_fall():
    kind = MetricKind("toy", {"error": MetricValue(higher_is_better=False)}, KIND.make, KIND.read)
    assert implausible_gain({"error": 0.5}, {"error": 0.8}, kind) is not None
    assert implausible_gain({"error": 0.9}, {"error": 0.8}, kind) is None


def test_arrays_come_back_from_text_as_they_were():
    arrays = {
        "floats": np.random.default_rng(0).random((7, 3)),
        "bools": np.array([[True, False]]),
        "ints": np.arange(5)[::-1],
        "empty": np.zeros((0, 4), np.float32),
        "bytes": np.frombuffer(b"names", np.uint8),
    }
    back = unpacked(packed(arrays))
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)


def test_the_same_arrays_give_the_same_text_in_any_order():
    one, two = np.arange(4), np.ones(3)
    assert packed({"a": one, "b": two}) == packed({"b": two, "a": one})


WHOLE = packed({"a": np.random.default_rng(0).random(200)})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not base64!",
        "AAAA",
        WHOLE[: len(WHOLE) // 2 // 4 * 4],
        WHOLE[:-8],
        WHOLE[8:],
        base64.b64encode(zlib.compress(b"no safetensors")).decode(),
        base64.b64encode(zlib.compress(b"\xff" * 64)).decode(),
        "ä" * 8,
    ],
)
def test_text_that_is_cut_off_or_something_else_is_refused(text):
    with pytest.raises(MeasurementError, match="the stored statistics"):
        unpacked(text)


def test_text_that_would_fill_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr("gate.metrics.findings._MOST_BYTES", 1000)
    with pytest.raises(MeasurementError, match="truncated, or larger than 1 GiB"):
        unpacked(packed({"a": np.zeros(1000)}))


def test_measured_values_hold_what_a_baseline_scores_again():
    ours, theirs = scored(0.7), scored(0.8)
    values = measured_values(ours, theirs, kind=KIND)
    assert (values.kind, values.samples) == ("toy", 50)
    assert values.values["score"] == pytest.approx(0.7)
    assert values.reference["score"] == pytest.approx(0.8)
    again = KIND.read(unpacked(values.statistics))
    assert again.values() == ours.values()
    assert sealed_scores(values).statistics == ""
    assert sealed_scores(values).values == values.values


@pytest.mark.parametrize("name", ["detection", "semantic_segmentation"])
def test_built_in_kinds_have_a_default_for_the_precisions_they_name(name):
    kind = kind_named(name)
    for precision, allowed in kind.default_drop.items():
        assert 0 < allowed < 0.05, precision
