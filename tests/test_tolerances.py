"""Which limits apply, and what each finding says."""

import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gate.compare import OutputAccumulator
from gate.errors import SpecError
from gate.spec import spec_from_text
from gate.tolerances import (
    DEFAULTS,
    allclose_tolerances,
    default_limits,
    default_max_abs,
    parity_findings,
    resolved_limits,
)
from gate.verdict import Evidence, Status

SPEC = """schema = 1
[model]
id = "m"
onnx = "m.onnx"
[inputs.x]
dtype = "float32"
shape = ["batch", 4]
batch = {{ min = 1, opt = 2, max = 4 }}
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
[engine.parity]
{parity}
"""


def spec(parity="", precision="fp16"):
    file = spec_from_text(SPEC.format(parity=parity, precision=precision), path=Path("gate.toml"))
    return file, file.spec.engines[0]


def measured(reference, candidate, engine, name="scores"):
    rms = math.sqrt(np.square(reference.astype(np.float64)).mean()) if reference.dtype.kind == "f" else 0.0
    atol, rtol = allclose_tolerances(engine, rms=rms)
    center = reference.mean(axis=0, dtype=np.float64) if reference.dtype.kind == "f" else None
    accumulator = OutputAccumulator(name, reference.dtype, atol=atol, rtol=rtol, center=center)
    accumulator.add(reference, candidate, first_sample=0)
    return accumulator.metrics()


def noisy(noise, shape=(400, 10), seed=0):
    rng = np.random.default_rng(seed)
    reference = rng.standard_normal(shape).astype(np.float32)
    return reference, (reference + noise * rng.standard_normal(shape)).astype(np.float32)


def judged(file, engine, *metrics):
    found = parity_findings(metrics, engine=engine, file=file, evidence=Evidence.HOST)
    return {finding.check: finding for finding in found}


@pytest.mark.parametrize(("precision", "noise"), [("fp32", 1e-6), ("fp16", 5e-4), ("bf16", 4e-3), ("int8", 1e-2)])
def test_the_noise_of_a_precision_passes_its_defaults_and_ten_times_more_fails(precision, noise):
    file, engine = spec(precision=precision)
    good = judged(file, engine, measured(*noisy(noise), engine))
    assert {each.status for each in good.values()} == {Status.PASSED}, good
    assert {each.limit.source for each in good.values()} == {"default"}
    bad = judged(file, engine, measured(*noisy(20 * noise), engine))
    assert bad["parity.rel_rmse"].status is Status.FAILED
    assert bad["parity.rel_rmse"].limit.location is None


def test_every_precision_of_the_spec_has_defaults():
    assert set(DEFAULTS) == {"fp32", "tf32", "fp16", "bf16", "int8", "fp8"}
    with pytest.raises(SpecError, match="no limits for precision 'fp4'"):
        default_limits("fp4")


def test_defaults_cannot_be_changed():
    with pytest.raises(TypeError, match="assignment"):
        default_limits("fp16")["rel_rmse"] = 1.0


def test_one_finding_for_each_limit():
    file, engine = spec()
    assert list(judged(file, engine, measured(*noisy(1e-4), engine))) == [
        "parity.nonfinite", "parity.rel_rmse", "parity.max_abs", "parity.cosine_distance", "parity.allclose",
    ]  # fmt: skip
    file, engine = spec(precision="int8")
    assert list(judged(file, engine, measured(*noisy(1e-4), engine))) == [
        "parity.nonfinite", "parity.rel_rmse", "parity.max_abs", "parity.cosine_distance",
        "parity.mean_cosine_distance",
    ]  # fmt: skip


def test_the_outputs_name_stands_in_the_check_where_there_are_several():
    file, engine = spec()
    pair = noisy(1e-4)
    found = judged(file, engine, measured(*pair, engine, "boxes"), measured(*pair, engine, "scores"))
    assert {"parity.rel_rmse[boxes]", "parity.nonfinite[scores]"} <= found.keys()
    assert "parity.rel_rmse" not in found


def test_the_default_of_max_abs_follows_the_limit_of_rel_rmse():
    file, engine = spec("rel_rmse = 0.5")
    metrics = measured(*noisy(1e-2), engine)
    expected = 2 * math.sqrt(2 * math.log(4000)) * 0.5 * metrics.rms_reference
    assert judged(file, engine, metrics)["parity.max_abs"].limit.value == pytest.approx(expected)
    assert default_max_abs(rel_rmse=1.0, elements=1, rms=1.0) > 1.0


def test_a_limit_for_one_output_goes_before_one_for_all_and_that_before_the_default():
    file, engine = spec("rel_rmse = 0.3\n[engine.parity.outputs.boxes]\nrel_rmse = 0.2\nmismatch_fraction = 0.5")
    pair = noisy(0.4)
    found = judged(file, engine, measured(*pair, engine, "boxes"), measured(*pair, engine, "scores"))
    assert found["parity.rel_rmse[boxes]"].limit.value == 0.2
    assert found["parity.rel_rmse[boxes]"].limit.location == "gate.toml:23"
    assert found["parity.rel_rmse[scores]"].limit.value == 0.3
    assert found["parity.rel_rmse[scores]"].limit.location == "gate.toml:21"
    assert found["parity.cosine_distance[boxes]"].limit.source == "default"
    assert found["parity.mismatch_fraction[boxes]"].status is Status.FAILED
    assert "parity.mismatch_fraction[scores]" not in found


def test_a_limit_that_is_kept_is_not_looked_up_in_the_file():
    file, engine = spec("rel_rmse = 0.3")
    finding = judged(file, engine, measured(*noisy(1e-4), engine))["parity.rel_rmse"]
    assert finding.status is Status.PASSED
    assert finding.limit.source == "spec"
    assert finding.limit.location is None


def test_a_limit_for_an_output_that_there_is_not_is_an_error_with_its_line():
    file, engine = spec("[engine.parity.outputs.box]\nrel_rmse = 0.2")
    with pytest.raises(SpecError, match=r"^gate.toml:21: .*has 'box'; the reference's outputs are 'scores'"):
        judged(file, engine, measured(*noisy(1e-4), engine))


def test_without_defaults_only_the_specs_limits_apply():
    file, engine = spec("defaults = false\nmax_abs = 1.0")
    assert list(judged(file, engine, measured(*noisy(1e-4), engine))) == ["parity.nonfinite", "parity.max_abs"]


def integers(wrong):
    reference = np.arange(400).reshape(200, 2)
    candidate = reference.copy()
    candidate[:wrong] += 1
    return reference, candidate


@pytest.mark.parametrize("parity", ["", "defaults = false\nrel_rmse = 0.1"])
def test_integers_must_be_equal(parity):
    file, engine = spec(parity)
    pair = noisy(1e-4)
    scores = measured(*pair, engine)
    found = judged(file, engine, measured(*integers(0), engine, "ids"), scores)
    assert found["parity.mismatch_fraction[ids]"].status is Status.PASSED
    assert "parity.rel_rmse[ids]" not in found
    found = judged(file, engine, measured(*integers(3), engine, "ids"), scores)
    finding = found["parity.mismatch_fraction[ids]"]
    assert finding.status is Status.FAILED
    assert "6 of 400 elements differ; worst sample 0: fraction that differs 1, then 1, 2" in finding.detail


def test_a_limit_that_means_something_for_no_output_fails():
    file, engine = spec("top1_agreement_at_least = 0.9\nsqnr_db_at_least = 20.0")
    found = judged(file, engine, measured(*integers(0), engine))
    for check in ("parity.top1_agreement", "parity.sqnr_db"):
        assert found[check].status is Status.FAILED
        assert "not defined for any output" in found[check].detail
        assert found[check].limit.location.startswith("gate.toml:2")


def test_a_limit_for_one_output_that_it_does_not_have_fails():
    file, engine = spec("[engine.parity.outputs.scores]\ntop5_agreement_at_least = 0.5")
    found = judged(file, engine, measured(*noisy(1e-4, (200, 4)), engine))
    assert found["parity.top5_agreement"].status is Status.FAILED
    assert "six classes or more" in found["parity.top5_agreement"].detail


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("precision", list(DEFAULTS))
def test_one_element_that_is_not_finite_fails_every_finding(value, side, precision):
    parity = "\n".join(
        f"{key} = {limit}"
        for key, limit in {
            "max_abs": 1e30, "mean_abs": 1e30, "rel_rmse": 1e30, "cosine_distance": 3.0, "mean_cosine_distance": 3.0,
            "centered_cosine_distance": 3.0, "sqnr_db_at_least": -1e30, "allclose_at_least": 0.0,
        }.items()
    )  # fmt: skip
    file, engine = spec(parity, precision="fp16" if precision == "tf32" else precision)
    pair = noisy(0.0)
    pair[side][17, 3] = value
    found = judged(file, engine, measured(*pair, engine))
    assert {each.status for each in found.values()} == {Status.FAILED}
    assert len(found) == 9
    assert found["parity.nonfinite"].estimate == 1.0
    who = "the engine's output" if side else "the reference's"
    assert f"NaN or Inf: 1 in {who} of 4000 elements; first at sample 17, element 3" in found["parity.rel_rmse"].detail


def test_agreement_says_how_many_disagree_and_how_many_samples_it_takes():
    file, engine = spec("top1_agreement_at_least = 0.99\ndefaults = false")
    r, _ = noisy(0.0, (200, 10))
    finding = judged(file, engine, measured(r, r, engine))["parity.top1_agreement"]
    assert finding.status is Status.INCONCLUSIVE
    assert finding.estimate == 1.0
    assert finding.detail == (
        "0 of 200 disagree; it would take 299 samples with no more disagreements to show 0.99: 99 more"
    )
    r, _ = noisy(0.0, (299, 10))
    assert judged(file, engine, measured(r, r, engine))["parity.top1_agreement"].status is Status.PASSED
    c = r.copy()
    c[:30] = c[:30, ::-1]
    finding = judged(file, engine, measured(r, c, engine))["parity.top1_agreement"]
    assert finding.status is Status.FAILED
    assert finding.detail.startswith("30 of 299 disagree")
    assert finding.n == 299
    c = r.copy()
    c[:5] = c[:5, ::-1]
    finding = judged(file, engine, measured(r, c, engine))["parity.top1_agreement"]
    assert finding.status is Status.INCONCLUSIVE
    assert "more samples would show" in finding.detail


def test_an_agreement_of_one_cannot_be_shown():
    file, engine = spec("top1_agreement_at_least = 1.0\ndefaults = false")
    r, _ = noisy(0.0)
    finding = judged(file, engine, measured(r, r, engine))["parity.top1_agreement"]
    assert finding.status is Status.INCONCLUSIVE
    assert "no number of samples shows an agreement of 1" in finding.detail


def test_a_failed_finding_names_the_worst_samples():
    file, engine = spec()
    r, c = noisy(1e-4)
    c[128] = r[128] * 1.31
    found = judged(file, engine, measured(r, c, engine))
    assert found["parity.rel_rmse"].detail.startswith("worst sample 128: relative error 0.31, then ")
    assert found["parity.max_abs"].detail.startswith("at sample 128, element ")
    assert "elements are not close (atol 0.0039, rtol 0.0039)" in found["parity.allclose"].detail
    assert found["parity.rel_rmse"].hint == "docs/findings.md#parity-rel_rmse"


def test_tolerances_of_the_spec_go_before_those_of_the_precision():
    _, engine = spec("atol = 0.5")
    assert allclose_tolerances(engine, rms=2.0) == (0.5, 4 * 2.0**-10)
    _, engine = spec("rtol = 0.25", precision="bf16")
    assert allclose_tolerances(engine, rms=2.0) == (8 * 2.0**-7, 0.25)


def test_resolved_limits_say_where_they_come_from():
    _, engine = spec("rel_rmse = 0.3")
    limits = {each.key: each for each in resolved_limits([measured(*noisy(1e-4), engine)], engine=engine)}
    assert (limits["rel_rmse"].source, limits["rel_rmse"].path) == ("spec", ("parity", "rel_rmse"))
    assert (limits["cosine_distance"].source, limits["cosine_distance"].value) == ("default", 5e-6)
    assert limits["allclose_at_least"].kind == "at_least"


def test_every_finding_has_its_place_in_the_documentation():
    keys = ["max_abs", "mean_abs", "rel_rmse", "cosine_distance", "mean_cosine_distance", "centered_cosine_distance"]
    parity = "\n".join(f"{key} = 1.0" for key in keys)
    parity += "\nsqnr_db_at_least = 1.0\nallclose_at_least = 0.1\n"
    parity += "top1_agreement_at_least = 0.1\ntop5_agreement_at_least = 0.1"
    file, engine = spec(parity)
    text = (Path(__file__).parents[1] / "docs" / "findings.md").read_text(encoding="utf-8")
    found = judged(file, engine, measured(*noisy(1e-4), engine), measured(*integers(0), engine, "ids"))
    assert len(found) == 13
    for finding in found.values():
        assert f"### {finding.hint.partition('#')[2]}\n" in text


@given(noise=st.floats(0, 1), seed=st.integers(0, 5))
def test_findings_survive_the_report(noise, seed):
    file, engine = spec("top1_agreement_at_least = 0.9")
    found = judged(file, engine, measured(*noisy(noise, seed=seed), engine)).values()
    for finding in found:
        again = msgspec.convert(msgspec.to_builtins(finding), type(finding))
        assert again == finding
