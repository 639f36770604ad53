"""`gate latency`, and what `gate check` takes for it: real engines on ONNX Runtime, real sessions."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from gate.baseline import accept
from gate.pipeline import CheckOptions, Silence, check, seal_passed
from gate.spec import read_spec
from tests.cli import conftest as tiny
from tests.latency.test_exported_times import trtexec

HALF = """
[[engine]]
name = "half"
backend = "onnxruntime"
precision = "fp16"
  [engine.parity]
"""
REGRESSION = (
    '  [engine.latency]\n  samples = 100\n  warm_up_s = 0.0\n  regression = { against = "baseline", p50 = "900 %" }\n'
)
MANY = "900,900"
"""Percent that no noise of a machine reaches."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two engines, checked, sealed into `dist` and accepted; read only."""
    root = tmp_path_factory.mktemp("made")
    file = read_spec(tiny.write(root, tiny.SPEC + HALF))
    run = check(file, CheckOptions(cache=root / ".gate/cache", baselines=root / "baselines"), Silence())
    seal_passed(file, run, root / "dist", baselines=root / "baselines")
    accept(run, root=root / "baselines", who="Ada", when="2026-11-21T10:00:00Z", why="first release")
    return root


@pytest.fixture
def ready(project, made):
    """The working folder with all of it."""
    shutil.copytree(made, project, dirs_exist_ok=True)
    return project


@pytest.fixture
def exported(project):
    """Five files of trtexec, 200 inferences of 0.5 to 0.51 ms each and copies of 0.1875 ms; returns their names."""
    for index in range(5):
        times = 0.5 + 0.01 * np.random.default_rng(index).random(200)
        (project / f"{index}.json").write_text(trtexec(times))
    return tuple(f"{index}.json" for index in range(5))


def numbers(outcome):
    """What `--json` printed, as any reader of JSON takes it: without NaN and Infinity."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(outcome.out, parse_constant=refuse)


def statuses(found):
    return {each["check"]: each["status"] for each in found["findings"]}


def flip(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(bytes(data))


def test_an_engine_is_measured_where_nothing_is_asked_for(gate_command, ready):
    outcome = gate_command("latency", "gate.toml::ort")
    assert outcome.code == 0, outcome.err
    first, *_, last = outcome.out.splitlines()
    found = re.match(r"Latency \(host_wall, batch 1, n = (\d+), 5 sessions, 1000 warm-up\): p50 0\.0", first)
    assert found is not None, first
    assert 1000 <= int(found.group(1)) <= 20_000
    assert "nothing to decide, measured after 5 sessions, " in first
    assert last == "nothing was asked for, so nothing was judged: give a budget (--p99 MS) or --against B"
    assert "latency     ort" in outcome.err.splitlines()


def test_limits_are_judged_together_and_the_worst_decides_the_exit_code(gate_command, ready):
    outcome = gate_command(
        "latency", "gate.toml::ort", "--against", "half", "--tolerance", MANY, "--speedup", "1000", "--p99", "1000"
    )
    assert outcome.code == 1, outcome.err
    lines = outcome.out.splitlines()
    found = {line.split()[1].rstrip(":"): line.split()[0] for line in lines if line[:6] in ("PASSED", "FAILED")}
    assert found == {
        "latency.p99_ms": "PASSED",
        "latency.regression_p50": "PASSED",
        "latency.regression_p95": "PASSED",
        "latency.speedup": "FAILED",
    }
    assert any(line.startswith("  Against engine half, in turn with it in ") for line in lines)


def test_bundles_are_timed_against_each_other_at_every_batch_size(gate_command, ready):
    outcome = gate_command(
        "latency", "dist/tiny/ort", "--against", "dist/tiny/half", "--tolerance", "900", "--batch", "1,8", "--json"
    )
    assert outcome.code == 0, outcome.err
    found = numbers(outcome)
    assert found["status"] == "PASSED"
    assert statuses(found) == {
        "latency.regression_p50[batch=1]": "PASSED",
        "latency.regression_p50[batch=8]": "PASSED",
    }
    assert [(each["name"], each["batch"]) for each in found["latencies"]] == [("batch=1", 1), ("batch=8", 8)]
    for each in found["latencies"]:
        (comparison,) = each["comparisons"]
        assert comparison["title"].endswith("dist/tiny/half")
        assert len(comparison["pairs"]) == comparison["sessions"] == each["sessions"] >= 5
        assert sum(len(pair["a_ns"]) for pair in comparison["pairs"]) == each["n"] == len(each["durations_ns"])
        assert all(len(pair["b_ns"]) >= 200 for pair in comparison["pairs"])
        assert sum(each["session_sizes"]) == each["n"]
        assert all(isinstance(value, int) and value > 0 for value in each["durations_ns"])
        assert each["stopped"].startswith("decided after ")


def test_the_accepted_engine_is_found_by_its_digest(gate_command, ready):
    outcome = gate_command(
        "latency", "gate.toml::ort", "--against", "baseline", "--bundles", "dist", "--tolerance", "900", "--json"
    )
    assert outcome.code == 0, outcome.err
    (latency,) = numbers(outcome)["latencies"]
    accepted = json.loads((ready / "baselines/tiny/ort/cpu.json").read_bytes())["engine_sha256"]
    assert latency["comparisons"][0]["sha256"] == accepted


def test_too_little_time_is_inconclusive_and_says_why_and_why_it_stopped(gate_command, ready):
    outcome = gate_command(
        "latency", "gate.toml::ort", "--against", "reference", "--speedup", "0.001", "--max-time", "0.05", "--json"
    )
    assert outcome.code == 3, outcome.err
    found = numbers(outcome)
    assert found["status"] == "INCONCLUSIVE"
    assert statuses(found) == {"latency.speedup": "INCONCLUSIVE"}
    assert "1 session, the rule takes at least 5" in found["findings"][0]["detail"]
    (latency,) = found["latencies"]
    assert latency["stopped"].startswith("max_time_s = 0.05 s ")
    assert "1 session" in latency["stopped"]
    assert latency["comparisons"][0]["sha256"] is None
    assert latency["comparisons"][0]["title"].startswith("the reference, torch ")


def test_too_little_time_for_a_budget_is_inconclusive_on_the_screen_too(gate_command, ready):
    outcome = gate_command("latency", "gate.toml::ort", "--p50", "1000", "--p99", "1000", "--max-time", "0.01")
    assert outcome.code == 3
    assert "max_time_s = 0.01 s was over after 1 session" in outcome.out.splitlines()[0]
    found = [line for line in outcome.out.splitlines() if line.startswith("INCONCLUSIVE")]
    assert [line.split()[1] for line in found] == ["latency.p50_ms:", "latency.p99_ms:"]
    assert "p99 needs at least 459 samples, has " in outcome.out
    assert "p50 needs more processes, has 1 session; raise max_time_s" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gate.toml",), "has 2 engines, and one is timed: ort, half\ngate latency gate.toml::ort"),
        (("gate.toml::orf",), "there is no engine 'orf'; did you mean 'ort'?"),
        (("nowhere.toml::ort",), "nowhere.toml: there is no such file"),
        (
            ("ort",),
            "ort: there is no such file, and no such bundle\nAn engine is named with its spec, such as gate.toml",
        ),
        (("gate.toml::ort", "--against", "halff"), "did you mean 'half'?"),
        (("gate.toml::ort", "--against", "dist/nowhere"), "nor a bundle"),
        (("gate.toml::ort", "--against", "gate.toml::nope"), "there is no engine 'nope'"),
        (("dist/tiny/ort", "--against", "reference"), "a bundle has no reference beside it"),
        (("dist/tiny/ort", "--against", "baseline"), "a bundle has no baseline beside it"),
        (("gate.toml::ort", "half"), "there is one A, got 'half' beside it\nName the other with --against."),
        (("gate.toml::ort", "--tolerance", "3"), "compare two engines\nName the other with --against."),
        (("gate.toml::ort", "--speedup", "2"), "compare two engines\nName the other with --against."),
        (("gate.toml::ort", "--against", "half", "--tolerance", "1,2,3"), "one or two percentages, such as 3,5"),
        (("gate.toml::ort", "--against", "half", "--tolerance", "nan"), "got 'nan %'"),
        (("gate.toml::ort", "--against", "half", "--tolerance=-3"), "got '-3 %'"),
        (("gate.toml::ort", "--against", "half", "--tolerance", "0"), "regression p50 is above 0 %, got 0 %"),
        (("gate.toml::ort", "--against", "half", "--speedup", "0"), "an option is out of its range"),
        (("gate.toml::ort", "--against", "half", "--streams", "2"), "they need streams = 1"),
        (("gate.toml::ort", "--p99", "nan"), "p99"),
        (("gate.toml::ort", "--p99", "-1"), "p99_ms"),
        (("gate.toml::ort", "--p50", "soon"), "argument --p50: invalid float value: 'soon'"),
        (("gate.toml::ort", "--throughput", "0"), "throughput_at_least"),
        (("gate.toml::ort", "--batch", "0"), "batch"),
        (("gate.toml::ort", "--batch", "one"), "argument --batch: needs whole numbers, got 'one'"),
        (("gate.toml::ort", "--batch", "17"), "batch = 17 is outside the profile (1 to 16)"),
        (("gate.toml::ort", "--batch", "8,8"), "measures batch=8 twice"),
        (("gate.toml::ort", "--batch", "8,8", "--p50", "1"), "measures batch=8 twice"),
        (("gate.toml::ort", "--timed", "gpu_compute"), "--timed gpu_compute needs an engine on a GPU"),
        (("gate.toml::ort", "--max-time", "0"), "argument --max-time: needs seconds above 0, got '0'"),
        (("gate.toml::ort", "--max-time", "nan"), "argument --max-time: needs seconds above 0, got 'nan'"),
        (("gate.toml::ort", "--max-tim", "1"), "unrecognized arguments: --max-tim"),
        ((), "the following arguments are required: A"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_use_exits_2_and_says_what_is_meant(gate_command, ready, arguments, message):
    outcome = gate_command("latency", *arguments)
    assert outcome.code == 2, outcome.out + outcome.err
    assert message in outcome.err
    assert outcome.out == ""


@pytest.mark.parametrize("option", ["--p50", "--p90", "--p95", "--p99", "--p99.9", "--throughput"])
def test_a_limit_that_is_not_finite_is_refused(gate_command, exported, option):
    outcome = gate_command("latency", *exported, option, "inf")
    assert outcome.code == 2, outcome.out
    assert "inf" in outcome.err
    assert outcome.out == ""


@pytest.mark.parametrize("name", ["artifacts/model.onnx", "artifacts/metadata.json", "policy/gate.toml"])
def test_a_tampered_bundle_is_refused_as_a_and_as_b_and_as_the_baseline(gate_command, ready, name):
    flip(ready / "dist/tiny/ort" / name)
    for arguments in (
        ("dist/tiny/ort",),
        ("dist/tiny/half", "--against", "dist/tiny/ort"),
        ("gate.toml::half", "--against", "./dist/tiny/ort"),
        ("gate.toml::ort", "--against", "baseline", "--bundles", "dist"),
    ):
        outcome = gate_command("latency", *arguments)
        assert outcome.code == 4, (arguments, outcome)
        assert f"dist/tiny/ort/{name}: its sha256 is " in outcome.err
        assert outcome.out == ""


def test_a_folder_that_is_no_bundle_is_refused(gate_command, ready):
    (ready / "empty").mkdir()
    outcome = gate_command("latency", "empty")
    assert outcome.code == 4
    assert "empty: is an empty folder" in outcome.err


def test_a_baseline_without_its_bundle_is_an_error_that_says_what_to_do(gate_command, ready):
    outcome = gate_command("latency", "gate.toml::ort", "--against", "baseline")
    assert outcome.code == 1
    assert "bundles/tiny/ort: the accepted baseline's engine is not at hand" in outcome.err
    assert "--bundles DIR" in outcome.err
    assert outcome.out == ""


def test_engines_that_take_other_inputs_are_not_timed_in_turn(gate_command, ready):
    (ready / "wide").mkdir()
    tiny.write(ready / "wide", tiny.SPEC.replace('["batch", 4]', '["batch", 5]'))
    outcome = gate_command("latency", "dist/tiny/ort", "--against", "wide/gate.toml::ort")
    assert outcome.code == 2
    assert "A takes input float32 [batch, 4], and B takes input float32 [batch, 5]" in outcome.err
    tiny.write(
        ready / "wide", tiny.SPEC.replace('["batch", 4]', '["batch", "n", 4]\nn = { min = 1, opt = 2, max = 4 }')
    )
    outcome = gate_command("latency", "dist/tiny/ort", "--against", "wide/gate.toml::ort")
    assert outcome.code == 2, outcome.out
    assert "B takes input float32 [batch, n, 4]" in outcome.err


def test_a_batch_size_outside_the_profile_of_b_is_refused_before_anything_is_timed(gate_command, ready):
    (ready / "small").mkdir()
    tiny.write(ready / "small", tiny.SPEC.replace("max = 16", "max = 8"))
    outcome = gate_command("latency", "dist/tiny/ort", "--against", "small/gate.toml::ort", "--batch", "16")
    assert outcome.code == 2, outcome.out
    assert "batch = 16 is outside the profile (1 to 8)" in outcome.err


def test_an_engine_of_a_backend_that_only_compiles_here_is_not_timed(gate_command, ready):
    tiny.write(ready, tiny.SPEC + HALF.replace("half", "rtx").replace('"onnxruntime"', '"tensorrt_rtx"'))
    outcome = gate_command("latency", "gate.toml::rtx", "--p50", "1000")
    assert outcome.code == 2
    assert "tensorrt_rtx" in outcome.err
    assert outcome.out == ""


def test_every_budget_is_judged_on_what_trtexec_wrote(gate_command, exported):
    budgets = [part for name in ("p50", "p90", "p95", "p99") for part in (f"--{name}", "0.8")]
    outcome = gate_command("latency", *exported, *budgets, "--throughput", "1000", "--json")
    assert outcome.code == 0, outcome.err
    found = numbers(outcome)
    assert statuses(found) == {
        f"latency.{name}": "PASSED" for name in ("p50_ms", "p90_ms", "p95_ms", "p99_ms", "throughput")
    }
    (latency,) = found["latencies"]
    assert (latency["n"], latency["sessions"], latency["timed"]) == (1000, 5, "latency")
    assert latency["p50_ms"] == pytest.approx(0.6925, abs=0.001)
    assert sorted(latency["durations_ns"])[499] / 1e6 == latency["p50_ms"]


def test_compute_alone_is_judged_where_it_is_asked_for(gate_command, exported):
    for budget, code in (("0.55", 0), ("0.45", 1)):
        assert gate_command("latency", *exported, "--timed", "gpu_compute", "--p50", budget).code == code
    assert gate_command("latency", *exported, "--p50", "0.55").code == 1


def test_a_budget_that_is_missed_exits_1_and_too_few_inferences_or_files_exit_3(gate_command, exported):
    outcome = gate_command("latency", *exported, "--p99", "0.1")
    assert outcome.code == 1
    assert "FAILED        latency.p99_ms: " in outcome.out
    outcome = gate_command("latency", *exported, "--p99.9", "0.8")
    assert outcome.code == 3
    assert "p99.9 needs at least 4603 samples, has 1000" in outcome.out
    outcome = gate_command("latency", *exported[:4], "--p50", "0.8")
    assert outcome.code == 3
    assert "p50 needs more processes, has 4 sessions" in outcome.out
    assert "run trtexec 1 times more" in outcome.out


def test_one_file_twice_is_one_process(gate_command, exported, project):
    outcome = gate_command("latency", *["0.json"] * 5, "--p50", "0.8")
    assert outcome.code == 3
    shutil.copy(project / "0.json", project / "copy.json")
    outcome = gate_command("latency", *exported, "copy.json", "--p50", "0.8")
    assert outcome.code == 3
    assert "copy.json: it holds the same times as 0.json" in outcome.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"[]", "it is an empty list"),
        (b"[{}]", "record 0 has no 'latencyMs'"),
        (b'{"traceEvents": []}', "expected trtexec's list of times, got an object"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"not json", "it is not JSON"),
        (b"[" * 100_000, "broken.json"),
        (("computeMs", "nan"), "a time is nan"),
        (("latencyMs", "-0.5"), "latencyMs is -0.5 ms, expected more than 0"),
        (("computeMs", "-inf"), "a time is -inf"),
        (("h2dMs", "null"), "h2dMs is null"),
        (("latencyMs", "9.5"), "latencyMs is 9.5, expected h2dMs + computeMs + d2hMs"),
        ("cut", "it is cut off"),
    ],
    ids=str,
)
def test_a_file_that_trtexec_did_not_write_so_is_never_a_pass(gate_command, exported, project, content, message):
    text = trtexec([0.5, 0.75])
    if isinstance(content, tuple):
        name, value = content
        content = re.sub(rf'"{name}" : [^,}} ]+', f'"{name}" : {value}', text, count=1)
    elif content == "cut":
        content = text[:-20]
    (project / "broken.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    outcome = gate_command("latency", *exported, "broken.json", "--p50", "1000")
    assert outcome.code == 3, outcome.out
    assert outcome.err.startswith("broken.json: ")
    assert message in outcome.err
    assert outcome.out == ""


def test_files_of_trtexec_have_no_other_engine(gate_command, exported):
    outcome = gate_command("latency", *exported, "--against", "half")
    assert outcome.code == 2
    assert "cannot be timed in turn with an engine" in outcome.err


def test_files_of_trtexec_are_of_one_batch_size(gate_command, exported):
    outcome = gate_command("latency", *exported, "--batch", "8", "--throughput", "11000")
    assert outcome.code == 0, outcome.err
    outcome = gate_command("latency", *exported, "--batch", "1,8", "--p50", "0.8")
    assert outcome.code == 2, outcome.out
    assert "batch" in outcome.err


def test_a_file_of_trtexec_that_is_not_there_is_named(gate_command, exported):
    outcome = gate_command("latency", *exported, "5.json", "--p50", "0.8")
    assert outcome.code == 2
    assert "5.json" in outcome.err
    assert "there is no such file" in outcome.err
    outcome = gate_command("latency", "5.json", "--p50", "0.8")
    assert outcome.code == 2
    assert "5.json: there is no such file" in outcome.err


def test_a_check_times_the_engine_against_the_accepted_one(gate_command, ready):
    tiny.write(ready, tiny.SPEC + REGRESSION)
    outcome = gate_command("check", "gate.toml", "--bundles", "dist", "--report", "out")
    assert outcome.code == 0, outcome.out + outcome.err
    (engine,) = json.loads((ready / "out/report.json").read_bytes())["engines"]
    (latency,) = engine["latencies"]
    (comparison,) = latency["comparisons"]
    assert comparison["against"] == "baseline"
    assert comparison["checks"] == ["latency.regression_p50"]
    assert latency["stopped"].startswith("decided after ")


def test_a_check_without_the_accepted_engine_s_bundle_fails(gate_command, ready):
    tiny.write(ready, tiny.SPEC + REGRESSION.replace('p50 = "900 %"', 'p50 = "900 %", p95 = "900 %"'))
    outcome = gate_command("check", "gate.toml", "--max-time", "0.01")
    assert outcome.code == 1
    assert "FAILED  ort  latency.regression_p50: bundles/tiny/ort: the accepted baseline's engine is not at hand" in (
        outcome.out
    )
    flip(ready / "dist/tiny/ort/artifacts/model.onnx")
    outcome = gate_command("check", "gate.toml", "--bundles", "dist", "--max-time", "0.01")
    assert outcome.code == 1
    assert "latency.regression_p50: dist/tiny/ort/artifacts/model.onnx: its sha256 is " in outcome.out


def test_less_time_than_the_spec_allows_makes_no_pass(gate_command, ready):
    tiny.write(ready, tiny.SPEC + REGRESSION)
    outcome = gate_command("check", "gate.toml", "--bundles", "dist", "--max-time", "0.01", "--report", "out")
    assert outcome.code == 3, outcome.out + outcome.err
    assert outcome.out.startswith("INCONCLUSIVE  ort  latency.regression_p50: ")
    (engine,) = json.loads((ready / "out/report.json").read_bytes())["engines"]
    assert engine["latencies"][0]["stopped"].startswith("max_time_s = 0.01 s ")
    for value in ("0", "nan", "inf", "-1", "soon"):
        refused = gate_command("check", "gate.toml", f"--max-time={value}")
        assert refused.code == 2
        assert f"argument --max-time: needs seconds above 0, got '{value}'" in refused.err
