import base64
import hashlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import numpy as np
import pytest

from gate.baseline import baseline_from_result
from gate.errors import BundleError, DigestMismatch, ExitCode, MeasurementError, VerificationError
from gate.latency.bounds import percentile_bounds
from gate.latency.budgets import regression_finding, speedup_finding
from gate.latency.config import Cell, SpeedupSpec
from gate.latency.ratio import RATIO_PERCENTILES, estimate, log_ratio
from gate.manifest import canonical_json, pretty_json
from gate.metrics.findings import measured_values
from gate.metrics.kinds import kind_named
from gate.release.statements import IN_TOTO, Envelope
from gate.results import Comparison, SessionPair, run_from_builtins
from gate.store import VERDICT_PATH, Step, engine_path_of, seal, verify_seal
from gate.verdict import Evidence, Finding, Interval, Limit, Verdict

DATA = Path(__file__).parent / "data"
ENGINE = b"a compiled engine, as far as digests can tell\n" * 50
METADATA = "artifacts/metadata.json"
LATENCY = "evidence/latency.json"
FILES = (
    "artifacts/metadata.json",
    "artifacts/model.onnx",
    "baseline/baseline.json",
    "evidence/environment.json",
    "evidence/latency.json",
    "evidence/metrics.json",
    "policy/gate.toml",
    "seals/verdict.dsse.json",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run whose first engine was judged by a baseline, with its raw latencies and its file; and its extra files."""
    folder = tmp_path_factory.mktemp("made")
    run = run_from_builtins(json.loads((DATA / "run.json").read_bytes()))
    first = run.engines[0]
    baseline = baseline_from_result(run, first, who="ada", when="2026-11-20T10:00:00Z", why="first release")
    durations = tuple(200_000 + (i * 7919) % 50_000 for i in range(500))
    result = msgspec.structs.replace(
        first,
        baseline_sha256=baseline.digest,
        latencies=(msgspec.structs.replace(first.latencies[0], durations_ns=durations),),
    )
    run = msgspec.structs.replace(run, engines=(result, *run.engines[1:]))
    engine = folder / "model.onnx"
    engine.write_bytes(ENGINE)
    extra = {
        "policy/gate.toml": (DATA / "sealed.toml").read_bytes(),
        "baseline/baseline.json": pretty_json(msgspec.to_builtins(baseline)),
    }
    return run, result, engine, extra


def sealed(made, out, **changes):
    run, result, engine, extra = made
    arguments = {"run": run, "result": result, "engine_file": engine, "extra": extra, "out": out, **changes}
    return seal(arguments["result"].verdict.require_passed(), **arguments)


@pytest.fixture
def bundle(made, tmp_path):
    return sealed(made, tmp_path / "bundle").folder


def statement_of(bundle):
    """The statement that a bundle's envelope holds, as it stands there."""
    return json.loads(base64.b64decode(json.loads((bundle / VERDICT_PATH).read_bytes())["payload"]))


def state(bundle, statement):
    """Put another statement into a bundle's envelope, which nobody signs."""
    data = statement if isinstance(statement, bytes) else canonical_json(statement)
    (bundle / VERDICT_PATH).write_bytes(Envelope(data, IN_TOTO, ()).to_bytes())


def reseal(bundle, **changes):
    """Make every digest anew after an edit, as somebody could who can write to the whole bundle."""
    statement = statement_of(bundle)

    def digest(name):
        return hashlib.sha256((bundle / name).read_bytes()).hexdigest()

    metadata = json.loads((bundle / METADATA).read_bytes())
    names = sorted(
        p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file() and p.parent.name != "seals"
    )
    metadata["files"] = {
        name: {"sha256": digest(name), "size_bytes": (bundle / name).stat().st_size}
        for name in names
        if name != METADATA
    }
    (bundle / METADATA).write_bytes(pretty_json(metadata))
    statement["subject"] = [
        {
            "name": name,
            "digest": {"sha256": digest(name)},
            "annotations": {"size_bytes": (bundle / name).stat().st_size},
        }
        for name in names
    ]
    said = statement["predicate"]
    said["metadata_sha256"] = digest(METADATA)
    said["digests"] = metadata["digests"]
    said["device"] = {key: metadata["device"][key] for key in said["device"]}
    said["findings"] = [
        {
            "check": each["check"],
            "estimate": each["estimate"],
            **each["interval"],
            "kind": each["limit"]["kind"],
            "limit": each["limit"]["value"],
            "n": each["n"],
            "outcome": each["status"],
            "evidence": each["evidence"],
        }
        for each in metadata["verdict"]["findings"]
    ]
    said.update(changes)
    state(bundle, statement)


def edit(bundle, name, *path, value):
    raw = statement_of(bundle) if name == VERDICT_PATH else json.loads((bundle / name).read_bytes())
    *parents, last = path
    table = raw
    for each in parents:
        table = table[each]
    table[last] = value
    if name == VERDICT_PATH:
        state(bundle, raw)
    else:
        (bundle / name).write_bytes(pretty_json(raw))


def test_what_passed_is_sealed_and_verifies(made, bundle):
    verified = verify_seal(bundle)
    names = tuple(sorted(p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()))
    assert names == FILES
    assert set(verified.files) == set(FILES) - {VERDICT_PATH}
    assert verified.engine.read_bytes() == ENGINE
    assert verified.metadata.engine == "ort-fp16"
    assert [step.name for step in verified.steps] == [
        "tree",
        "signature",
        "schema",
        "digests",
        "verdict",
    ]
    assert all(step.ok for step in verified.steps)
    assert verified.steps[4].detail == "PASSED, 4 findings recomputed, evidence: host"


def test_the_statement_lists_every_file_as_in_toto_has_it(bundle):
    statement = statement_of(bundle)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert [each["name"] for each in statement["subject"]] == [name for name in FILES if name != VERDICT_PATH]
    for each in statement["subject"]:
        assert hashlib.sha256((bundle / each["name"]).read_bytes()).hexdigest() == each["digest"]["sha256"]


def test_the_raw_latencies_are_there_in_their_order(made, bundle):
    (cell,) = json.loads((bundle / LATENCY).read_bytes())["cells"]
    assert (cell["name"], cell["comparisons"]) == ("", {})
    assert [len(each) for each in cell["sessions"]] == [100] * 5
    assert tuple(value for each in cell["sessions"] for value in each) == made[1].latencies[0].durations_ns


def test_what_compiled_only_is_sealed_without_latency_and_metrics(made, tmp_path):
    run, _, engine, extra = made
    result = run.engines[2]
    plain = {"policy/gate.toml": extra["policy/gate.toml"]}
    verified = sealed(made, tmp_path / "b", result=result, extra=plain, engine_file=engine)
    assert verified.engine.name == "model.plan"
    assert verified.metadata.verdict.evidence is Evidence.PREFLIGHT
    with pytest.raises(VerificationError, match="its evidence is 'preflight', asked for is 'device'"):
        verify_seal(tmp_path / "b", require_evidence=Evidence.DEVICE)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0, 0.37, 0.5, -1])
def test_a_flipped_byte_in_any_file_is_found(bundle, name, where):
    path = bundle / name
    data = bytearray(path.read_bytes())
    data[where if isinstance(where, int) else int(where * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError) as caught:
        verify_seal(bundle)
    assert caught.value.exit_code is ExitCode.REFUSED
    if name != VERDICT_PATH:
        assert isinstance(caught.value, DigestMismatch)
        assert caught.value.where == str(path)


def link(path):
    path.rename(path.parent.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent.parent / "elsewhere")


def hard_link(path):
    os.link(path, path.parent.parent.parent / "second")


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def folder(path):
    path.unlink()
    path.mkdir()
    (path / "x").write_bytes(b"x")


def empty(path):
    path.write_bytes(b"")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def grow(path):
    path.write_bytes(path.read_bytes() + b"\n")


def rename(path):
    path.rename(path.with_name("renamed.json"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [Path.unlink, link, hard_link, pipe, folder, empty, truncate, rename])
def test_a_damaged_tree_is_refused(bundle, name, damage):
    damage(bundle / name)
    with pytest.raises(
        BundleError, match="is missing|link|regular|added|sha256 is|bytes, sealed were|is not JSON|empty|not written as"
    ) as caught:
        verify_seal(bundle)
    assert str(bundle) in caught.value.where


@pytest.mark.parametrize("name", [name for name in FILES if name != VERDICT_PATH])
def test_a_file_that_grew_is_refused(bundle, name):
    grow(bundle / name)
    with pytest.raises(DigestMismatch, match="bytes, sealed were"):
        verify_seal(bundle)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("artifacts/extra.bin", "was not sealed: it was added"),
        ("extra.bin", "was not sealed: it was added"),
        ("seals/extra.json", "was not sealed: it was added"),
        ("artifacts/.hidden", "is a dot-file"),
        (".git/config", "is a dot-file"),
    ],
)
def test_an_added_file_is_refused(bundle, name, message):
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_bytes(b"x")
    with pytest.raises(VerificationError, match=f"{(bundle / name).name}|{message}"):
        verify_seal(bundle)


def test_an_added_folder_is_refused(bundle):
    (bundle / "artifacts" / "empty").mkdir()
    with pytest.raises(VerificationError, match="empty: is an empty folder"):
        verify_seal(bundle)


def test_two_files_that_changed_places_are_found(bundle):
    a, b = bundle / "evidence" / "metrics.json", bundle / "evidence" / "environment.json"
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)
    with pytest.raises(DigestMismatch, match="environment.json"):
        verify_seal(bundle)


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "link"])
def test_what_is_no_folder_is_no_bundle(bundle, tmp_path, kind):
    path = tmp_path / "other"
    if kind == "file":
        path.write_bytes(b"x")
    elif kind == "empty":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(bundle)
    with pytest.raises(
        BundleError, match="there is no bundle|is not a folder|is an empty folder|is a symbolic link, not a bundle"
    ):
        verify_seal(path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("verdict", "status"), "FAILED", "Invalid enum value 'FAILED'"),
        (("verdict", "findings", 0, "status"), "FAILED", "Invalid enum value 'FAILED'"),
        (("verdict", "findings", 0, "interval", "upper"), 0.5, "parity.rel_rmse is INCONCLUSIVE by its own numbers"),
        (("verdict", "findings", 0, "estimate"), "NaN", "parity.rel_rmse is FAILED by its own numbers"),
        (("verdict", "findings", 0, "limit", "value"), 1e-9, "parity.rel_rmse is FAILED by its own numbers"),
        (("verdict", "findings", 0, "limit", "kind"), "at_least", "parity.rel_rmse is FAILED by its own numbers"),
        (("verdict", "findings", 0, "check"), "parity.sqnr_db", "two findings for one check"),
        (("verdict", "required"), ["task.top1"], "required checks have no finding: task.top1"),
        (("verdict", "evidence"), "device", "reach evidence 'host', it says 'device'"),
        (("latency", 0, "p99_ms"), 0.01, "latency.p99_ms is 0.01"),
        (("latency", 0, "mean_ms"), 0.01, "latency.mean_ms is 0.01"),
        (("latency", 0, "n"), 5000, "latency.n is 5000"),
        (("latency", 0, "sessions"), 20, "latency.sessions is 20"),
        (("latency", 0, "throughput"), 9e9, "latency.throughput is 9e"),
        (("latency", 0, "name"), "batch=8", "is not of the batch sizes and shapes in the metadata"),
        (("verdict", "findings", 2, "estimate"), 0.2489, "latency.p99_ms is 0.2489, evidence/latency.json gives"),
        (("verdict", "findings", 2, "interval", "upper"), 0.2494, "latency.p99_ms's upper bound is 0.2494"),
        (("verdict", "findings", 2, "interval", "lower"), 0.1, "latency.p99_ms's lower bound is 0.1"),
        (("verdict", "findings", 2, "check"), "latency.p42_ms", "latency.p42_ms is of no latency in the metadata"),
        (("verdict", "findings", 2, "check"), "latency.p99_ms[batch=8]", "is of no latency in the metadata"),
        (("verdict", "findings", 2, "check"), "latency.throughput", "latency.throughput is 0.249"),
        (("verdict", "findings", 2, "check"), "latency.speedup", "latency.speedup is of no latency"),
        (("latency",), [], "do not come together"),
        (("metrics", "task", "top1"), 50, "task.top1 is 50"),
        (("metrics", "task", "reference_correct"), "zz", "task.reference_top1 is"),
        (("metrics", "outputs", 0, "rel_rmse"), 1e-9, "differs from metrics"),
        (("device", "name"), "NVIDIA H200", "differs from device"),
        (("digests", "spec"), "0" * 64, "is not the spec"),
        (("digests", "baseline"), "0" * 64, "is not the baseline"),
        (("digests", "baseline"), None, "do not agree on a baseline"),
        (("backend_version",), "9.9", "are not those of its build record"),
        (("backend",), "tensorrt", "has its engine in artifacts/model.plan"),
        (("model_id",), "other", "is not that of the metadata"),
        (("extra",), 1, "unknown field `extra`"),
    ],
)
def test_edited_metadata_is_refused_although_every_digest_holds(bundle, path, value, message):
    edit(bundle, METADATA, *path, value=value)
    with pytest.raises(DigestMismatch, match=r"metadata\.json: its sha256 is"):
        verify_seal(bundle)
    reseal(bundle, evidence=json.loads((bundle / METADATA).read_bytes())["verdict"]["evidence"])
    with pytest.raises(BundleError, match=message):
        verify_seal(bundle)


def test_a_budget_that_was_left_out_is_missed_although_every_digest_holds(bundle):
    findings = json.loads((bundle / METADATA).read_bytes())["verdict"]["findings"]
    edit(
        bundle, METADATA, "verdict", "findings", value=[each for each in findings if each["check"] != "latency.p99_ms"]
    )
    reseal(bundle)
    with pytest.raises(
        VerificationError, match=r"asks for latency\.p99_ms with a limit of 10\.0, the metadata has none"
    ):
        verify_seal(bundle)


@pytest.mark.parametrize("check", ["parity.rel_rmse", "parity.sqnr_db", "parity.nonfinite"])
def test_a_check_of_parity_that_was_left_out_is_missed_although_every_digest_holds(bundle, check):
    findings = json.loads((bundle / METADATA).read_bytes())["verdict"]["findings"]
    edit(bundle, METADATA, "verdict", "findings", value=[each for each in findings if each["check"] != check])
    reseal(bundle)
    with pytest.raises(VerificationError, match=f"asks for {check}, and the metadata has it not"):
        verify_seal(bundle)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("limit", "value"), 1e9, r"asks for parity\.rel_rmse with a limit of 0\.002, the metadata has 1e\+09"),
        (("estimate",), 0.0, r"parity\.rel_rmse is 0 on 101, its metrics give 0\.000126653 on 101"),
        (("interval",), {"lower": 0.0, "upper": 1e-3}, r"parity\.rel_rmse is 0\.000126653 on 101, its metrics"),
        (("n",), 5000, r"parity\.rel_rmse is 0\.000126653 on 5000, its metrics give 0\.000126653 on 101"),
        (("check",), "parity.max_abs", r"asks for parity\.rel_rmse, and the metadata has it not"),
    ],
)
def test_parity_that_is_not_of_the_metrics_and_the_spec_is_refused_although_every_digest_holds(
    bundle, path, value, message
):
    edit(bundle, METADATA, "verdict", "findings", 0, *path, value=value)
    reseal(bundle)
    with pytest.raises(VerificationError, match=message):
        verify_seal(bundle)


def test_parity_that_nobody_asked_for_or_measured_is_refused(bundle):
    raw = json.loads((bundle / METADATA).read_bytes())
    more = {**raw["verdict"]["findings"][0], "check": "parity.mean_abs"}
    edit(bundle, METADATA, "verdict", "findings", value=[*raw["verdict"]["findings"], more])
    reseal(bundle)
    with pytest.raises(VerificationError, match=r"asks not for parity\.mean_abs, which is in the metadata"):
        verify_seal(bundle)
    rest = [each for each in raw["verdict"]["findings"] if not each["check"].startswith("parity.")]
    edit(bundle, METADATA, "verdict", "findings", value=rest)
    edit(bundle, METADATA, "metrics", "outputs", value=[])
    edit(bundle, "evidence/metrics.json", "outputs", value=[])
    reseal(bundle)
    with pytest.raises(VerificationError, match="asks for parity, the metadata has no output that was compared"):
        verify_seal(bundle)


def test_of_several_builds_the_interval_covers_the_first(made, tmp_path):
    run, result, _, extra = made
    spec = extra["policy/gate.toml"].replace(b'precision = "fp16"\n', b'precision = "fp16"\nrebuilds = 3\n', 1)
    origin = msgspec.structs.replace(run.provenance, spec_sha256=hashlib.sha256(spec).hexdigest())
    for upper, fits in ((1.9e-3, True), (1e-4, False)):
        first, *others = result.verdict.findings
        spread = msgspec.structs.replace(first, interval=Interval(1e-5, upper), detail="3 builds")
        rebuilt = msgspec.structs.replace(result, verdict=Verdict(findings=(spread, *others)))
        arguments = {
            "run": msgspec.structs.replace(run, engines=(rebuilt,), provenance=origin),
            "result": rebuilt,
            "extra": {**extra, "policy/gate.toml": spec},
        }
        if fits:
            assert sealed(made, tmp_path / "b", **arguments).metadata.verdict.findings[0].interval.upper == upper
        else:
            with pytest.raises(BundleError, match="its metrics give"):
                sealed(made, tmp_path / "c", **arguments)


def test_evidence_on_a_gpu_that_is_not_named_is_refused(bundle):
    edit(bundle, METADATA, "verdict", "findings", 0, "evidence", value="device")
    edit(bundle, METADATA, "verdict", "evidence", value="device")
    reseal(bundle, evidence="device")
    with pytest.raises(VerificationError, match="its findings were made on a GPU, it names none"):
        verify_seal(bundle)


def test_latencies_whose_evidence_was_taken_away_are_not_believed(bundle):
    edit(bundle, METADATA, "latency", value=[])
    edit(bundle, METADATA, "verdict", "findings", 2, "estimate", value=0.001)
    (bundle / LATENCY).unlink()
    reseal(bundle)
    with pytest.raises(VerificationError, match=r"latency\.p99_ms is of no latency in the metadata"):
        verify_seal(bundle)


@pytest.mark.parametrize(
    ("key", "value"),
    [("timed", "gpu_compute"), ("wait", "block"), ("transfers", True), ("axes", {"h": 3})],
)
def test_what_was_timed_is_what_the_spec_asks_for(bundle, key, value):
    edit(bundle, METADATA, "latency", 0, key, value=value)
    reseal(bundle)
    with pytest.raises(VerificationError, match=f"asks for latency with {key} = "):
        verify_seal(bundle)


def test_throughput_of_another_batch_size_is_refused_although_all_numbers_agree(bundle):
    said = json.loads((bundle / METADATA).read_bytes())["latency"][0]["throughput"]
    edit(bundle, METADATA, "latency", 0, "batch", value=64)
    edit(bundle, METADATA, "latency", 0, "throughput", value=64 * said)
    reseal(bundle)
    with pytest.raises(VerificationError, match="asks for latency with batch = 1, the metadata has 64"):
        verify_seal(bundle)


def test_edited_baseline_is_refused_although_every_digest_holds(bundle):
    edit(bundle, "baseline/baseline.json", "task", "top1", value=90)
    reseal(bundle)
    with pytest.raises(VerificationError, match="was changed after it was accepted"):
        verify_seal(bundle)


def resealed(bundle, change):
    """The raw latencies changed, and every digest made anew."""
    raw = json.loads((bundle / LATENCY).read_bytes())
    change(raw)
    (bundle / LATENCY).write_bytes(canonical_json(raw))
    reseal(bundle)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not JSON"),
        (b"\x93NUMPY", "is not UTF-8|is not JSON"),
        (b"null", "is no record of latencies"),
        (b"[]", "is no record of latencies"),
        (b"{}", "is no record of latencies"),
        (b'{"cells":[],"cells":[]}', "stands twice"),
        (b'{"cells":[{"name":"","sessions":[[NaN]]}]}', "not finite"),
        (b'{"cells":[{"name":"","sessions":[["NaN"]]}]}', "is no record of latencies"),
        (b'{"cells":[{"name":"","sessions":[[1.5]]}]}', "is no record of latencies"),
        (b'{"cells":[{"name":"","sessions":[[true]]}]}', "is no record of latencies"),
        (b'{"cells":[{"name":"","sessions":[[0]]}]}', "is no record of latencies"),
        (b'{"cells":[{"name":"","sessions":[[-5]]}]}', "is no record of latencies"),
        (b'{"cells":[{"name":"","sessions":[[]]}]}', "is no record of latencies"),
        (b'{"cells":[{"name":"","sessions":[]}]}', "latency: no inference was timed"),
        (b'{"cells":[{"name":"","sessions":[[5]],"extra":1}]}', "is no record of latencies"),
        (b'{"cells":[]}', "is not of the batch sizes and shapes in the metadata"),
        (b'{"cells":[{"name":"batch=8","sessions":[[5]]}]}', "is not of the batch sizes and shapes"),
    ],
)
def test_raw_latencies_that_are_none_are_refused(bundle, data, message):
    (bundle / LATENCY).write_bytes(data)
    reseal(bundle)
    with pytest.raises(BundleError, match=message):
        verify_seal(bundle)


def change_a_duration(raw):
    raw["cells"][0]["sessions"][2][50] += 100_000_000


def remove_a_session(raw):
    raw["cells"][0]["sessions"].pop()
    raw["cells"][0]["spans_ns"].pop()


def join_two_sessions(raw):
    first, second, *others = raw["cells"][0]["sessions"]
    raw["cells"][0]["sessions"] = [first + second, *others]
    raw["cells"][0]["spans_ns"].pop()


def add_a_comparison(raw):
    raw["cells"][0]["comparisons"]["baseline"] = [{"a_ns": [5], "b_ns": [5]}]


def add_a_cell(raw):
    raw["cells"] *= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_a_duration, "latency.p90_ms is 0.244946, evidence/latency.json gives"),
        (remove_a_session, "evidence/latency.json gives"),
        (join_two_sessions, "latency.sessions is 5, evidence/latency.json gives 4"),
        (add_a_comparison, "does not hold its comparisons"),
        (add_a_cell, "is not of the batch sizes and shapes in the metadata"),
    ],
)
def test_other_raw_latencies_are_refused_although_every_digest_holds(bundle, change, message):
    resealed(bundle, change)
    with pytest.raises(VerificationError, match=message):
        verify_seal(bundle)


def test_latencies_of_fewer_processes_than_a_budget_takes_are_refused_although_all_numbers_agree(bundle):
    resealed(bundle, join_two_sessions)
    raw = json.loads((bundle / LATENCY).read_bytes())["cells"][0]["sessions"]
    edit(bundle, METADATA, "latency", 0, "sessions", value=4)
    edit(bundle, METADATA, "latency", 0, "throughput", value=sum(len(each) * 1e9 / sum(each) for each in raw) / 4)
    reseal(bundle)
    with pytest.raises(
        VerificationError, match="latency.p99_ms's lower bound is 0.248716, evidence/latency.json gives 0"
    ):
        verify_seal(bundle)


COMPARED = b"""  p99_ms = 10.0
  regression = { p50 = 3.0, p95 = "5 %" }
  speedup = { against = "baseline", at_least = 0.5 }
"""


@pytest.fixture
def compared_bundle(made, tmp_path):
    """A bundle of an engine that was timed in turn with its baseline's, and is as fast."""
    run, result, engine, extra = made
    durations = result.latencies[0].durations_ns
    parts = [durations[start : start + 100] * 2 for start in range(0, 500, 100)]
    extra = {**extra, "policy/gate.toml": extra["policy/gate.toml"].replace(b"  p99_ms = 10.0\n", COMPARED)}
    digest = hashlib.sha256(extra["policy/gate.toml"]).hexdigest()
    run = msgspec.structs.replace(run, provenance=msgspec.structs.replace(run.provenance, spec_sha256=digest))
    pairs = tuple(SessionPair(a_ns=part, b_ns=tuple(each + 500 for each in part)) for part in parts)
    ratios = {
        name: estimate([log_ratio(pair.a_ns, pair.b_ns, p) for pair in pairs]) for name, p in RATIO_PERCENTILES.items()
    }
    cell = Cell(batch=1)
    common = {"cell": cell, "against": "the baseline", "n": 1000, "evidence": Evidence.HOST}
    rel_rmse, sqnr, p99, nonfinite = result.verdict.findings
    bounds = percentile_bounds(parts, 0.99)
    p99 = msgspec.structs.replace(p99, n=1000, interval=Interval(bounds.lower / 1e6, bounds.upper / 1e6))
    findings = (
        rel_rmse,
        sqnr,
        p99,
        regression_finding(ratios["p50"], "p50", limit_percent=3.0, **common),
        regression_finding(ratios["p95"], "p95", limit_percent=5.0, **common),
        speedup_finding(ratios["p50"], SpeedupSpec(at_least=0.5), **common),
        nonfinite,
    )
    comparison = Comparison(
        against="baseline",
        title="the baseline",
        sha256=result.engine_sha256,
        ratios=ratios,
        sessions=5,
        seconds=3.0,
        checks=tuple(each.check for each in findings[3:6]),
        stopped="decided after 5 sessions",
        pairs=pairs,
    )
    result = with_latency(
        result,
        comparisons=(comparison,),
        n=1000,
        durations_ns=tuple(itertools.chain(*parts)),
        session_sizes=(200,) * 5,
    )
    verdict = Verdict(findings=findings, required=result.verdict.required)
    result = msgspec.structs.replace(result, verdict=verdict)
    run = msgspec.structs.replace(run, engines=(result, *run.engines[1:]))
    return sealed((run, result, engine, extra), tmp_path / "compared").folder


def test_an_engine_is_sealed_with_every_latency_of_what_it_was_compared_with(compared_bundle):
    assert verify_seal(compared_bundle).steps[4].detail == "PASSED, 7 findings recomputed, evidence: host"
    (cell,) = json.loads((compared_bundle / LATENCY).read_bytes())["cells"]
    assert [len(each["b_ns"]) for each in cell["comparisons"]["baseline"]] == [200] * 5


def slower(raw):
    for pair in raw["cells"][0]["comparisons"]["baseline"]:
        pair["b_ns"] = [2 * each for each in pair["b_ns"]]


def without_pairs(raw):
    raw["cells"][0]["comparisons"]["baseline"] = []


def without_the_comparison(raw):
    raw["cells"][0]["comparisons"] = {}


def of_another(raw):
    raw["cells"][0]["comparisons"] = {"reference": raw["cells"][0]["comparisons"]["baseline"]}


def of_other_inferences(raw):
    raw["cells"][0]["comparisons"]["baseline"][4]["a_ns"].reverse()


def of_fewer(raw):
    raw["cells"][0]["comparisons"]["baseline"][4]["b_ns"].pop()


def without_a_pair(raw):
    raw["cells"][0]["comparisons"]["baseline"].pop()


def backwards(raw):
    raw["cells"][0]["comparisons"]["baseline"][0]["a_ns"][3] = -5


def cut_short(raw):
    raw["cells"][0]["comparisons"]["baseline"][0]["b_ns"] = []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (slower, "baseline: p50 is not what evidence/latency.json gives"),
        (without_pairs, "latency: no session was measured"),
        (without_the_comparison, "latency: no session was measured"),
        (of_another, "latency: no session was measured"),
        (without_a_pair, "the engine's inferences are not those of evidence/latency.json"),
        (of_other_inferences, "the engine's inferences are not those of evidence/latency.json"),
        (of_fewer, "a session has not as many inferences of both engines"),
        (backwards, "inference 3 took -5 ns"),
        (cut_short, "no inference was timed"),
    ],
)
def test_other_pairs_are_refused_although_every_digest_holds(compared_bundle, change, message):
    resealed(compared_bundle, change)
    with pytest.raises(VerificationError, match=message):
        verify_seal(compared_bundle)


RATIOS = ("latency", 0, "comparisons", 0, "ratios")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((*RATIOS, "p50", "ratio"), 0.5, "baseline: p50 is not what"),
        ((*RATIOS, "p95", "sd"), 0.5, "baseline: p95 is not what"),
        ((*RATIOS, "p95", "interval", "upper"), 0.5, "baseline: p95 is not what"),
        ((*RATIOS, "p95", "interval", "lower"), "-Infinity", "baseline: p95 is not what"),
        (RATIOS, {}, "ratios are of p50, p95, it has $"),
        ((*RATIOS, "p99"), {"ratio": 1.0, "interval": {"lower": 1.0, "upper": 1.0}, "sd": 0.0}, "it has p50, p95, p99"),
        (("latency", 0, "comparisons", 0, "sessions"), 20, "20 sessions are said, others are held"),
        (("latency", 0, "streams"), 2, "latency.throughput is"),
        (("latency", 0, "comparisons", 0, "against"), "reference", "no session was measured"),
        (("latency", 0, "comparisons"), [], "does not hold its comparisons"),
        (("latency", 0, "comparisons", 0, "checks"), [], "latency.regression_p50 is of no latency in the metadata"),
        (("verdict", "findings", 3, "estimate"), -50.0, "latency.regression_p50 is -50, evidence/latency.json gives"),
        (("verdict", "findings", 4, "interval", "upper"), 0.0, "latency.regression_p95's upper bound is 0"),
        (("verdict", "findings", 5, "estimate"), 9.0, "latency.speedup is 9, evidence/latency.json gives 1.0"),
        (("verdict", "findings", 5, "interval", "lower"), 0.9, "latency.speedup's lower bound is 0.9"),
        (("verdict", "findings", 5, "n"), 10**9, r"latency.speedup's n is 1e\+09, evidence/latency.json gives 1000"),
        (
            ("verdict", "findings", 3, "limit", "value"),
            900.0,
            "asks for latency.regression_p50 with a limit of 3.0, .* 900",
        ),
        (("latency", 0, "comparisons", 0, "sha256"), "b" * 64, "the latency was compared with bbbb"),
    ],
)
def test_edited_comparisons_are_refused_although_every_digest_holds(compared_bundle, path, value, message):
    edit(compared_bundle, METADATA, *path, value=value)
    reseal(compared_bundle)
    with pytest.raises(VerificationError, match=message):
        verify_seal(compared_bundle)


def test_a_comparison_with_another_engine_than_the_spec_asks_for_is_refused(compared_bundle):
    edit(compared_bundle, METADATA, "latency", 0, "comparisons", 0, "against", value="itself")
    resealed(
        compared_bundle,
        lambda raw: raw["cells"][0].update(comparisons={"itself": raw["cells"][0]["comparisons"]["baseline"]}),
    )
    with pytest.raises(VerificationError, match="asks for latency against baseline, the metadata has others"):
        verify_seal(compared_bundle)


def test_a_comparison_without_its_pairs_is_not_sealed(made, compared_bundle, tmp_path):
    run, result, _, _ = made
    metadata = verify_seal(compared_bundle).metadata
    comparison = Comparison(
        against="baseline",
        title="the baseline",
        sha256=None,
        ratios={},
        sessions=metadata.latency[0].comparisons[0].sessions,
        seconds=3.0,
        checks=(),
        stopped="decided after 5 sessions",
    )
    bare = with_latency(result, comparisons=(comparison,))
    with pytest.raises(BundleError, match="seal from the run itself, not from its report"):
        sealed(made, tmp_path / "b", run=msgspec.structs.replace(run, engines=(bare,)), result=bare)


@pytest.mark.parametrize("name", [METADATA, VERDICT_PATH])
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"{", b'{"created": "x", "created": "x",', "stands twice"),
        (b"{", b'{"x": NaN,', "not finite"),
        (b"{", b"\xff{", "not UTF-8"),
        (b"{", b"[" * 100 + b"{", "is not JSON"),
    ],
)
def test_json_with_more_than_one_meaning_is_refused(bundle, name, old, new, message):
    data = (bundle / name).read_bytes().replace(old, new, 1)
    (bundle / name).write_bytes(data)
    if name == METADATA:
        statement = statement_of(bundle)
        statement["subject"][0]["digest"]["sha256"] = hashlib.sha256(data).hexdigest()
        statement["subject"][0]["annotations"]["size_bytes"] = len(data)
        state(bundle, statement)
    with pytest.raises(BundleError, match=message):
        verify_seal(bundle)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("_type",), "https://in-toto.io/Statement/v0.1"),
        (("predicateType",), "https://example.org/other"),
        (("predicate", "status"), "fine"),
        (("predicate", "extra"), 1),
        (("extra",), 1),
        (("subject",), []),
        (("subject", 0, "name"), "../metadata.json"),
    ],
)
def test_a_statement_of_another_shape_is_refused(bundle, path, value):
    edit(bundle, VERDICT_PATH, *path, value=value)
    with pytest.raises(VerificationError, match="does not hold a verdict"):
        verify_seal(bundle)


@pytest.mark.parametrize(
    ("key", "value"), [("evidence", "device"), ("model_id", "other"), ("engine", "other"), ("gate_version", "9")]
)
def test_a_predicate_that_says_something_else_is_refused(bundle, key, value):
    edit(bundle, VERDICT_PATH, "predicate", key, value=value)
    with pytest.raises(VerificationError, match="is not that of the metadata"):
        verify_seal(bundle)


@pytest.mark.parametrize("status", ["FAILED", "INCONCLUSIVE"])
def test_a_verdict_that_did_not_pass_is_refused_by_its_name(bundle, status):
    edit(bundle, VERDICT_PATH, "predicate", "status", value=status)
    with pytest.raises(VerificationError, match=f"its verdict is {status}: only what PASSED is released"):
        verify_seal(bundle)


@pytest.mark.parametrize("again", [b" ", b"\n"])
def test_an_envelope_or_statement_written_in_another_way_is_refused(bundle, again):
    data = (bundle / VERDICT_PATH).read_bytes()
    (bundle / VERDICT_PATH).write_bytes(data + again)
    with pytest.raises(VerificationError, match="is not written as sealing writes it"):
        verify_seal(bundle)
    state(bundle, canonical_json(statement_of(bundle)) + again)
    with pytest.raises(VerificationError, match="its verdict is not written as sealing writes it"):
        verify_seal(bundle)


def test_a_file_listed_twice_is_refused(bundle):
    subjects = statement_of(bundle)["subject"]
    edit(bundle, VERDICT_PATH, "subject", value=[*subjects, subjects[0]])
    with pytest.raises(VerificationError, match="lists a file twice"):
        verify_seal(bundle)


def test_each_step_is_told_and_the_one_that_fails_says_why(bundle):
    told = []
    (bundle / "policy" / "gate.toml").write_bytes(b"x")
    with pytest.raises(DigestMismatch, match="gate.toml"):
        verify_seal(bundle, on_step=told.append)
    assert [(step.name, step.ok) for step in told] == [
        ("tree", True),
        ("signature", True),
        ("schema", True),
        ("digests", False),
    ]
    assert isinstance(told[-1], Step)
    assert told[-1].detail.startswith("policy/gate.toml: its sha256 is")


def test_what_did_not_pass_cannot_be_sealed(made, tmp_path):
    with pytest.raises(MeasurementError, match="only what passed can be sealed; FAILED: parity.rel_rmse"):
        sealed(made, tmp_path / "b", result=made[0].engines[1])
    assert list(tmp_path.iterdir()) == []


def test_the_verdict_of_another_engine_cannot_seal_this_one(made, tmp_path):
    run, result, engine, extra = made
    with pytest.raises(BundleError, match="the verdict is not that of engine 'ort-int8'"):
        seal(
            result.verdict.require_passed(),
            run=run,
            result=run.engines[1],
            engine_file=engine,
            extra=extra,
            out=tmp_path / "b",
        )
    passed_elsewhere = msgspec.structs.replace(run.engines[1], verdict=result.verdict)
    with pytest.raises(BundleError, match="is not one of this run's"):
        sealed(made, tmp_path / "b", result=passed_elsewhere)


def test_another_engine_file_cannot_be_sealed(made, tmp_path):
    other = tmp_path / "model.onnx"
    other.write_bytes(ENGINE + b"x")
    with pytest.raises(DigestMismatch, match="is not the engine that was checked"):
        sealed(made, tmp_path / "b", engine_file=other)
    other.unlink()
    other.symlink_to(made[2])
    with pytest.raises(BundleError, match="is a symbolic link"):
        sealed(made, tmp_path / "b", engine_file=other)
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy/gate.toml": b"other"}, "gate.toml: is not the spec"),
        ({"policy/gate.toml": None}, "needs the spec it was judged by"),
        ({"baseline/baseline.json": None}, "was judged by baseline"),
        ({"baseline/baseline.json": b"{}"}, "baseline.json: is not a baseline"),
        ({"../x": b"x"}, "cannot be a file of a bundle"),
        ({"a/.x": b"x"}, "cannot be a file of a bundle"),
        ({"/x": b"x"}, "cannot be a file of a bundle"),
        ({"seals/verdict.dsse.json": b"x"}, "is written by sealing itself"),
        ({"artifacts/model.plan": b"x"}, "is written by sealing itself"),
        ({METADATA: b"x"}, "is written by sealing itself"),
        ({"evidence/x": Path("/nonexistent")}, "/nonexistent: is missing"),
    ],
)
def test_what_does_not_belong_into_a_bundle_is_refused_and_leaves_nothing(made, tmp_path, changes, message):
    extra = {name: content for name, content in {**made[3], **changes}.items() if content is not None}
    with pytest.raises(BundleError, match=message):
        sealed(made, tmp_path / "b", extra=extra)
    assert list(tmp_path.iterdir()) == []


def test_more_files_may_be_sealed_from_bytes_or_from_disk(made, tmp_path):
    (tmp_path / "table").write_bytes(b"table")
    extra = {**made[3], "artifacts/more.bin": tmp_path / "table", "evidence/log.txt": b"log"}
    verified = sealed(made, tmp_path / "b", extra=extra)
    assert (verified.folder / "artifacts" / "more.bin").read_bytes() == b"table"
    assert "evidence/log.txt" in verified.metadata.files


def with_latency(result, **changes):
    return msgspec.structs.replace(result, latencies=(msgspec.structs.replace(result.latencies[0], **changes),))


def test_a_run_read_from_its_report_has_no_raw_latencies_to_seal(made, tmp_path):
    run, result, _, _ = made
    bare = with_latency(result, durations_ns=())
    again = msgspec.structs.replace(run, engines=(bare,))
    with pytest.raises(BundleError, match="has 0 raw latencies of 500"):
        sealed(made, tmp_path / "b", run=again, result=bare)


def test_metrics_whose_own_numbers_disagree_are_not_sealed(made, tmp_path):
    run, result, _, _ = made
    wrong = with_latency(result, p99_ms=0.001)
    again = msgspec.structs.replace(run, engines=(wrong,))
    with pytest.raises(BundleError, match="cannot be sealed: artifacts/metadata.json: latency.p99_ms is 0.001"):
        sealed(made, tmp_path / "b", run=again, result=wrong)
    assert list(tmp_path.iterdir()) == []


def test_sealing_the_same_run_again_finds_the_same_bundle(made, tmp_path):
    first = sealed(made, tmp_path / "b")
    before = {name: (tmp_path / "b" / name).read_bytes() for name in FILES}
    assert sealed(made, tmp_path / "b").statement == first.statement
    assert {name: (tmp_path / "b" / name).read_bytes() for name in FILES} == before
    assert [each.name for each in tmp_path.iterdir()] == ["b"]


def later(made):
    run, result, engine, extra = made
    again = msgspec.structs.replace(run, created="2027-01-01T00:00:00Z")
    return again, result, engine, extra


def test_another_bundle_is_kept_unless_it_is_to_be_replaced(made, tmp_path):
    sealed(made, tmp_path / "b")
    with pytest.raises(BundleError, match="is there already and holds another bundle"):
        sealed(later(made), tmp_path / "b")
    assert verify_seal(tmp_path / "b").metadata.created == "2026-11-21T10:02:11Z"
    sealed(later(made), tmp_path / "b", replace=True)
    assert verify_seal(tmp_path / "b").metadata.created == "2027-01-01T00:00:00Z"
    assert [each.name for each in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_that_is_no_bundle_is_never_replaced(made, tmp_path, replace):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_bytes(b"years of work")
    with pytest.raises(BundleError, match="is there already and"):
        sealed(made, tmp_path / "b", replace=replace)
    assert (tmp_path / "b" / "thesis.txt").read_bytes() == b"years of work"
    assert [each.name for each in tmp_path.iterdir()] == ["b"]


def test_a_damaged_bundle_is_kept_unless_it_is_to_be_replaced(made, tmp_path):
    bundle = sealed(made, tmp_path / "b").folder
    (bundle / "policy" / "gate.toml").write_bytes(b"x")
    with pytest.raises(BundleError, match="does not verify, so it was kept"):
        sealed(made, tmp_path / "b")
    assert sealed(made, tmp_path / "b", replace=True).metadata.engine == "ort-fp16"


def test_an_unbounded_interval_survives(made, tmp_path):
    run, result, _, _ = made
    unbounded = Finding(
        check="memory.free_mib",
        estimate=80.0,
        interval=Interval(70.0, math.inf),
        limit=Limit("at_least", 50.0),
        n=3,
        evidence=Evidence.HOST,
    )
    more = msgspec.structs.replace(result, verdict=Verdict(findings=(*result.verdict.findings, unbounded)))
    sealed(made, tmp_path / "b", run=msgspec.structs.replace(run, engines=(more,)), result=more)
    finding = verify_seal(tmp_path / "b").metadata.verdict.findings[-1]
    assert finding.interval.upper == "Infinity"
    assert finding.finding().interval.upper == math.inf


def test_a_copied_bundle_verifies(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "copy")
    assert verify_seal(tmp_path / "copy").engine == tmp_path / "copy" / engine_path_of("onnxruntime")


def test_required_checks_are_sealed_with_the_verdict(made, tmp_path):
    run, result, _, _ = made
    verdict = Verdict(findings=result.verdict.findings, required=("parity.rel_rmse",))
    asked = msgspec.structs.replace(result, verdict=verdict)
    verified = sealed(made, tmp_path / "b", run=msgspec.structs.replace(run, engines=(asked,)), result=asked)
    assert verified.metadata.verdict.required == ("parity.rel_rmse",)


SCRIPT = """
    import json, os, signal, sys
    from pathlib import Path
    import msgspec
    from gate.baseline import baseline_from_result, read_baseline, write_baseline
    from gate.errors import BaselineError, BundleError
    from gate.results import run_from_builtins
    from gate.store import seal, verify_seal

    data, engine, root, how = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    run = run_from_builtins(json.loads((data / "run.json").read_bytes()))
    durations = tuple(200_000 + (i * 7919) % 50_000 for i in range(500))
    first = run.engines[0]
    latency = msgspec.structs.replace(first.latencies[0], durations_ns=durations)
    result = msgspec.structs.replace(first, latencies=(latency,))
    run = msgspec.structs.replace(run, engines=(result,))
    later = msgspec.structs.replace(run, created="2027-01-01T00:00:00Z")
    extra = {"policy/gate.toml": (data / "sealed.toml").read_bytes()}

    def write(which, replace):
        baseline = baseline_from_result(which, result, who="a", when=which.created, why="b")
        write_baseline(root / "baselines" / "cpu.json", baseline)
        passed = result.verdict.require_passed()
        seal(passed, run=which, result=result, engine_file=engine, extra=extra, out=root / "bundle", replace=replace)

    write(run, False)
    steps, step, seen = 0, 0, 0
    while True:
        step += 3
        pid = os.fork()
        if pid == 0:
            seen = 0

            def stop(event, args):
                global seen
                if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.scandir", "os.listdir", "fcntl.flock"):
                    seen += 1
                    if seen == step and how == "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    if seen == step:
                        raise KeyboardInterrupt

            sys.addaudithook(stop)
            try:
                write(later, True)
            except KeyboardInterrupt:
                os._exit(3)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        steps += 1
        # Both are whole, the old one or the new one.
        assert read_baseline(root / "baselines" / "cpu.json").accepted.when in (run.created, later.created)
        assert verify_seal(root / "bundle").metadata.created in (run.created, later.created)
        if how == "interrupt":
            names = {each.name for each in (*root.iterdir(), *(root / "baselines").iterdir())}
            assert names == {"baselines", "bundle", "cpu.json"}, names
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 3:
            assert os.WEXITSTATUS(status) == 0
            break
    assert verify_seal(root / "bundle").metadata.created == later.created
    write(later, True)
    assert {each.name for each in (*root.iterdir(), *(root / "baselines").iterdir())} == {
        "baselines", "bundle", "cpu.json"
    }
    print(steps)
"""


@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_stopping_at_any_step_leaves_the_old_or_the_new_and_never_a_half(made, tmp_path, how):
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(DATA), str(made[2]), str(tmp_path), how]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5


RANGES = b"TRT-8600-EntropyCalibration2\nx: 3c010a14\n"
CACHE = b'{"format":"trt-gate calibration 1"}\n' + RANGES
CALIBRATION = "artifacts/calibration.cache"


@pytest.fixture
def calibrated(made, tmp_path):
    """What `sealed` takes for an engine that TensorRT calibrated, and its bundle."""
    run, result, engine, extra = made
    digests = {"calibration_cache": hashlib.sha256(RANGES).hexdigest()}
    result = msgspec.structs.replace(result, build=msgspec.structs.replace(result.build, digests=digests))
    run = msgspec.structs.replace(run, engines=(result, *run.engines[1:]))
    changed = (run, result, engine, {**extra, CALIBRATION: CACHE})
    return changed, sealed(changed, tmp_path / "calibrated").folder


def test_the_ranges_that_an_engine_was_calibrated_with_are_sealed_beside_it(calibrated):
    _, bundle = calibrated
    assert (bundle / CALIBRATION).read_bytes() == CACHE
    assert "artifacts/calibration.cache" in verify_seal(bundle).files


def test_a_calibrated_engine_is_not_sealed_without_its_ranges(calibrated, tmp_path):
    (run, result, engine, extra), _ = calibrated
    without = {name: data for name, data in extra.items() if name != CALIBRATION}
    with pytest.raises(BundleError, match="goes with an engine that TensorRT calibrated"):
        sealed((run, result, engine, without), tmp_path / "out")


def test_ranges_beside_an_engine_that_was_not_calibrated_are_refused(made, tmp_path):
    run, result, engine, extra = made
    with pytest.raises(BundleError, match="and with no other"):
        sealed((run, result, engine, {**extra, CALIBRATION: CACHE}), tmp_path / "out")


@pytest.mark.parametrize("data", [CACHE.replace(b"3c01", b"3c02"), b"", b"no second line"])
def test_other_ranges_than_the_engine_was_built_with_are_refused_although_every_digest_holds(calibrated, data):
    _, bundle = calibrated
    (bundle / CALIBRATION).write_bytes(data)
    reseal(bundle)
    with pytest.raises(DigestMismatch, match="holds other ranges than the engine was built with"):
        verify_seal(bundle)


def test_missing_ranges_are_refused_although_every_digest_holds(calibrated):
    _, bundle = calibrated
    (bundle / CALIBRATION).unlink()
    reseal(bundle)
    with pytest.raises(VerificationError, match="do not agree on a calibration cache"):
        verify_seal(bundle)


def test_each_kind_of_engine_has_its_own_name_in_a_bundle():
    assert engine_path_of("onnxruntime") == "artifacts/model.onnx"
    assert engine_path_of("tensorrt") == engine_path_of("tensorrt_rtx") == "artifacts/model.plan"
    assert engine_path_of("torch") == "artifacts/model.pt2"


@pytest.fixture
def scored_bundle(made, tmp_path):
    """A bundle of an engine with the scores of a task."""
    run, result, engine, extra = made
    kind = kind_named("regression")
    metric = kind.make({}, None)
    values = np.arange(12.0).reshape(6, 2)
    metric.add({"y": values + 0.5}, reference={"y": values}, targets=list(values), first_sample=0)
    statistics = metric.statistics()
    result = msgspec.structs.replace(result, scores=measured_values(statistics, statistics, kind=kind))
    run = msgspec.structs.replace(run, engines=(result, *run.engines[1:]))
    return sealed((run, result, engine, extra), tmp_path / "scored").folder


def test_scores_are_computed_again_from_what_each_sample_contributes(scored_bundle):
    verified = verify_seal(scored_bundle)
    assert "evidence/scores.json" in verified.files
    metrics = json.loads((scored_bundle / "evidence/metrics.json").read_bytes())
    assert metrics["scores"]["values"]["rmse"] == 0.5
    assert metrics["scores"]["statistics"] == ""


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (
            [
                (METADATA, "metrics", "scores", "values", "rmse", 0.1),
                ("evidence/metrics.json", "scores", "values", "rmse", 0.1),
            ],
            "gives rmse = 0.5, the metadata says 0.1",
        ),
        ([("evidence/scores.json", "statistics", "AAAA")], "cannot be read"),
        ([("evidence/scores.json", "kind", "detection")], "is not of regression"),
    ],
)
def test_scores_that_are_not_those_of_the_samples_are_refused(scored_bundle, edits, message):
    for name, *path, value in edits:
        edit(scored_bundle, name, *path, value=value)
    reseal(scored_bundle)
    with pytest.raises(VerificationError, match=message):
        verify_seal(scored_bundle)


def test_scores_without_their_samples_are_refused(scored_bundle):
    (scored_bundle / "evidence/scores.json").unlink()
    reseal(scored_bundle)
    with pytest.raises(VerificationError, match="do not agree on the task's scores"):
        verify_seal(scored_bundle)


@pytest.mark.parametrize(
    ("check", "estimate", "true"),
    [
        ("task.rmse", 0.5, True),
        ("task.rmse", 0.1, False),
        ("task.rmse_rise", 0.0, True),
        ("task.rmse_rise", -0.3, False),
        ("task.rmse_ratio", 1.0, True),
        ("task.rmse_ratio", 0.9, False),
        ("task.top1", 0.9, True),
    ],
)
def test_a_finding_of_a_task_is_what_its_scores_give(made, tmp_path, check, estimate, true):
    run, result, engine, extra = made
    kind = kind_named("regression")
    metric = kind.make({}, None)
    values = np.arange(12.0).reshape(6, 2)
    metric.add({"y": values + 0.5}, reference={"y": values}, targets=list(values), first_sample=0)
    statistics = metric.statistics()
    finding = Finding(
        check=check,
        estimate=estimate,
        interval=Interval(estimate, estimate),
        limit=Limit("at_most", 2.0),
        n=6,
        evidence=Evidence.HOST,
    )
    others = tuple(each for each in result.verdict.findings if each.check != check)
    result = msgspec.structs.replace(
        result,
        scores=measured_values(statistics, statistics, kind=kind),
        verdict=Verdict(findings=(*others, finding), required=result.verdict.required),
    )
    run = msgspec.structs.replace(run, engines=(result, *run.engines[1:]))
    arguments = {"run": run, "result": result, "engine_file": engine, "extra": extra, "out": tmp_path / "b"}
    if true:
        assert (
            verify_seal(seal(result.verdict.require_passed(), **arguments).folder).metadata.metrics.scores is not None
        )
        return
    with pytest.raises((VerificationError, BundleError), match=f"{check} is {estimate:g}, its scores give"):
        verify_seal(seal(result.verdict.require_passed(), **arguments).folder)
