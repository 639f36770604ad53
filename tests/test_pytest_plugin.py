from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from gate.pipeline import CheckOptions, Silence, check
from gate.pytest_plugin import check_names, judge
from gate.spec import read_spec, spec_from_text
from gate.verdict import Evidence, Failure
from tests.cli import conftest as tiny
from tests.report import conftest as runs

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits" / "gate.toml"
TWO = tiny.SPEC + tiny.SPEC[tiny.SPEC.index("[[engine]]") :].replace('"ort"', '"ort-2"')


@pytest.fixture(scope="session")
def frameworks(tmp_path_factory):
    """Load every framework that a check needs: pytester drops what is imported within it, and torch dies of that."""
    folder = tmp_path_factory.mktemp("frameworks")
    options = CheckOptions(cache=folder / "cache", baselines=folder)
    assert check(read_spec(tiny.write(folder, tiny.INCONCLUSIVE)), options, Silence()).engines
    tiny.write(folder, tiny.FAILING)
    check(read_spec(folder / "gate.toml"), options, Silence())


@pytest.fixture
def project(frameworks, pytester, monkeypatch):
    """A folder with the tiny project; `.runpytest(*options)` runs pytest in it."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    tiny.write(pytester.path)
    return pytester


def test_the_example_has_one_test_per_engine_and_check(pytester):
    folder = pytester.mkdir("examples")
    (folder / "gate.toml").write_text(EXAMPLE.read_text())
    result = pytester.runpytest("--collect-only", "-q")
    ids = [line for line in result.outlines if "::" in line]
    assert "examples/gate.toml::ort-fp16::parity" in ids
    assert [each.rpartition("::")[2] for each in ids if "::ort-int8::" in each] == [
        "build",
        "parity",
        "metamorphic",
        "task.top1",
        "task.top1_drop_pp",
        "latency.p50_ms",
        "latency.p95_ms",
        "latency.p99_ms",
        "memory.engine_mib",
        "baseline",
    ]
    assert [each.rpartition("::")[2] for each in ids if "::rtx-fp16::" in each] == ["build", "memory.engine_mib"]


def test_files_named_like_a_spec_are_collected_and_others_are_not(project):
    (project.path / "other.gate.toml").write_text(tiny.SPEC)
    (project.path / "pyproject.toml").write_text("")
    result = project.runpytest("--collect-only", "-q")
    assert {line.partition("::")[0] for line in result.outlines if "::" in line} == {"gate.toml", "other.gate.toml"}


def test_a_spec_that_passes_passes(project):
    result = project.runpytest("-v")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["gate.toml::ort::build PASSED*", "gate.toml::ort::parity PASSED*"])


def test_a_failed_check_prints_its_finding_and_no_traceback(project):
    tiny.write(project.path, tiny.FAILING)
    result = project.runpytest()
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["parity.sqnr_db: * dB < 900 dB (gate.toml:22)", "*docs/findings.md#parity-sqnr_db"])
    result.stdout.no_fnmatch_line("*Traceback*")
    result.stdout.no_fnmatch_line("*pytest_plugin.py*")


def test_an_inconclusive_check_does_not_pass_and_says_what_it_needs(project):
    tiny.write(project.path, tiny.INCONCLUSIVE)
    result = project.runpytest("-v")
    result.assert_outcomes(passed=3, failed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "gate.toml::ort::latency.p99_ms INCONCLUSIVE*",
            "latency.p99_ms: *",
            "*p99 needs at least 459 samples, has *",
        ]
    )


def test_an_engine_that_cannot_be_built_fails_all_its_checks(project):
    tiny.write(project.path, tiny.BROKEN)
    result = project.runpytest()
    result.assert_outcomes(failed=3)
    result.stdout.fnmatch_lines(["build: *there is no *missing.onnx", "parity: not reached: build: *"])


def test_an_optional_engine_that_cannot_run_is_skipped_with_the_reason(project):
    tiny.write(project.path, tiny.WITH_ABSENT)
    result = project.runpytest("-rs")
    result.assert_outcomes(passed=3, skipped=3)
    result.stdout.fnmatch_lines(["SKIPPED*NOT RUN: backend 'tensorrt' is not installed"])


def test_a_marker_that_skips_a_check_skips_it_with_the_reason(project):
    project.makeconftest(
        """
        import pytest

        def pytest_collection_modifyitems(items):
            for item in items:
                item.add_marker(pytest.mark.skip(reason="not today"))
        """
    )
    result = project.runpytest("-rs")
    result.assert_outcomes(skipped=3)
    result.stdout.fnmatch_lines(["SKIPPED*gate.toml*not today"])


def test_a_backend_that_is_missing_fails_where_it_is_not_optional(project):
    tiny.write(project.path, tiny.WITH_ABSENT.replace("optional = true\n", ""))
    result = project.runpytest("-k", "trt")
    result.assert_outcomes(failed=3, deselected=3)


def test_a_wrong_spec_is_a_collection_error_of_one_line(project):
    tiny.write(project.path, tiny.SPEC.replace("engine.parity", "engine.parrity"))
    result = project.runpytest()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["gate.toml:21: [[][[]engine]] has no key 'parrity'; did you mean 'parity'?"])
    result.stdout.no_fnmatch_line("*spec.py*")


def test_data_that_cannot_be_used_fails_every_check_with_its_message(project):
    tiny.write(project.path, tiny.SPEC.replace("samples = 32", "samples = 33"))
    result = project.runpytest()
    result.assert_outcomes(failed=3)
    result.stdout.fnmatch_lines(["*gives 32 samples, [[]data] asks for 33"])
    result.stdout.no_fnmatch_line("*Traceback*")


def test_only_the_engine_that_is_asked_for_is_run(project):
    tiny.write(project.path, TWO)
    project.runpytest("-k", "ort-2", "--gate-report", "out").assert_outcomes(passed=3, deselected=3)
    report = json.loads((project.path / "out/tiny/report.json").read_bytes())
    assert [engine["name"] for engine in report["engines"]] == ["ort-2"]


def test_engines_are_chosen_by_option_and_a_wrong_name_is_an_error(project):
    tiny.write(project.path, TWO)
    project.runpytest("--gate-engines", "ort-2").assert_outcomes(passed=3)
    result = project.runpytest("--gate-engines", "ort-2,orf")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --gate-engines: no spec has orf; there is ort, ort-2"])


def test_the_report_holds_all_engines_of_a_spec(project):
    tiny.write(project.path, TWO)
    result = project.runpytest("--gate-report", "out")
    result.stdout.fnmatch_lines(["report: *out/tiny/report.md"])
    report = json.loads((project.path / "out/tiny/report.json").read_bytes())
    assert [engine["name"] for engine in report["engines"]] == ["ort", "ort-2"]


def test_updating_baselines_writes_them_and_fails_the_run(project, monkeypatch):
    monkeypatch.setenv("GATE_ACCEPTED_BY", "Ada")
    tiny.write(project.path, tiny.SPEC + "  [engine.baseline]\n")
    project.runpytest().assert_outcomes(passed=3, failed=1)
    result = project.runpytest("--gate-update-baselines", "--gate-baselines", "stored", "-k", "parity")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        ["baseline written: *stored/tiny/ort/cpu.json", "*wrote 1 baseline, so this run FAILED*"]
    )
    assert project.runpytest("--gate-baselines", "stored").ret == 0


def test_the_cache_is_where_it_was_asked_for(project):
    project.runpytest("--gate-cache", "elsewhere")
    assert (project.path / "elsewhere").is_dir()
    assert not (project.path / ".gate").exists()


def test_last_failed_runs_what_failed(project):
    tiny.write(project.path, tiny.FAILING)
    project.runpytest("-p", "cacheprovider").assert_outcomes(passed=2, failed=1)
    project.runpytest("-p", "cacheprovider", "--lf").assert_outcomes(failed=1, deselected=2)


def test_junit_xml_holds_the_finding(project):
    tiny.write(project.path, tiny.FAILING)
    project.runpytest("--junitxml", "junit.xml")
    root = ET.parse(project.path / "junit.xml").getroot()
    (failure,) = root.iter("failure")
    assert failure.attrib["message"].startswith("parity.sqnr_db")
    properties = {each.attrib["name"]: each.attrib["value"] for each in root.iter("property")}
    assert properties["gate.parity.rel_rmse"].startswith("parity.rel_rmse: ")
    assert {each.attrib["value"] for each in root.iter("property") if each.attrib["name"] == "gate.status"} == {
        "PASSED",
        "FAILED",
    }


def test_workers_of_xdist_give_one_report_and_write_baselines(project, monkeypatch):
    monkeypatch.setenv("GATE_ACCEPTED_BY", "Ada")
    tiny.write(project.path, tiny.INCONCLUSIVE)
    (project.path / "second.gate.toml").write_text(tiny.SPEC.replace('id = "tiny"', 'id = "second"'))
    result = project.runpytest_subprocess("-n", "2", "-v", "--gate-report", "out", "--gate-update-baselines")
    result.assert_outcomes(passed=6, failed=1)
    assert sorted(path.name for path in (project.path / "out").iterdir()) == ["second", "tiny"]
    result.stdout.fnmatch_lines(
        ["*INCONCLUSIVE*gate.toml::ort::latency.p99_ms*", "*wrote 1 baseline, so this run FAILED*"]
    )
    assert (project.path / "baselines/second/ort/cpu.json").is_file()


def test_the_fixture_runs_a_spec_once_a_session(project):
    project.makepyfile(
        """
        def test_it(gate):
            run = gate.check("gate.toml", engine="ort")
            assert run.passed, run.summary
            assert run["parity.rel_rmse"].estimate <= 1e-5
            assert gate.check("gate.toml", engine="ort") is run

        def test_it_elsewhere(gate, tmp_path, monkeypatch):
            monkeypatch.chdir(tmp_path)
            assert gate.check("gate.toml", engine="ort").passed

        def test_a_regression_is_told(gate):
            run = gate.check("bad.toml")
            assert run.passed, run.summary
        """
    )
    (project.path / "bad.toml").write_text(tiny.FAILING)
    result = project.runpytest(*project.path.glob("test_*.py"))
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*AssertionError: FAILED  ort  parity.sqnr_db: *"])


def test_warnings_as_errors_do_not_reach_into_a_check(project):
    (project.path / "data.py").write_text(
        "import warnings\n" + tiny.DATA.replace("    return", "    warnings.warn('old')\n    return")
    )
    project.runpytest("-W", "error").assert_outcomes(passed=3, warnings=1)


def test_a_plan_that_exists_has_no_build_test():
    plan = tiny.SPEC.replace('precision = "fp32"', 'precision = "fp32"\nplan = "model.onnx"')
    file = spec_from_text(plan, path=Path("gate.toml"))
    assert check_names(file.spec.engines[0], file) == ("parity", "metamorphic")


def test_each_batch_size_and_what_is_asked_of_it_is_a_test():
    text = tiny.SPEC + (
        "  [[engine.latency]]\n  batch = [1, 8]\n  p50_ms = 1.0\n"
        "  [[engine.latency]]\n  batch = 16\n  throughput_at_least = 1.0\n  speedup = { at_least = 1.5 }\n"
        '  regression = { against = "reference", p50 = "3 %" }\n'
        "  [engine.stages]\n  p50_ms = { total = 1.0 }\n"
        "  [engine.usage]\n  cpu_percent_at_most = 100.0\n"
        "  [engine.memory]\n  engine_mib = 1.0\n"
    )
    file = spec_from_text(text, path=Path("gate.toml"))
    assert check_names(file.spec.engines[0], file)[2:] == (
        "metamorphic",
        "latency.p50_ms[batch=1]",
        "latency.p50_ms[batch=8]",
        "latency.throughput[batch=16]",
        "latency.regression_p50[batch=16]",
        "latency.speedup[batch=16]",
        "stages",
        "usage",
        "memory.engine_mib",
    )


def test_a_finding_of_one_batch_size_is_not_another_ones():
    names = ("latency.p50_ms[batch=1]", "latency.p50_ms[batch=8]")
    slow = runs.finding("latency.p50_ms[batch=8]", 2.0, 1.0)
    result = runs.engine("ort", runs.finding("latency.p50_ms[batch=1]", 0.5, 1.0), slow)
    assert [judge(result, name, names).status for name in names] == ["PASSED", "FAILED"]


@pytest.mark.parametrize(("check", "reached"), [("latency", [True, True]), ("latency[batch=8]", [False, True])])
def test_a_failure_to_measure_is_of_every_test_that_it_kept_from_being_made(check, reached):
    names = ("latency.p50_ms[batch=1]", "latency.p50_ms[batch=8]")
    failure = Failure(check=check, error="RunError", message="the engine hangs", evidence=Evidence.HOST)
    result = runs.engine("ort", failure)
    judged = [judge(result, name, names) for name in names]
    assert [each.status for each in judged] == ["FAILED", "FAILED"]
    assert ["not reached" not in each.lines[0] for each in judged] == reached


def test_a_test_of_one_batch_size_without_a_finding_fails():
    names = ("latency.p50_ms[batch=1]", "latency.p50_ms[batch=8]")
    result = runs.engine("ort", runs.finding("latency.p50_ms[batch=1]", 0.5, 1.0))
    judgement = judge(result, names[1], names)
    assert judgement.status == "FAILED"
    assert "nothing was compared" in judgement.lines[0]


def test_limits_of_a_task_are_tests_by_the_names_of_their_findings():
    file = read_spec(EXAMPLE.parents[1] / "digit-detector" / "gate.toml")
    names = {each.name: check_names(each, file) for each in file.spec.engines}
    assert "task.mean_ap_drop" in names["ort-fp32"]
    assert {"task.mean_ap", "task.mean_ap_drop"} <= set(names["ort-int8"])
    assert not any(name.startswith("task.") for name in names["rtx-fp16"])


def test_a_check_without_a_finding_fails():
    judgement = judge(runs.GOOD, "metamorphic", ("parity", "metamorphic"))
    assert judgement.status == "FAILED"
    assert "nothing was compared" in judgement.lines[0]


def test_a_failure_that_belongs_to_no_test_fails_the_first():
    lost = Failure(check="run", error="RunError", message="the engine crashed", evidence=Evidence.HOST)
    result = runs.engine("ort", runs.PASSES, lost)
    assert judge(result, "parity", ("parity",)).status == "FAILED"
    assert (
        judge(result, "metamorphic", ("parity", "metamorphic"))
        .lines[0]
        .endswith("not reached: run: the engine crashed")
    )
    assert judge(result, "parity", ("parity", "metamorphic")).status == "PASSED"


def test_a_failed_and_an_inconclusive_finding_are_a_failure():
    result = runs.engine("ort", runs.finding(), runs.finding("parity.top1_agreement", 0.5, 0.4, interval=(0.3, 0.6)))
    assert judge(result, "parity", ("parity",)).status == "FAILED"


def test_the_spec_in_a_sealed_bundle_is_not_a_test(project):
    bundle = project.path / "bundles" / "tiny"
    for name in ("policy/gate.toml", "seals/verdict.dsse.json"):
        (bundle / name).parent.mkdir(parents=True)
        (bundle / name).write_text(tiny.SPEC if name.endswith("toml") else "{}")
    result = project.runpytest("--collect-only", "-q")
    assert {line.partition("::")[0] for line in result.outlines if "::" in line} == {"gate.toml"}


def test_an_error_in_a_hand_written_test_is_told_without_the_inside_of_the_gate(project):
    project.makepyfile(
        """
        def test_it(gate):
            gate.check("gate.toml", engine="orf")
        """
    )
    result = project.runpytest(*project.path.glob("test_*.py"))
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*SpecError: gate.toml: there is no engine 'orf'*"])
    result.stdout.no_fnmatch_line("*pipeline.py*")


def test_the_summary_line_holds_the_number(project):
    tiny.write(project.path, tiny.FAILING)
    project.runpytest().stdout.fnmatch_lines(["FAILED gate.toml::ort::parity - parity.sqnr_db: *"])


def test_a_report_folder_that_is_a_file_is_a_usage_error(project):
    result = project.runpytest("--gate-report", "gate.toml")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--gate-report: gate.toml is not a folder*"])
