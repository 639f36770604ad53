"""Stages of a pipeline: shares add up, budgets need samples, and what was not timed never passes."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gate.errors import MeasurementError, SpecError
from gate.latency.config import StagesSpec
from gate.latency.stages import (
    STAGES,
    TOTAL,
    StageDurations,
    require_stages,
    stage_checks,
    stage_findings,
    summarise_stages,
)
from gate.spec import spec_from_text
from gate.verdict import Evidence, Status

FILE = spec_from_text(
    """schema = 1
[model]
id = "m"
onnx = "m.onnx"
[inputs.x]
dtype = "float32"
shape = [1, 4]
[data]
source = "data.npz"
samples = 10
[[engine]]
name = "e"
backend = "onnxruntime"
precision = "fp32"
  [engine.parity]
""",
    path=Path("gate.toml"),
)
MS = 1_000_000


def findings(durations, spec):
    found = stage_findings(durations, spec, engine="e", file=FILE, evidence=Evidence.HOST)
    return {each.check: each for each in found}


@st.composite
def pipelines(draw):
    names = draw(st.lists(st.sampled_from(STAGES), min_size=1, unique=True))
    count = draw(st.integers(1, 60))
    one = st.lists(st.integers(1, 10**12), min_size=count, max_size=count)
    return StageDurations({name: tuple(draw(one)) for name in names})


@given(pipelines())
def test_shares_and_means_of_the_stages_add_up_to_the_total(durations):
    *stages, total = summarise_stages(durations)
    assert total.stage == TOTAL
    assert total.share == 1.0
    assert [each.stage for each in stages] == [name for name in STAGES if name in durations.stages]
    assert math.fsum(each.share for each in stages) == pytest.approx(1.0)
    assert math.fsum(each.mean_ms for each in stages) == pytest.approx(total.mean_ms)
    assert all(0.0 < each.share <= 1.0 and each.n == durations.samples for each in stages)


@given(pipelines())
def test_percentiles_are_nearest_rank_and_the_total_is_of_each_sample(durations):
    sums = np.sum([durations.stages[name] for name in durations.stages], axis=0)
    for each in summarise_stages(durations):
        values = sorted(sums if each.stage == TOTAL else durations.stages[each.stage])
        for percent in (50, 95, 99):
            assert getattr(each, f"p{percent}_ms") == values[-(-percent * len(values) // 100) - 1] / 1e6
        if len(values) == 1:
            assert each.sd_ms == 0.0
        else:
            assert each.sd_ms == pytest.approx(np.std(np.array(values) / 1e6, ddof=1))


def test_stages_are_summed_by_hand():
    durations = StageDurations({"inference": (3 * MS, 5 * MS), "decode": (1 * MS, 1 * MS)})
    decode, inference, total = summarise_stages(durations)
    assert (decode.stage, decode.mean_ms, decode.sd_ms, decode.share) == ("decode", 1.0, 0.0, 0.2)
    assert (inference.mean_ms, inference.p50_ms, inference.p99_ms, inference.share) == (4.0, 3.0, 5.0, 0.8)
    assert inference.sd_ms == pytest.approx(math.sqrt(2))
    assert (total.mean_ms, total.p50_ms, total.p95_ms, total.n) == (5.0, 4.0, 6.0, 2)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({}, "no stage was timed"),
        ({"inference": ()}, "stage inference: no inference was timed"),
        ({"inference": (5, 0)}, "stage inference: inference 1 took 0 ns"),
        ({"inference": (5, 6), "decode": (-4, 1)}, "stage decode: inference 0 took -4 ns"),
        ({"inference": (5.0, math.nan)}, "stage inference: durations are whole nanoseconds"),
        ({"inference": (1.5,)}, "stage inference: durations are whole nanoseconds"),
        ({"inference": (10**30,)}, "stage inference: durations are whole nanoseconds"),
        ({"decode": (1, 2), "inference": (1,)}, "got decode 2, inference 1"),
        ({"resize": (1,)}, "there is no stage 'resize'; stages are decode"),
        ({"total": (1,)}, "there is no stage 'total'"),
    ],
)
def test_what_is_no_duration_of_a_stage_is_an_error(stages, message):
    with pytest.raises(MeasurementError, match=message):
        StageDurations(stages)


def test_a_stage_that_was_not_timed_has_no_durations():
    with pytest.raises(MeasurementError, match="stage 'decode' was not timed; inference, total were"):
        StageDurations({"inference": (1,)}).of("decode")


@pytest.mark.parametrize(("key", "least"), [("p50_ms", 7), ("p95_ms", 90), ("p99_ms", 459)])
def test_the_least_number_of_samples_passes_and_fewer_are_inconclusive(key, least):
    spec = StagesSpec(**{key: {"decode": 1.0}})
    check = f"stages.{key}[decode]"

    def judged(count, ns=MS):
        return findings(StageDurations({"decode": (ns,) * count}), spec)[check]

    assert judged(least).status is Status.PASSED
    assert judged(least, MS + 1).status is Status.FAILED
    few = judged(least - 1)
    assert few.status is Status.INCONCLUSIVE
    name = key.removesuffix("_ms")
    assert few.detail == f"{name} needs at least {least} samples, has {least - 1}; raise samples of [engine.stages]"


def test_a_stage_over_its_budget_fails_and_the_others_pass():
    durations = StageDurations({"decode": (9 * MS,) * 30 + (MS,) * 70, "inference": (MS,) * 100})
    found = findings(
        durations, StagesSpec(p95_ms={"decode": 2.0, "inference": 2.0, "total": 20.0}, p50_ms={"total": 3})
    )
    assert {check: each.status for check, each in found.items()} == {
        "stages.p50_ms[total]": Status.PASSED,
        "stages.p95_ms[decode]": Status.FAILED,
        "stages.p95_ms[inference]": Status.PASSED,
        "stages.p95_ms[total]": Status.PASSED,
    }
    failed = found["stages.p95_ms[decode]"]
    assert failed.detail == "decode of 30 of 100 samples is over the budget, slowest 9 ms"
    assert (failed.estimate, failed.unit, failed.n, failed.limit.value) == (9.0, "ms", 100, 2.0)
    assert failed.limit.location is not None
    assert failed.limit.location.startswith("gate.toml")


def test_a_stage_near_its_budget_is_inconclusive():
    durations = StageDurations({"decode": (9 * MS,) * 5 + (MS,) * 95})
    found = findings(durations, StagesSpec(p95_ms={"decode": 2.0}))["stages.p95_ms[decode]"]
    assert found.status is Status.INCONCLUSIVE
    assert found.detail == "decode of 5 of 100 samples is over the budget; more samples would decide"


@pytest.mark.parametrize(
    ("stage", "hint"),
    [
        ("transfer", "runs on a GPU"),
        ("decode", "samples are images"),
        ("postprocess", r"\[postprocess\]"),
        ("tranfser", "Stages are decode, preprocess, transfer, inference, postprocess, and total"),
    ],
)
def test_a_budget_for_a_stage_that_is_not_there_names_those_that_are(stage, hint):
    with pytest.raises(SpecError, match=f"budget for '{stage}'; this engine's pipeline has inference, total") as caught:
        findings(StageDurations({"inference": (MS,) * 100}), StagesSpec(p95_ms={stage: 1.0}))
    assert caught.match(hint)


@pytest.mark.parametrize("budget", [math.nan, math.inf, 0.0, -1.0])
def test_a_budget_that_is_no_time_is_an_error(budget):
    with pytest.raises(SpecError, match="p95_ms of inference is a finite number above 0"):
        require_stages(StagesSpec(p95_ms={"inference": budget}), ("inference",), engine="e", file=FILE)


def test_every_budget_is_a_check_and_no_table_is_none():
    spec = StagesSpec(p50_ms={"decode": 1.0}, p99_ms={"total": 1.0, "decode": 2.0})
    assert stage_checks(spec) == ("stages.p50_ms[decode]", "stages.p99_ms[total]", "stages.p99_ms[decode]")
    durations = StageDurations({"decode": (MS,) * 500})
    assert tuple(findings(durations, spec)) == stage_checks(spec)
    assert stage_checks(None) == ()
    assert findings(durations, StagesSpec()) == {}
