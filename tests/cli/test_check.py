from __future__ import annotations

import json
import os

import numpy as np
import onnx
import pytest
from jsonschema import Draft202012Validator
from onnx import TensorProto, helper, numpy_helper

from gate.cli.check import worst
from gate.errors import ExitCode
from gate.schemas import report_schema
from tests.cli import conftest as tiny


def test_a_pass_exits_0_and_writes_both_reports(gate_command, project):
    outcome = gate_command("check", "gate.toml")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("PASSED  tiny: 1 engine, 32 samples\n")
    assert "build       ort" in outcome.err.splitlines()
    latest = project / ".gate" / "runs" / (project / ".gate/runs/latest").read_text().strip()
    assert f"report: {latest.relative_to(project)}/report.md          exit 0 (passed)" in outcome.out
    Draft202012Validator(report_schema()).validate(json.loads((latest / "report.json").read_bytes()))
    assert (latest / "report.md").read_text().startswith("**PASSED tiny: 1 engine, 32 samples**")


def test_a_failure_exits_1_and_names_the_line(gate_command, project):
    tiny.write(project, tiny.FAILING)
    outcome = gate_command("check", "gate.toml")
    assert outcome.code == 1
    assert outcome.out.startswith("FAILED  ort  parity.sqnr_db: ")
    assert "dB < 900 dB (gate.toml:22)" in outcome.out.splitlines()[0]
    assert "next: gate check gate.toml --engine ort --verbose" in outcome.out.splitlines()[0]


def test_too_few_samples_exit_3(gate_command, project):
    tiny.write(project, tiny.INCONCLUSIVE)
    outcome = gate_command("check", "gate.toml")
    assert outcome.code == 3
    assert outcome.out.startswith("INCONCLUSIVE  ort  latency.p99_ms: ")


def test_a_wrong_spec_exits_2_before_anything_runs(gate_command, project):
    (project / "other.gate.toml").write_text(tiny.SPEC.replace("parity", "parrity"))
    outcome = gate_command("check", "gate.toml", "other.gate.toml")
    assert outcome.code == 2
    assert outcome.err.startswith("other.gate.toml:21: [[engine]] has no key 'parrity'; did you mean 'parity'?")
    assert outcome.out == ""


def test_an_engine_that_is_not_in_the_spec_exits_2(gate_command):
    outcome = gate_command("check", "gate.toml", "--engine", "orf")
    assert outcome.code == 2
    assert "there is no engine 'orf'; did you mean 'ort'?" in outcome.err


def test_of_several_specs_the_worst_exit_code_wins_and_each_has_its_report(gate_command, project):
    (project / "bad.gate.toml").write_text(tiny.FAILING)
    outcome = gate_command("check", "gate.toml", "bad.gate.toml", "gate.toml", "--report", "out")
    assert outcome.code == 1
    assert sorted(path.name for path in (project / "out").iterdir()) == ["tiny", "tiny-2", "tiny-3"]
    assert not (project / ".gate/runs").exists()
    assert outcome.out.splitlines()[-1] == "3 specs: 1 failed, 2 passed          exit 1 (failed)"
    assert outcome.out.count("\n\nPASSED  tiny") == 1
    assert "\n\nFAILED  ort" in outcome.out


def test_an_error_in_one_of_several_specs_does_not_hide_the_others(gate_command, project):
    (project / "few.gate.toml").write_text(tiny.SPEC.replace("samples = 32", "samples = 33"))
    outcome = gate_command("check", "few.gate.toml", "gate.toml")
    assert outcome.code == 2
    assert "few.gate.toml: " in outcome.err
    assert "PASSED  tiny" in outcome.out


def test_json_is_the_report_and_nothing_else(gate_command):
    outcome = gate_command("check", "gate.toml", "--json")
    assert json.loads(outcome.out)["status"] == "PASSED"
    assert outcome.out.count("\n") == 1


def test_an_engine_that_cannot_run_here_is_listed_and_not_counted(gate_command, project):
    tiny.write(project, tiny.WITH_ABSENT)
    outcome = gate_command("check", "gate.toml", "--seal", "dist")
    assert outcome.out.startswith("PASSED  tiny: 1 engine, 32 samples; NOT RUN: trt\n")
    assert "NOT RUN  trt  backend 'tensorrt' is not installed" in outcome.out
    assert "not sealed  trt  NOT RUN" in outcome.out


def test_what_passed_is_sealed_without_a_cache_too(gate_command, project):
    outcome = gate_command("check", "gate.toml", "--no-cache", "--seal", "dist")
    assert outcome.code == 0, outcome.err
    assert "sealed      ort  dist/tiny/ort   verify it: gate verify dist/tiny/ort" in outcome.out
    assert gate_command("verify", "dist/tiny/ort").code == 0
    assert not (project / ".gate/cache").exists()


def test_github_gets_annotations_and_a_summary(gate_command, project, monkeypatch):
    tiny.write(project, tiny.FAILING)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(project / "summary.md"))
    outcome = gate_command("check", "gate.toml")
    assert outcome.code == 1
    assert "::error file=gate.toml,line=22,title=FAILED ort parity.sqnr_db::parity.sqnr_db: " in outcome.err
    assert (project / "summary.md").read_text().startswith("**FAILED ort parity.sqnr")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes where nobody may")
def test_a_folder_that_cannot_be_written_is_an_error(gate_command, project):
    (project / "out").mkdir(mode=0o500)
    outcome = gate_command("check", "gate.toml", "--report", "out")
    assert outcome.code == 1
    assert "cannot be written" in outcome.err


def test_the_worst_of_no_exit_codes_is_no_pass():
    assert worst([]) is ExitCode.INTERNAL
    assert worst([ExitCode.PASSED, ExitCode.INCONCLUSIVE]) is ExitCode.INCONCLUSIVE
    assert worst([ExitCode.FAILED, ExitCode.INCONCLUSIVE]) is ExitCode.FAILED


def test_github_gets_an_annotation_where_there_is_no_verdict(gate_command, project, monkeypatch):
    tiny.write(project, tiny.SPEC.replace("samples = 32", "samples = 33"))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    outcome = gate_command("check", "gate.toml")
    assert outcome.code == 2
    assert "title=gate%3A no verdict on gate.toml::" in outcome.err


def test_the_verdict_is_shown_where_the_report_cannot_be_written(gate_command, project):
    (project / "out/report.md").mkdir(parents=True)
    outcome = gate_command("check", "gate.toml", "--report", "out")
    assert outcome.code != 0
    assert outcome.out.startswith("PASSED  tiny")
    assert "exit 0" not in outcome.out


@pytest.mark.parametrize("option", ["--report", "--seal"])
def test_a_place_for_results_that_is_a_file_is_refused_before_anything_runs(gate_command, project, option):
    (project / "taken").write_text("mine")
    outcome = gate_command("check", "gate.toml", option, "taken/below")
    assert outcome.code == 2
    assert "taken: is not a folder" in outcome.err
    assert outcome.out == ""


def test_a_spec_that_cannot_be_read_is_annotated_at_its_line(gate_command, project, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    spec = project / "gate.toml"
    spec.write_text(spec.read_text().replace("[engine.parity]", "[engine.parrity]"))
    outcome = gate_command("check", "gate.toml")
    assert outcome.code == 2
    line = next(line for line in outcome.err.splitlines() if line.startswith("::error "))
    assert "file=gate.toml,line=" in line
    assert "did you mean" in line


def test_the_hint_of_a_build_error_is_told_once(gate_command, project):
    tiny.write(project, tiny.SPEC.replace('precision = "fp32"', 'precision = "fp32"\nonnx = "large.onnx"'))
    layer = helper.make_node("MatMul", ["input", "w"], ["output"])
    weight = numpy_helper.from_array(np.ones((4, 3), np.float32), "w")
    shape = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", None]) for name in ("input", "output")]
    model = helper.make_model(helper.make_graph([layer], "g", shape[:1], shape[1:], [weight]))
    onnx.save_model(model, "large.onnx", save_as_external_data=True, location="w.data", size_threshold=0)
    os.link("w.data", "second.data")
    outcome = gate_command("check", "gate.toml")
    assert outcome.code != 0
    assert "hard link" in outcome.out + outcome.err
    assert (outcome.out + outcome.err).count("as regular files") <= 1
