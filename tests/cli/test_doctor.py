"""`gate doctor`, on this machine as it is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from gate import probe
from gate.cli.doctor import render
from gate.doctor import Examination, Line
from tests.cli import conftest as tiny

NO_ENGINE_HERE = tiny.SPEC.replace('backend = "onnxruntime"', 'backend = "tensorrt"')


@pytest.fixture(scope="module")
def facts():
    """Of this machine without its GPUs, collected once: each time takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        return probe.collect()


@pytest.fixture
def without_gpu(monkeypatch, facts):
    monkeypatch.setattr(probe, "collect", lambda on_probe=None: facts)


@pytest.mark.usefixtures("without_gpu")
def test_json_has_every_line_with_its_fields(gate_command):
    outcome = gate_command("doctor", "--json")
    assert outcome.code == 0, outcome.out
    found = json.loads(outcome.out)
    assert found["schema_version"] == 1
    assert found["ok"] is True
    assert found["usable"]["onnxruntime"] == "host"
    lines = {line["name"]: line for line in found["lines"]}
    assert {"name", "status", "version", "detail", "fix", "needed"} <= lines["gpu"].keys()
    assert {line["status"] for line in lines.values()} <= {"OK", "missing", "unusable"}
    assert lines["onnxruntime"]["status"] == "OK"
    assert outcome.out.count("\n") == 1


@pytest.mark.usefixtures("without_gpu")
def test_screen_names_what_is_missing_and_ends_with_the_exit_code(gate_command):
    outcome = gate_command("doctor")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert any(line.startswith("missing   gpu ") for line in lines)
    assert any(line.startswith("OK        onnxruntime ") for line in lines)
    assert lines[-1].startswith("PASSED  usable: onnxruntime (host)")
    assert lines[-1].endswith("exit 0 (passed)")
    assert "\x1b" not in outcome.out


@pytest.mark.usefixtures("without_gpu")
def test_spec_whose_engines_can_run_here_passes(gate_command):
    outcome = gate_command("doctor", "--spec", "gate.toml", "--json")
    assert outcome.code == 0, outcome.out
    needed = {line["name"]: line["needed_by"] for line in json.loads(outcome.out)["lines"] if line["needed"]}
    assert needed == {"onnxruntime": ["ort"], "torch": ["ort"], "onnx": ["ort"]}


@pytest.mark.usefixtures("without_gpu")
def test_spec_whose_engine_cannot_run_here_fails_and_names_it(gate_command, project):
    tiny.write(project, NO_ENGINE_HERE)
    outcome = gate_command("doctor", "--spec", "gate.toml")
    assert outcome.code == 1
    last = outcome.out.splitlines()[-1]
    assert last.startswith("FAILED  ")
    assert "needed by ort" in last
    assert last.endswith("exit 1 (failed)")


@pytest.mark.usefixtures("without_gpu")
def test_optional_engine_does_not_fail(gate_command, project):
    tiny.write(project, tiny.WITH_ABSENT)
    assert gate_command("doctor", "--spec", "gate.toml").code == 0


@pytest.mark.parametrize("arguments", [("--spec", "nowhere.toml"), ("--recorded",)])
def test_wrong_use_is_exit_2_and_nothing_is_looked_at(gate_command, arguments):
    outcome = gate_command("doctor", *arguments)
    assert outcome.code == 2
    assert outcome.out == ""


def test_wrong_spec_is_exit_2(gate_command, project):
    tiny.write(project, tiny.SPEC.replace('"fp32"', '"fp31"'))
    outcome = gate_command("doctor", "--spec", "gate.toml")
    assert outcome.code == 2
    assert "gate.toml:" in outcome.err


@pytest.mark.slow
def test_command_imports_nothing_heavy():
    code = (
        "import sys; from gate.cli.main import main; main(['doctor', '--json']);"
        "bad = {'torch', 'onnx', 'onnxruntime', 'tensorrt', 'tensorrt_rtx', 'modelopt'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, capture_output=True)


def test_fix_stands_below_its_line_and_can_be_pasted():
    lines = (
        Line(name="gpu", status="missing", detail="hidden", fix="unset CUDA_VISIBLE_DEVICES"),
        Line(
            name="torch", status="OK", version="2.13.0", detail="built without CUDA", needed=True, needed_by=("a", "b")
        ),
    )
    found = Examination(ok=False, summary="gpu missing", spec=None, platform="Linux", usable={}, lines=lines)
    assert render(found) == (
        "missing   gpu    -       hidden\n"
        "                         fix: unset CUDA_VISIBLE_DEVICES\n"
        "OK        torch  2.13.0  built without CUDA   needed by a, b\n"
        "\n"
        "FAILED  gpu missing          exit 1 (failed)\n"
    )
