import json
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from gate.baseline import (
    RATIO_FLOOR,
    Baseline,
    accept,
    baseline_bytes,
    baseline_findings,
    baseline_from_bytes,
    baseline_from_result,
    baseline_path,
    baseline_schema,
    check_against_baseline,
    device_of,
    diff,
    digest_of,
    read_baseline,
    require_comparable,
    subject_of,
    version_family,
    write_baseline,
)
from gate.errors import BaselineError, DigestMismatch
from gate.manifest import pretty_json
from gate.metrics.findings import measured_values
from gate.metrics.kinds import kind_named
from gate.results import run_from_builtins
from gate.spec import BaselineLimits, TaskLimits, read_spec
from gate.verdict import Evidence, Failure, Finding, Interval, Limit, Status, Verdict

DATA = Path(__file__).parent / "data"
WHEN = "2026-11-21T11:00:00Z"


@pytest.fixture
def run():
    return run_from_builtins(json.loads((DATA / "run.json").read_bytes()))


@pytest.fixture
def result(run):
    return run.engines[0]


@pytest.fixture
def file():
    return read_spec(DATA / "sealed.toml")


@pytest.fixture
def baseline(run, result):
    return baseline_from_result(run, result, who="ada", when=WHEN, why="first release")


@pytest.fixture
def path(tmp_path, baseline):
    path = baseline_path(tmp_path, case="digits-cnn", engine="ort-fp16", device="cpu")
    write_baseline(path, baseline)
    return path


def edited(path, **changes):
    """The file with fields changed by hand, `outputs.0.rel_rmse`, and the digest made anew as an expert would."""
    raw = json.loads(path.read_bytes())
    for key, value in changes.items():
        *parents, last = key.split("__")
        table = raw
        for parent in parents:
            table = table[int(parent) if parent.isdigit() else parent]
        table[last] = value
    draft = msgspec.convert(raw, Baseline)
    raw["digest"] = digest_of(draft)
    path.write_bytes(pretty_json(raw))


def with_output(result, **changes):
    return msgspec.structs.replace(result, outputs=(msgspec.structs.replace(result.outputs[0], **changes),))


def test_what_was_written_is_read(path, baseline):
    assert read_baseline(path) == baseline
    assert path.parts[-3:] == ("digits-cnn", "ort-fp16", "cpu.json")


def test_the_file_is_small_sorted_and_diffable(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < 5000
    assert text.count("\n") > 60
    assert list(json.loads(text)) == sorted(json.loads(text))


def test_it_says_what_was_measured_and_who_accepted_it(baseline, run, result):
    assert baseline.subject.backend_version_family == "1"
    assert baseline.subject.samples == run.samples
    assert baseline.outputs[0].rel_rmse == result.outputs[0].rel_rmse
    assert baseline.task.top1 == result.task.top1
    assert baseline.task.interval.lower < baseline.task.top1 / baseline.task.samples <= baseline.task.interval.upper
    assert baseline.latency[0].p99_ms == result.latencies[0].p99_ms
    assert (baseline.accepted.who, baseline.accepted.why) == ("ada", "first release")


def test_a_missing_baseline_is_an_error_that_says_how_to_accept_one(tmp_path):
    with pytest.raises(BaselineError, match=r"cpu.json: there is no accepted baseline\ngate baseline accept --reason"):
        read_baseline(tmp_path / "cpu.json")


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b"{", b'{"a": 1, "a": 2}', b'{"x": NaN}', b"\xff"])
def test_what_is_no_baseline_is_an_error_that_names_the_file(tmp_path, data):
    path = tmp_path / "cpu.json"
    path.write_bytes(data)
    with pytest.raises(BaselineError, match=r"cpu\.json: "):
        read_baseline(path)


def test_a_link_is_not_followed(path):
    path.rename(path.with_name("other.json"))
    path.symlink_to(path.with_name("other.json"))
    with pytest.raises(BaselineError, match="is a symbolic link"):
        read_baseline(path)


def test_every_byte_that_carries_meaning_counts(path, baseline):
    whole = path.read_bytes()
    for position in range(0, len(whole), 11):
        data = bytearray(whole)
        data[position] ^= 1
        try:
            read = baseline_from_bytes(bytes(data), where="cpu.json")
        except BaselineError:
            continue
        assert read == baseline  # only white space differed


def test_an_edited_number_is_refused(path):
    text = path.read_text(encoding="utf-8")
    value = f'"rel_rmse": {json.loads(text)["outputs"][0]["rel_rmse"]!r}'
    path.write_text(text.replace(value, '"rel_rmse": 0.001'), encoding="utf-8")
    with pytest.raises(BaselineError, match="was changed after it was accepted"):
        read_baseline(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task__top1": 90}, "top1 is 90, correct has 101"),
        ({"task__top1": 102}, "top1 is 102"),
        ({"task__correct": "00" * 13}, "top1 is 101, correct has 0"),
        ({"task__correct": "ff" * 12}, "one bit for each of 101 samples"),
        ({"task__correct": "ff" * 13}, "one bit for each of 101 samples"),
        ({"task__interval__lower": 0.5}, "interval is 0.5 to 1, 101 of 101 give"),
        ({"task__samples": 100}, "samples"),
        ({"task__top5": 3}, "top5 is 3"),
        ({"outputs__0__rel_rmse": 0.5}, "above max_abs"),
        ({"outputs__0__rel_rmse": 1e-9}, "mean_abs .* is above the root mean square"),
        ({"outputs__0__mean_cosine_distance": 0.5}, "above the worst sample's"),
        ({"outputs__0__top1_agree": 1}, "top1_agreement is"),
        ({"outputs__0__top1_agree": 1000}, "above topk_samples"),
        ({"outputs__0__top1_agree": None}, "an interval of top1_agreement and no counts"),
        ({"outputs__0__top1_agreement": None}, "top1_agreement is missing"),
        ({"outputs__0__samples": 500}, "has 500 samples of 101"),
        ({"latency__0__p50_ms": 5.0}, "p50 <= p95 <= p99"),
        ({"accepted__why": "  "}, "does not say who accepted it and why"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused_although_its_digest_holds(path, changes, message):
    edited(path, **changes)
    with pytest.raises(BaselineError, match=f"contradicts itself: .*{message}"):
        read_baseline(path)


@pytest.mark.parametrize(
    "changes", [{"accepted__why": ""}, {"accepted__who": ""}, {"outputs": []}, {"outputs__0__rel_rmse": -1.0}]
)
def test_a_record_that_lacks_what_it_needs_is_refused(path, changes):
    raw = json.loads(path.read_bytes())
    for key, value in changes.items():
        *parents, last = key.split("__")
        table = raw
        for parent in parents:
            table = table[int(parent) if parent.isdigit() else parent]
        table[last] = value
    path.write_bytes(pretty_json(raw))
    with pytest.raises(BaselineError, match="is not a baseline: "):
        read_baseline(path)


def test_an_unknown_key_is_refused(path):
    raw = json.loads(path.read_bytes())
    raw["tolerance"] = 10
    path.write_bytes(pretty_json(raw))
    with pytest.raises(BaselineError, match="unknown field `tolerance`"):
        read_baseline(path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_measurement_that_is_not_finite_cannot_be_accepted(run, result, value):
    with pytest.raises(BaselineError, match="'ort-fp16' cannot be a baseline"):
        baseline_from_result(run, with_output(result, rel_rmse=value), who="a", when=WHEN, why="b")


@pytest.mark.parametrize(("who", "why"), [("", "x"), ("x", ""), ("  ", "x"), ("x", " \n")])
def test_nobody_and_no_reason_cannot_accept(run, result, tmp_path, who, why):
    with pytest.raises(BaselineError, match="cannot be a baseline"):
        baseline_from_result(run, result, who=who, when=WHEN, why=why)
    with pytest.raises(BaselineError, match="is empty: a baseline says who accepted it and why"):
        accept(run, root=tmp_path, who=who, when=WHEN, why=why)
    assert list(tmp_path.iterdir()) == []


def test_the_same_measurement_is_comparable(run, result, baseline):
    require_comparable(baseline, subject_of(run, result), result)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("device", "sm90"),
        ("precision", "int8"),
        ("backend", "tensorrt"),
        ("backend_version_family", "2"),
        ("engine", "other"),
        ("case", "other"),
        ("samples", 50),
        ("data_sha256", "e" * 64),
    ],
)
def test_a_baseline_of_something_else_is_refused(run, result, baseline, field, value):
    subject = msgspec.structs.replace(subject_of(run, result), **{field: value})
    got = getattr(baseline.subject, field)
    with pytest.raises(BaselineError, match=f"of another {field}: {got!r}, this run has {value!r}"):
        require_comparable(baseline, subject, result)


def test_a_baseline_of_other_outputs_is_refused(run, result, baseline):
    with pytest.raises(BaselineError, match="of other outputs: logits; this run has scores"):
        require_comparable(baseline, subject_of(run, result), with_output(result, output="scores"))
    with pytest.raises(BaselineError, match="of other outputs: logits; this run has none"):
        require_comparable(baseline, subject_of(run, result), msgspec.structs.replace(result, outputs=()))
    with pytest.raises(BaselineError, match="has 1010 float elements, this run has 5 float"):
        require_comparable(baseline, subject_of(run, result), with_output(result, elements=5))


def test_new_weights_are_compared_and_not_refused(run, result, baseline, file, tmp_path, path):
    provenance = msgspec.structs.replace(run.provenance, reference_sha256="0" * 64, weights_sha256="1" * 64)
    other = msgspec.structs.replace(run, provenance=provenance)
    require_comparable(baseline, subject_of(other, result), result)


def test_version_families():
    assert version_family("onnxruntime", "1.31.0") == "1"
    assert version_family("tensorrt", "10.16.1.11") == "10.16"
    assert version_family("tensorrt_rtx", "1.7.0.23") == "1.7"
    with pytest.raises(BaselineError, match="has no major.minor"):
        version_family("tensorrt", "unknown")


def test_devices(run):
    gpu = msgspec.structs.replace(run.device, kind="gpu", name="NVIDIA H200", compute_capability="9.0")
    for backend in ("onnxruntime", "torch"):
        assert device_of(backend, Evidence.HOST, gpu) == "cpu"
        assert device_of(backend, Evidence.HOST, run.device) == "cpu"
        assert device_of(backend, Evidence.DEVICE, gpu) == "sm90"
    assert device_of("tensorrt", Evidence.DEVICE, gpu) == "sm90"
    assert device_of("tensorrt_rtx", Evidence.PREFLIGHT, gpu) == "sm90"
    assert device_of("onnxruntime", Evidence.PREFLIGHT, gpu) == "cpu"
    for backend in ("onnxruntime", "torch", "tensorrt"):
        with pytest.raises(BaselineError, match="the fingerprint names none"):
            device_of(backend, Evidence.DEVICE, run.device)


def as_backend(result, backend, evidence):
    return msgspec.structs.replace(
        result,
        backend=backend,
        evidence=evidence,
        build=msgspec.structs.replace(result.build, backend=backend, backend_version="2.13.0"),
    )


def test_an_engine_of_torch_on_the_cpu_has_a_baseline_there(run, result, tmp_path):
    torch = as_backend(result, "torch", Evidence.HOST)
    again = msgspec.structs.replace(run, engines=(torch,))
    done = accept(again, root=tmp_path, who="a", when=WHEN, why="b")
    assert done.accepted[0].path.name == "cpu.json"
    assert baseline_bytes(
        msgspec.structs.replace(torch, baseline_sha256=done.accepted[0].baseline.digest), run=again, root=tmp_path
    )


def test_a_cuda_provider_is_not_compared_with_the_baseline_of_the_cpu(run, result, file, tmp_path, path):
    gpu = msgspec.structs.replace(run.device, kind="gpu", name="NVIDIA H200", compute_capability="9.0")
    cuda = msgspec.structs.replace(result, evidence=Evidence.DEVICE)
    found = check_against_baseline(
        cuda,
        engine=file.engine(result.name),
        file=file,
        root=tmp_path,
        samples=run.samples,
        data_sha256=run.provenance.data_sha256,
        evidence=Evidence.DEVICE,
        fingerprint=gpu,
    )
    assert "sm90.json: there is no accepted baseline" in found.findings[0].message


def test_accept_skips_what_cannot_have_a_baseline_and_takes_the_others(run, result, tmp_path):
    lost = msgspec.structs.replace(as_backend(result, "torch", Evidence.DEVICE), name="lost")
    again = msgspec.structs.replace(run, engines=(lost, result))
    done = accept(again, root=tmp_path, who="a", when=WHEN, why="b")
    assert [each.engine for each in done.accepted] == ["ort-fp16"]
    assert [(each.engine, each.reason) for each in done.skipped] == [
        ("lost", "backend 'torch' runs on a GPU, and the fingerprint names none")
    ]


@pytest.mark.parametrize("name", ["../x", "", ".", "..", "a/b", "a\n", "-x"])
def test_a_name_cannot_lead_out_of_the_folder(tmp_path, name):
    with pytest.raises(BaselineError, match="cannot name a baseline"):
        baseline_path(tmp_path, case=name, engine="e", device="cpu")
    with pytest.raises(BaselineError, match="cannot name a baseline"):
        baseline_path(tmp_path, case="c", engine=name, device="cpu")
    with pytest.raises(BaselineError, match="device"):
        baseline_path(tmp_path, case="c", engine="e", device=name)


def found(baseline, result, file, engine="ort-fp16"):
    findings = baseline_findings(baseline, result, engine=file.engine(engine), file=file, evidence=Evidence.HOST)
    return {each.check: each for each in findings}


def test_an_empty_table_asks_for_both_checks_at_their_defaults(baseline, result, file):
    findings = found(baseline, result, file)
    assert list(findings) == ["baseline.top1_drop_pp", "baseline.rel_rmse_ratio"]
    assert findings["baseline.top1_drop_pp"].limit == Limit("at_most", 0.1, "default")
    assert findings["baseline.rel_rmse_ratio"].limit == Limit("at_most", 2.0, "default")
    assert findings["baseline.rel_rmse_ratio"].status is Status.PASSED
    assert findings["baseline.rel_rmse_ratio"].estimate == 1.0


def test_the_drop_that_the_task_allows_is_the_default_against_the_baseline(baseline, result, file):
    engine = file.engine("ort-fp16")
    asked = msgspec.structs.replace(engine, task=TaskLimits(top1_drop_at_most_pp=0.5))
    findings = baseline_findings(baseline, result, engine=asked, file=file, evidence=Evidence.HOST)
    drop = next(each for each in findings if each.check == "baseline.top1_drop_pp")
    assert drop.limit == Limit("at_most", 0.5, "default")


def test_a_limit_of_the_spec_names_its_line_and_stands_alone(baseline, result, file):
    findings = found(baseline, result, file, engine="ort-strict")
    assert list(findings) == ["baseline.rel_rmse_ratio"]
    limit = findings["baseline.rel_rmse_ratio"].limit
    assert (limit.value, limit.source) == (1.25, "spec")
    line = int(limit.location.rsplit(":", 1)[1])
    assert "rel_rmse_ratio_at_most" in file.text.splitlines()[line - 1]


@pytest.mark.parametrize("factor", [2.01, 100.0, math.inf, math.nan])
def test_a_regression_fails(baseline, result, file, factor):
    worse = with_output(result, rel_rmse=result.outputs[0].rel_rmse * factor)
    assert found(baseline, worse, file)["baseline.rel_rmse_ratio"].status is Status.FAILED


def test_lost_answers_fail(baseline, result, file):
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(result.task.correct), np.uint8))
    bits[:20] = 0
    worse = msgspec.structs.replace(
        result,
        task=msgspec.structs.replace(result.task, top1=int(bits.sum()), correct=np.packbits(bits).tobytes().hex()),
    )
    finding = found(baseline, worse, file)["baseline.top1_drop_pp"]
    assert finding.status is Status.FAILED
    assert 15 < finding.estimate < 25


def test_rounding_of_fp32_after_none_at_all_is_no_regression(run, result, file):
    def exact(value):
        return with_output(result, rel_rmse=value, mean_abs=0.0, max_abs=1.0)

    zero = baseline_from_result(run, exact(0.0), who="a", when=WHEN, why="b")
    for value, status in ((0.0, Status.PASSED), (1e-7, Status.PASSED), (3 * RATIO_FLOOR, Status.FAILED)):
        assert found(zero, exact(value), file)["baseline.rel_rmse_ratio"].status is status


def test_a_missing_baseline_is_a_failure_that_says_how_to_accept_one(result, file):
    failure = found(None, result, file)["baseline"]
    assert isinstance(failure, Failure)
    assert failure.status is Status.FAILED
    assert 'gate baseline accept --reason "' in failure.hint


def test_a_task_on_one_side_only_is_a_failure(baseline, result, file):
    without = msgspec.structs.replace(result, task=None)
    failure = found(baseline, without, file)["baseline.top1_drop_pp"]
    assert isinstance(failure, Failure)
    assert "this run has no top-1" in failure.message
    failure = found(msgspec.structs.replace(baseline, task=None), result, file)["baseline.top1_drop_pp"]
    assert "the baseline has no top-1" in failure.message


def test_no_output_in_common_is_a_failure(baseline, result, file):
    without = msgspec.structs.replace(result, outputs=())
    assert isinstance(found(baseline, without, file)["baseline.rel_rmse_ratio"], Failure)


def test_several_outputs_have_a_check_each(run, result, file):
    two = (result.outputs[0], msgspec.structs.replace(result.outputs[0], output="boxes"))
    several = msgspec.structs.replace(result, outputs=two)
    record = baseline_from_result(run, several, who="a", when=WHEN, why="b")
    checks = set(found(record, several, file, engine="ort-strict"))
    assert checks == {"baseline.rel_rmse_ratio[logits]", "baseline.rel_rmse_ratio[boxes]"}


def against(result, run, file, root, **changes):
    arguments = {"samples": run.samples, "data_sha256": run.provenance.data_sha256, **changes}
    return check_against_baseline(
        result,
        engine=file.engine("ort-fp16"),
        file=file,
        root=root,
        evidence=Evidence.HOST,
        fingerprint=run.device,
        **arguments,
    )


def test_a_run_is_compared_with_the_file(run, result, file, tmp_path, path, baseline):
    compared = against(result, run, file, tmp_path)
    assert compared.sha256 == baseline.digest
    assert [each.check for each in compared.findings] == ["baseline.top1_drop_pp", "baseline.rel_rmse_ratio"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"samples": 50}, "of another samples"), ({"data_sha256": "e" * 64}, "of another data_sha256")],
)
def test_a_file_of_something_else_is_a_failure_without_numbers(run, result, file, tmp_path, path, changes, message):
    compared = against(result, run, file, tmp_path, **changes)
    assert compared.sha256 is None
    (failure,) = compared.findings
    assert isinstance(failure, Failure)
    assert message in failure.message
    assert str(path) in failure.message


def test_a_missing_and_an_edited_file_are_failures(run, result, file, tmp_path, path):
    edited(path, task__top1=90)
    assert "contradicts itself" in against(result, run, file, tmp_path).findings[0].message
    path.unlink()
    assert "no accepted baseline" in against(result, run, file, tmp_path).findings[0].message


def test_accept_writes_what_passed_and_skips_the_rest_with_a_reason(run, tmp_path):
    done = accept(run, root=tmp_path, who="ada", when=WHEN, why="first release")
    assert [each.engine for each in done.accepted] == ["ort-fp16"]
    assert read_baseline(done.accepted[0].path) == done.accepted[0].baseline
    assert {each.engine: each.reason for each in done.skipped} == {
        "ort-int8": "parity.rel_rmse is FAILED",
        "rtx-fp16": "it was compiled and not run, so nothing was measured",
        "trt-fp16": "NOT RUN: tensorrt is not installed",
    }
    assert [each.name for each in (tmp_path / "digits-cnn").iterdir()] == ["ort-fp16"]


@pytest.mark.parametrize("check", ["baseline", "baseline.rel_rmse_ratio", "baseline.top1_drop_pp"])
def test_accept_takes_what_fails_against_the_old_baseline_alone(run, result, tmp_path, check):
    failing = Failure(check=check, error="BaselineError", message="none", evidence=Evidence.HOST)
    verdict = Verdict(findings=(*result.verdict.findings, failing))
    again = msgspec.structs.replace(run, engines=(msgspec.structs.replace(result, verdict=verdict),))
    assert len(accept(again, root=tmp_path, who="a", when=WHEN, why="b").accepted) == 1


def test_accept_refuses_what_is_inconclusive(run, result, tmp_path):
    wide = Finding(
        check="task.top1",
        estimate=0.9,
        interval=Interval(0.8, 1.0),
        limit=Limit("at_least", 0.85),
        n=5,
        evidence=Evidence.HOST,
    )
    verdict = Verdict(findings=(wide,))
    again = msgspec.structs.replace(run, engines=(msgspec.structs.replace(result, verdict=verdict),))
    done = accept(again, root=tmp_path, who="a", when=WHEN, why="b")
    assert done.skipped[0].reason == "task.top1 is INCONCLUSIVE"


def test_accept_of_an_engine_that_is_not_in_the_run_is_an_error(run, tmp_path):
    with pytest.raises(BaselineError, match="no engine 'fp16'; it has ort-fp16"):
        accept(run, engines=["fp16"], root=tmp_path, who="a", when=WHEN, why="b")


def test_accepting_again_keeps_the_newest_latencies(run, tmp_path):
    for _ in range(25):
        done = accept(run, engines=["ort-fp16"], root=tmp_path, who="a", when=WHEN, why="b")
    assert len(done.accepted[0].baseline.latency) == 20


def test_diff_names_what_changed_and_by_how_much(run, result, baseline):
    worse = baseline_from_result(
        run, with_output(result, max_abs=result.outputs[0].max_abs * 2), who="eve", when=WHEN, why="again"
    )
    (change,) = diff(baseline, worse)
    assert change.metric == "logits.max_abs"
    assert change.change == pytest.approx(result.outputs[0].max_abs)
    assert diff(baseline, baseline) == ()
    gone = diff(baseline, msgspec.structs.replace(baseline, task=None))
    assert {each.metric: each.new for each in gone} == {"task.top1_fraction": None, "task.top5_fraction": None}


def test_the_bytes_that_are_sealed_are_those_that_judged(run, result, tmp_path, path, baseline):
    judged = msgspec.structs.replace(result, baseline_sha256=baseline.digest)
    assert baseline_bytes(judged, run=run, root=tmp_path) == path.read_bytes()
    with pytest.raises(DigestMismatch, match="the engine was judged by 000000000000"):
        baseline_bytes(msgspec.structs.replace(result, baseline_sha256="0" * 64), run=run, root=tmp_path)


def test_a_baseline_fits_its_published_schema(path):
    schema = baseline_schema()
    Draft202012Validator.check_schema(schema)
    raw = json.loads(path.read_bytes())
    Draft202012Validator(schema).validate(raw)
    assert not Draft202012Validator(schema).is_valid({**raw, "extra": 1})


def test_the_published_schema_is_current():
    published = Path(__file__).parents[1] / "schemas" / "baseline.schema.json"
    assert published.read_bytes() == pretty_json(baseline_schema())


@given(st.floats(min_value=0, max_value=1e6), st.integers(0, 10**9))
def test_numbers_survive_the_file_bit_for_bit(value, elements):
    raw = json.loads((DATA / "run.json").read_bytes())
    run = run_from_builtins(raw)
    result = with_output(run.engines[0], max_abs=1e9, rel_rmse=value, mean_abs=0.0, elements=elements)
    record = baseline_from_result(run, result, who="a", when=WHEN, why="b")
    again = baseline_from_bytes(pretty_json(msgspec.to_builtins(record)), where="x")
    assert again == record
    assert again.outputs[0].rel_rmse.hex() == float(value).hex()


MAPS = np.random.default_rng(0).integers(0, 3, (8, 4, 4))


def scored(result, wrong=0, samples=8):
    """The result of an engine that labels `wrong` pixels of each sample otherwise than the ground truth."""
    kind = kind_named("semantic_segmentation")
    metric, truth = (kind.make({"classes": 3}, None) for _ in range(2))
    answers = MAPS[:samples].copy()
    answers.reshape(samples, -1)[:, :wrong] = (answers.reshape(samples, -1)[:, :wrong] + 1) % 3
    targets = list(MAPS[:samples])
    for each, labelled in ((metric, answers), (truth, MAPS[:samples])):
        each.add({"y": labelled}, reference={"y": labelled}, targets=targets, first_sample=0)
    values = measured_values(metric.statistics(), truth.statistics(), kind=kind)
    return msgspec.structs.replace(result, scores=msgspec.structs.replace(values, settings_sha256="5" * 64))


@pytest.fixture
def segmentation(file):
    text = file.text.replace('kind   = "classification"', 'kind = "semantic_segmentation"').replace(
        'kind = "classification"', 'kind = "semantic_segmentation"'
    )
    task = msgspec.structs.replace(file.spec.task, kind="semantic_segmentation")
    engines = tuple(
        msgspec.structs.replace(each, task=None, task_limits={}, baseline=BaselineLimits())
        for each in file.spec.engines
    )
    spec = msgspec.structs.replace(file.spec, task=task, engines=engines)
    return msgspec.structs.replace(file, text=text, spec=spec)


def score_finding(run, before, now, segmentation, **limits):
    accepted = baseline_from_result(run, before, who="ada", when=WHEN, why="first release")
    engine = msgspec.structs.replace(segmentation.spec.engines[0], baseline=BaselineLimits(**limits))
    found = baseline_findings(accepted, now, engine=engine, file=segmentation, evidence=Evidence.HOST)
    return next(each for each in found if each.check.startswith(("baseline.mean", "baseline.task")))


def test_scores_are_compared_with_the_baseline_sample_by_sample(run, result, segmentation):
    same = score_finding(run, scored(result, 2), scored(result, 2), segmentation)
    assert (same.check, same.estimate, same.status) == ("baseline.mean_iou_drop", 0.0, Status.PASSED)
    worse = score_finding(run, scored(result, 2), scored(result, 5), segmentation)
    assert worse.status is Status.FAILED
    assert worse.estimate > 0.1
    assert "the baseline" in worse.detail
    assert score_finding(run, scored(result, 2), scored(result, 5), segmentation, task_drop_at_most=0.5).status is (
        Status.PASSED
    )


@pytest.mark.parametrize("missing", ["before", "now"])
def test_scores_that_are_missing_on_one_side_never_pass(run, result, segmentation, missing):
    before, now = scored(result, 2), scored(result, 2)
    if missing == "before":
        before = result
    else:
        now = result
    found = score_finding(run, before, now, segmentation)
    assert isinstance(found, Failure)
    assert "has no scores of a task to compare" in found.message


def test_scores_by_other_settings_are_not_compared(run, result, segmentation):
    now = scored(result, 2)
    now = msgspec.structs.replace(now, scores=msgspec.structs.replace(now.scores, settings_sha256="6" * 64))
    found = score_finding(run, scored(result, 2), now, segmentation, task_drop_at_most=0.9)
    assert isinstance(found, Failure)
    assert "other [task] options, another [postprocess] or other categories" in found.message


def test_scores_of_other_samples_are_not_compared(run, result, segmentation):
    found = score_finding(run, scored(result, 2, samples=6), scored(result, 2), segmentation)
    assert isinstance(found, Failure)
    assert "scored on 6 samples, this run on 8" in found.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores__values__mean_iou": 0.99}, "scores: mean_iou is 0.99, its statistics give"),
        ({"scores__samples": 9}, "scores: has 9 samples, its statistics hold 8"),
        ({"scores__statistics": "AAAA"}, "scores: the stored statistics cannot be read"),
        ({"scores__kind": "nothing"}, "scores: .*nothing"),
    ],
)
def test_scores_that_contradict_their_samples_are_refused(run, result, path, changes, message):
    accepted = baseline_from_result(run, scored(result, 2), who="ada", when=WHEN, why="first release")
    write_baseline(path, accepted)
    edited(path, **changes)
    with pytest.raises(BaselineError, match=message):
        read_baseline(path)


@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parents[1] / "baselines").rglob("*.json")),
    ids=lambda path: "-".join(path.parts[-3:]),
)
def test_every_accepted_baseline_holds(path):
    assert read_baseline(path).accepted.why


def test_a_baseline_from_before_scores_holds_and_is_written_as_it_was(path, baseline):
    assert b"scores" not in path.read_bytes()
    assert read_baseline(path) == baseline
