"""What an engine is timed in turn with: real bundles, real baselines, and sessions in processes of their own."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest

from gate.baseline import accept, accepted_engine, baseline_path, digest_of, read_baseline, write_baseline
from gate.engines import backend
from gate.errors import BaselineError, BundleError, DigestMismatch, RunError, VerificationError
from gate.latency.config import Cell, LatencySpec, RegressionSpec, SpeedupSpec
from gate.manifest import canonical_json, sha256_hex
from gate.pipeline import CheckOptions, Silence, check, seal_passed
from gate.release.statements import IN_TOTO, Envelope, envelope_from_bytes
from gate.results import Fingerprint
from gate.sessions.job import CellJob, Job
from gate.sessions.run import run_session, write_feeds
from gate.spec import EngineSpec, MemorySpec, read_spec
from gate.steps.context import Context
from gate.steps.latency import measured_latency
from gate.steps.make import Made, make_engine
from gate.steps.rivals import (
    bundle_rival,
    engine_memory,
    engine_subject,
    first_sessions,
    rival_of,
    timing_of,
)
from gate.store import VERDICT_PATH
from gate.verdict import Evidence, Failure, Status
from tests.cli import conftest as tiny

TIMED = "  [engine.latency]\n  p50_ms = 1000.0\n  samples = 100\n  warm_up_s = 0.0\n"
HALF = """
[[engine]]
name = "half"
backend = "onnxruntime"
precision = "fp16"
  [engine.parity]
"""
SEALED = (
    "artifacts/model.onnx",
    "artifacts/metadata.json",
    "evidence/latency.json",
    "policy/gate.toml",
)
WATCHED = """
import json
import sys

seen = []


def hook(event, arguments):
    if event == "subprocess.Popen":
        seen.append("a process")
    elif event == "import" and arguments[0].partition(".")[0] in ("onnxruntime", "onnx", "torch", "model"):
        seen.append(arguments[0])


sys.addaudithook(hook)
from gate.cli.main import main

code = main(sys.argv[1:])
print(json.dumps({"code": code, "seen": sorted(set(seen))}))
"""


@dataclass(frozen=True)
class Release:
    """A project whose engines were checked, sealed and accepted."""

    root: Path

    @property
    def options(self) -> CheckOptions:
        """Where its things lie."""
        return CheckOptions(cache=self.root / "cache", baselines=self.root / "baselines", bundles=self.root / "dist")

    def run(self, **options) -> Context:
        """A run of it, with nothing opened."""
        return Context(read_spec(self.root / "gate.toml"), replace(self.options, **options), Silence())

    @property
    def baseline(self) -> Path:
        """The accepted baseline of `ort`."""
        return baseline_path(self.root / "baselines", case="tiny", engine="ort", device="cpu")

    def bundle(self, engine: str = "ort") -> Path:
        """A sealed bundle."""
        return self.root / "dist" / "tiny" / engine


def released(root: Path, spec: str) -> Release:
    release = Release(root)
    file = read_spec(root / "gate.toml")
    assert file.path.read_text() == spec
    run = check(file, release.options, Silence())
    sealed = seal_passed(file, run, root / "dist", baselines=root / "baselines")
    assert all(each.path is not None for each in sealed), sealed
    accept(run, root=root / "baselines", who="Ada", when="2026-11-21T10:00:00Z", why="first release")
    return release


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Read only."""
    root = tmp_path_factory.mktemp("release")
    spec = tiny.SPEC + TIMED + HALF
    tiny.write(root, spec)
    return released(root, spec)


@pytest.fixture
def release(original, tmp_path):
    """A copy that a test may change."""
    root = tmp_path / "project"
    shutil.copytree(original.root, root)
    return Release(root)


@pytest.fixture(scope="module")
def opened(original):
    """A run with its samples and its reference, and the engine `ort` of it."""
    run = original.run()
    run.open_samples()
    run.open_reference()
    engine = run.file.engine("ort")
    yield run, engine, make_engine(run, engine, backend(engine.backend))
    run.close()


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(bytes(data))


def rewritten(path: Path, **values) -> None:
    """A baseline with other fields, and the digest that goes with them."""
    changed = msgspec.structs.replace(read_baseline(path), **values)
    write_baseline(path, msgspec.structs.replace(changed, digest=digest_of(changed)))


def sha256(path: Path) -> str:
    return sha256_hex(path.read_bytes())


def reseal(bundle: Path, name: str, text: str) -> None:
    """Another content of a file, and the digest of it in the statement."""
    seal = bundle / VERDICT_PATH
    for path in (bundle / name, seal):
        path.chmod(0o644)
    (bundle / name).write_text(text)
    envelope = envelope_from_bytes(seal.read_bytes(), payload_type=IN_TOTO, where="")
    statement = json.loads(envelope.payload)
    for each in statement["subject"]:
        if each["name"] == name:
            each["digest"]["sha256"] = sha256(bundle / name)
            each["annotations"]["size_bytes"] = (bundle / name).stat().st_size
    seal.write_bytes(Envelope(canonical_json(statement), IN_TOTO, ()).to_bytes())


def ort(release: Release) -> EngineSpec:
    return read_spec(release.root / "gate.toml").engine("ort")


def against_baseline(release: Release, **options):
    return rival_of(release.run(**options), ort(release), "baseline", evidence=Evidence.HOST)


def test_engine_of_the_spec_is_what_a_check_would_make(opened):
    run, engine, made = opened
    rival = rival_of(run, engine, "half", evidence=Evidence.HOST)
    assert (rival.against, rival.title, rival.on_gpu) == ("half", "engine half", False)
    assert rival.subject.engine == run.file.engine("half")
    assert rival.subject.sha256 == sha256(rival.subject.file)
    assert rival.subject.sha256 != made.sha256
    assert rival.subject.file.is_absolute()
    assert rival.subject.spec.is_absolute()


def test_reference_is_the_model_of_the_spec_without_a_file(opened):
    run, engine, _ = opened
    rival = rival_of(run, engine, "reference", evidence=Evidence.HOST)
    assert rival.title.startswith("the reference, torch ")
    assert (rival.subject.engine, rival.subject.file, rival.subject.sha256) == (None, None, None)
    assert not rival.on_gpu


def test_recorded_reference_cannot_be_timed(release):
    run = release.run(reference=release.root)
    with pytest.raises(RunError, match="the reference is a recording, which cannot be timed") as caught:
        rival_of(run, ort(release), "reference", evidence=Evidence.HOST)
    assert "another engine" in caught.value.hint


def test_path_of_a_bundle_starts_from_the_folder_of_the_spec(release, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    rival = rival_of(release.run(), ort(release), "dist/tiny/half", evidence=Evidence.HOST)
    assert rival.against == "dist/tiny/half"
    assert rival.subject.file == release.bundle("half") / "artifacts/model.onnx"
    assert rival.subject.engine.precision == "fp16"
    assert rival.title == f"half of {release.bundle('half')}"


def test_baseline_is_the_bundle_of_the_accepted_engine(release):
    rival = against_baseline(release)
    assert rival.against == "baseline"
    assert rival.subject.sha256 == read_baseline(release.baseline).engine_sha256
    assert rival.subject.file == release.bundle() / "artifacts/model.onnx"
    assert rival.subject.spec == release.bundle() / "policy/gate.toml"


@pytest.mark.parametrize("against", ["half", "reference", "baseline", "./dist/tiny/half"])
def test_every_kind_takes_turns_with_the_engine_in_one_process(opened, against, tmp_path):
    run, engine, made = opened
    timing = timing_of(run, engine, made, evidence=Evidence.HOST)
    feeds = tmp_path / "feeds.safetensors"
    write_feeds(feeds, timing.feeds.batches(Cell(batch=2)))
    job = Job(
        subjects=(timing.subject, timing.rival(against).subject),
        cells=(CellJob(cell=Cell(batch=2), feeds=feeds, kept=16, subjects=(0, 1)),),
        warm_up_s=0.0,
    )
    (cell,) = run_session(job, timeout_s=60.0).cells
    for each in cell.subjects:
        assert len(each.regions["host_wall"]) == 16
        assert min(each.regions["host_wall"]) > 0


@pytest.mark.parametrize("name", SEALED)
def test_bundle_with_one_bit_changed_is_refused(release, name):
    flip(release.bundle() / name)
    with pytest.raises(DigestMismatch, match="its sha256 is .*, sealed was") as caught:
        against_baseline(release)
    assert str(release.bundle() / name) in str(caught.value)
    with pytest.raises(DigestMismatch, match="its sha256 is .*, sealed was"):
        rival_of(release.run(), ort(release), "dist/tiny/ort", evidence=Evidence.HOST)


def test_bundle_with_a_file_more_or_less_or_a_link_is_refused(release):
    bundle = release.bundle()
    (bundle / "artifacts/more.bin").write_bytes(b"more")
    with pytest.raises(BundleError, match="more.bin"):
        bundle_rival(bundle, against="b")
    (bundle / "artifacts/more.bin").unlink()
    bundle_rival(bundle, against="b")
    moved = release.root / "model.onnx"
    shutil.move(bundle / "artifacts/model.onnx", moved)
    with pytest.raises(BundleError):
        bundle_rival(bundle, against="b")
    (bundle / "artifacts/model.onnx").symlink_to(moved)
    with pytest.raises(BundleError, match="link"):
        bundle_rival(bundle, against="b")


def test_folder_that_is_no_bundle_is_refused(release):
    (release.root / "empty").mkdir()
    with pytest.raises(BundleError, match="is an empty folder"):
        bundle_rival(release.root / "empty", against="b")
    with pytest.raises(BundleError, match="nowhere"):
        rival_of(release.run(), ort(release), "dist/nowhere", evidence=Evidence.HOST)


def test_raw_latencies_that_contradict_the_percentiles_are_refused_though_every_digest_fits(release):
    """Whoever can write the manifest can seal anything; numbers that contradict each other are refused even so."""
    text = (release.bundle() / "evidence/latency.json").read_text()
    number = re.search(r"\d{3,},", text).group()
    reseal(release.bundle(), "evidence/latency.json", text.replace(number, f"{number[:-1]}000,", 1))
    with pytest.raises(VerificationError):
        bundle_rival(release.bundle(), against="b")


def watched(folder: Path, *arguments: str) -> dict[str, object]:
    """The command in a process that notes what it imports and starts."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *arguments], cwd=folder, capture_output=True, text=True, timeout=120, check=True
    )
    return {**json.loads(done.stdout.splitlines()[-1]), "err": done.stderr}


@pytest.mark.parametrize("name", SEALED[:3])
def test_nothing_of_a_tampered_bundle_is_loaded(release, name):
    flip(release.bundle() / name)
    found = watched(release.root, "latency", "dist/tiny/half", "--against", "dist/tiny/ort")
    assert found["code"] == 4
    assert f"dist/tiny/ort/{name}: its sha256 is " in found["err"]
    assert found["seen"] == []


def test_what_is_loaded_of_a_sound_bundle_is_seen(release):
    found = watched(release.root, "latency", "dist/tiny/half", "--max-time", "0.01")
    assert found["code"] == 0
    assert "a process" in found["seen"]


def test_engine_that_is_exchanged_after_it_was_verified_is_not_loaded(opened, release, tmp_path):
    run, engine, made = opened
    rival = bundle_rival(release.bundle("half"), against="b")
    flip(rival.subject.file)
    timing = timing_of(run, engine, made, evidence=Evidence.HOST)
    feeds = tmp_path / "feeds.safetensors"
    write_feeds(feeds, timing.feeds.batches(Cell(batch=1)))
    job = Job(
        subjects=(timing.subject, rival.subject),
        cells=(CellJob(cell=Cell(batch=1), feeds=feeds, kept=16, subjects=(0, 1)),),
    )
    with pytest.raises(DigestMismatch, match="the file of 'b' changed"):
        run_session(job, timeout_s=60.0)


def test_bundle_of_another_engine_than_the_accepted_is_refused(release):
    shutil.rmtree(release.bundle())
    shutil.copytree(release.bundle("half"), release.bundle())
    accepted = read_baseline(release.baseline).engine_sha256
    with pytest.raises(BaselineError, match="not of the accepted baseline's engine") as caught:
        against_baseline(release)
    assert caught.value.where == str(release.bundle())
    assert sha256(release.bundle() / "artifacts/model.onnx")[:12] in caught.value.message
    assert f"accepted was {accepted[:12]}" in caught.value.message
    assert "--bundles" in caught.value.hint


def test_bundle_that_is_not_there_is_an_error_that_says_where_it_is_looked_for(release):
    accepted = read_baseline(release.baseline).engine_sha256
    with pytest.raises(BaselineError, match=f"no bundle for sha256 {accepted[:12]}") as caught:
        against_baseline(release, bundles=release.root / "bundles")
    assert caught.value.where == str(release.root / "bundles/tiny/ort")
    assert "--bundles DIR" in caught.value.hint
    assert "--seal" in caught.value.hint


def test_without_an_accepted_baseline_there_is_no_engine_to_time_against(release):
    release.baseline.unlink()
    with pytest.raises(BaselineError, match="there is no accepted baseline") as caught:
        against_baseline(release)
    assert caught.value.where == str(release.baseline)
    assert "gate baseline accept" in caught.value.hint


def test_baseline_that_does_not_say_its_engine_is_an_error(release):
    rewritten(release.baseline, engine_sha256=None)
    with pytest.raises(BaselineError, match="does not say which engine it is of") as caught:
        against_baseline(release)
    assert caught.value.where == str(release.baseline)
    assert "gate baseline accept" in caught.value.hint


def test_baseline_that_was_edited_names_no_engine(release):
    text = release.baseline.read_text()
    half = sha256(release.bundle("half") / "artifacts/model.onnx")
    release.baseline.write_text(text.replace(read_baseline(release.baseline).engine_sha256, half))
    with pytest.raises(BaselineError, match="was changed after it was accepted"):
        against_baseline(release)


def test_baseline_of_another_device_is_not_this_one_s(release):
    release.baseline.rename(release.baseline.with_name("sm90.json"))
    with pytest.raises(BaselineError, match="there is no accepted baseline") as caught:
        against_baseline(release)
    assert caught.value.where == str(release.baseline)


def test_baseline_of_a_cpu_is_not_that_of_a_gpu(release):
    gpu = Fingerprint(
        kind="gpu",
        name="NVIDIA H200",
        cores=2,
        isa=(),
        os="Linux x86_64",
        python="3.11.7",
        versions={"numpy": "2"},
        compute_capability="9.0",
    )
    with pytest.raises(BaselineError, match="there is no accepted baseline") as caught:
        accepted_engine(
            release.root / "baselines",
            case="tiny",
            engine="ort",
            backend="tensorrt",
            evidence=Evidence.DEVICE,
            fingerprint=gpu,
        )
    assert caught.value.where == str(release.baseline.with_name("sm90.json"))


@pytest.mark.parametrize(("name", "other"), [("device", "sm90"), ("engine", "half"), ("case", "another")])
def test_baseline_that_stands_in_the_place_of_another_names_no_engine(release, name, other):
    subject = read_baseline(release.baseline).subject
    rewritten(release.baseline, subject=msgspec.structs.replace(subject, **{name: other}))
    with pytest.raises(BaselineError, match=f"is of another {name}: '{other}'"):
        against_baseline(release)


def others(release: Release, against: str, **more) -> LatencySpec:
    """Both comparisons against one rival, in no time at all."""
    return LatencySpec(
        regression=RegressionSpec(against=against, p50=900.0),
        speedup=SpeedupSpec(against=against, at_least=0.001),
        warm_up_s=0.0,
        **more,
    )


def findings_of(opened, release: Release, latency: LatencySpec):
    """What is found with the bundles and baselines of a copy; the engine is that of the original."""
    _, engine, made = opened
    engine = msgspec.structs.replace(engine, latency=latency)
    run = release.run()
    run.open_samples()
    found = measured_latency(timing_of(run, engine, made, evidence=Evidence.HOST))
    return found, {each.check: each for each in found.findings}


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (lambda r: flip(r.bundle() / "artifacts/model.onnx"), "DigestMismatch", "its sha256 is"),
        (lambda r: shutil.rmtree(r.bundle()), "BaselineError", "is not at hand"),
        (lambda r: r.baseline.unlink(), "BaselineError", "there is no accepted baseline"),
        (lambda r: rewritten(r.baseline, engine_sha256=None), "BaselineError", "does not say which engine"),
    ],
    ids=["tampered", "no-bundle", "no-baseline", "no-engine"],
)
def test_missing_baseline_fails_both_comparisons(opened, release, break_it, error, message):
    break_it(release)
    found, findings = findings_of(opened, release, others(release, "baseline", max_time_s=0.01))
    assert findings.keys() == {"latency.regression_p50", "latency.speedup"}
    for each in findings.values():
        assert isinstance(each, Failure)
        assert (each.status, each.error) == (Status.FAILED, error)
        assert message in each.message
    assert all(not each.comparisons for each in found.latencies)


def other_inputs(root: Path, kind: str) -> Path:
    """A bundle of an engine that takes something else than the tiny project's."""
    spec, data, model = tiny.SPEC, tiny.DATA, tiny.MODEL
    if kind == "name":
        spec = spec.replace("[inputs.input]", "[inputs.x]").replace("[data]", "[data]", 1)
        data = data.replace('"input":', '"x":')
    elif kind == "shape":
        spec, data = spec.replace('["batch", 4]', '["batch", 5]'), data.replace("(32, 4)", "(32, 5)")
        model = model.replace("Linear(4, 3)", "Linear(5, 3)")
    else:
        spec = spec.replace('dtype = "float32"', 'dtype = "int64"').replace("model:load", "model:whole")
        data = data.replace("standard_normal((32, 4), dtype=np.float32)", "integers(0, 9, (32, 4))")
        model += (
            "\n\nclass Whole(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            "        self.layer = load()\n\n    def forward(self, input):\n        return self.layer(input.float())\n"
            "\n\ndef whole():\n    return Whole().eval()\n"
        )
    tiny.write(root, spec)
    (root / "data.py").write_text(data)
    (root / "model.py").write_text(model)
    return released(root, spec).bundle()


@pytest.mark.parametrize(
    ("kind", "takes"),
    [("name", "x float32 [batch, 4]"), ("shape", "input float32 [batch, 5]"), ("dtype", "input int64 [batch, 4]")],
)
def test_bundle_that_takes_other_inputs_fails_its_checks_and_says_which_it_takes(
    opened, release, tmp_path, kind, takes
):
    (tmp_path / kind).mkdir()
    bundle = other_inputs(tmp_path / kind, kind)
    _, findings = findings_of(opened, release, others(release, str(bundle), max_time_s=0.01))
    assert findings.keys() == {"latency.regression_p50", "latency.speedup"}
    for each in findings.values():
        assert each.status is Status.FAILED
        assert "input float32 [batch, 4]" in each.message
        assert takes in each.message
        assert str(bundle) in each.message


def test_bundle_that_takes_other_inputs_leaves_the_budgets_alone(opened, release, tmp_path):
    (tmp_path / "shape").mkdir()
    bundle = other_inputs(tmp_path / "shape", "shape")
    latency = others(release, str(bundle), p50_ms=1000.0, samples=100)
    _, findings = findings_of(opened, release, latency)
    assert findings["latency.regression_p50"].status is Status.FAILED
    assert findings["latency.p50_ms"].status is Status.PASSED


def test_bundle_whose_spec_was_exchanged_is_refused_though_every_digest_fits(release):
    text = (release.bundle("half") / "policy/gate.toml").read_text()
    reseal(release.bundle("half"), "policy/gate.toml", text.replace("max = 16", "max = 32"))
    with pytest.raises(VerificationError):
        bundle_rival(release.bundle("half"), against="b")


def test_sessions_are_counted_for_each_rival_of_each_table():
    engine = EngineSpec(name="a", backend="onnxruntime", precision="fp32")
    alone, two = LatencySpec(p50_ms=1.0), LatencySpec(regression=RegressionSpec(), speedup=SpeedupSpec(at_least=2.0))
    assert first_sessions(engine) == 0
    assert first_sessions(msgspec.structs.replace(engine, latency=alone)) == 5
    assert first_sessions(msgspec.structs.replace(engine, latency=(alone, two))) == 15


def test_engine_is_loaded_by_the_digest_of_what_was_made(opened):
    run, engine, made = opened
    subject = engine_subject(engine, file=run.file, made=made)
    assert (subject.name, subject.sha256) == ("ort", sha256(made.path))
    assert isinstance(made, Made)


def test_memory_together_is_that_of_all_engines_in_one_fresh_process(opened):
    run, engine, made = opened
    timing = timing_of(run, engine, made, evidence=Evidence.HOST)
    found, failures = engine_memory(
        run, timing, MemorySpec(together_with=("half",), together_host_mib=4000.0, together_device_mib=1.0)
    )
    assert failures == ()
    assert found.alone is None
    assert found.of("together_host_mib") > 1.0
    assert found.of("together_device_mib") is None
    assert found.of("device_steady_mib") is None


def test_memory_of_an_engine_that_cannot_be_loaded_is_a_failure(opened):
    run, engine, made = opened
    timing = timing_of(run, engine, made, evidence=Evidence.HOST)
    broken = replace(timing, subject=msgspec.structs.replace(timing.subject, sha256="0" * 64))
    found, (failure,) = engine_memory(run, broken, MemorySpec(together_with=("half",), together_host_mib=4000.0))
    assert found is None
    assert (failure.check, failure.error, failure.status) == ("memory", "DigestMismatch", Status.FAILED)
