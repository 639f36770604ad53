"""The commands on what is stored: baseline, seal, verify, record, schema."""

from __future__ import annotations

import json

import pytest

from tests.cli import conftest as tiny


def test_a_baseline_is_accepted_shown_compared_and_then_used(gate_command, project):
    tiny.write(project, tiny.SPEC + "  [engine.baseline]\n")
    first = gate_command("check", "gate.toml")
    assert first.code == 1
    assert "there is no accepted baseline" in first.out
    accepted = gate_command("baseline", "accept", "--reason", "first release", "--by", "Ada")
    assert accepted.code == 0, accepted.err
    assert accepted.out.startswith("accepted      ort  baselines/tiny/ort/cpu.json\n")
    shown = gate_command("baseline", "show", "tiny").out
    assert "accepted by Ada on " in shown
    assert ": first release" in shown
    assert "no difference" in gate_command("baseline", "diff").out
    assert gate_command("check", "gate.toml").code == 0


def test_a_baseline_needs_a_reason(gate_command):
    gate_command("check", "gate.toml")
    assert gate_command("baseline", "accept").code == 2
    outcome = gate_command("baseline", "accept", "--reason", " ", "--by", "Ada")
    assert outcome.code == 1
    assert "the reason is empty" in outcome.err


def test_what_failed_is_not_accepted(gate_command, project):
    tiny.write(project, tiny.FAILING)
    gate_command("check", "gate.toml")
    outcome = gate_command("baseline", "accept", "--reason", "because", "--by", "Ada")
    assert outcome.code == 1
    assert "not accepted  ort  parity.sqnr_db is FAILED" in outcome.out
    assert not (project / "baselines").exists()


def test_without_a_run_there_is_nothing_to_accept(gate_command):
    outcome = gate_command("baseline", "accept", "--reason", "because")
    assert outcome.code == 3
    assert "there is no run in .gate/runs" in outcome.err


def test_a_case_without_baselines_is_an_error(gate_command):
    outcome = gate_command("baseline", "show", "nothing")
    assert outcome.code == 1
    assert "there is no baseline" in outcome.err


def test_who_accepts_is_said_by_the_environment(gate_command, project, monkeypatch):
    monkeypatch.setenv("GATE_ACCEPTED_BY", "Grace")
    gate_command("check", "gate.toml", "--report", "out")
    assert gate_command("baseline", "accept", "out", "--reason", "because").code == 0
    stored = json.loads((project / "baselines/tiny/ort/cpu.json").read_bytes())
    assert stored["accepted"]["who"] == "Grace"


def test_two_baselines_are_compared_metric_by_metric(gate_command, project):
    gate_command("check", "gate.toml")
    gate_command("baseline", "accept", "--reason", "one", "--by", "Ada")
    old = project / "old.json"
    (project / "baselines/tiny/ort/cpu.json").rename(old)
    model = (project / "model.py").read_text()
    (project / "model.py").write_text(model.replace("manual_seed(0)", "manual_seed(1)"))
    gate_command("check", "gate.toml")
    gate_command("baseline", "accept", "--reason", "two", "--by", "Ada")
    outcome = gate_command("baseline", "diff", "old.json", "baselines/tiny/ort/cpu.json")
    assert outcome.code == 0
    assert "reference_sha256: " in outcome.out


def test_what_failed_is_not_sealed(gate_command, project):
    tiny.write(project, tiny.FAILING)
    outcome = gate_command("seal", "gate.toml", "--out", "dist")
    assert outcome.code == 1
    assert "not sealed  ort  FAILED" in outcome.out
    assert not (project / "dist").exists()


def test_a_run_of_which_nothing_may_be_sealed_is_refused(gate_command, project):
    tiny.write(project, tiny.SPEC + '\n[policy]\nseal_evidence = "device"\n')
    outcome = gate_command("seal", "gate.toml", "--out", "dist")
    assert outcome.code == 4
    assert "REFUSED  nothing was sealed" in outcome.err


def test_verification_shows_numbered_steps_and_refuses_a_changed_byte(gate_command, project):
    gate_command("seal", "gate.toml", "--out", "dist")
    good = gate_command("verify", "dist/tiny/ort")
    assert good.code == 0
    lines = good.out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == [str(index + 1) for index in range(len(lines) - 1)]
    assert lines[-1].startswith("INTACT  dist/tiny/ort   who made it is not known: gate verify --policy")
    engine = project / "dist/tiny/ort/artifacts/model.onnx"
    engine.write_bytes(engine.read_bytes()[:-1] + b"\0")
    bad = gate_command("verify", "dist/tiny/ort")
    assert bad.code == 4
    assert "refused" in bad.out
    assert bad.err.startswith("REFUSED  dist/tiny/ort/artifacts/model.onnx: its sha256 is ")
    found = json.loads(gate_command("verify", "--json", "dist/tiny/ort").out)
    assert found["verified"] is False
    assert found["steps"][-1]["ok"] is False


def test_more_evidence_than_there_is_is_refused(gate_command):
    gate_command("seal", "gate.toml", "--out", "dist")
    assert gate_command("verify", "dist/tiny/ort", "--require-evidence", "device").code == 4


def test_a_recorded_reference_serves_without_the_model(gate_command, project):
    assert gate_command("record", "gate.toml", "-o", "recorded").code == 0
    outcome = gate_command("check", "gate.toml", "--reference", "recorded", "--no-cache")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("kind", ["spec", "report", "metadata", "baseline"])
def test_schemas_are_printed(gate_command, kind):
    outcome = gate_command("schema", kind)
    assert json.loads(outcome.out)["$schema"].endswith("2020-12/schema")


def test_a_folder_of_bundles_names_them(gate_command):
    gate_command("check", "gate.toml", "--seal", "dist")
    outcome = gate_command("verify", "dist")
    assert outcome.code == 4
    assert "  gate verify dist/tiny/ort" in outcome.err.splitlines()


def test_a_refusal_names_the_bundle_once(gate_command):
    outcome = gate_command("verify", "nothing")
    assert outcome.code == 4
    assert outcome.err == "REFUSED  nothing: there is no bundle\n"


@pytest.mark.parametrize("command", [("diff",), ("accept", "--reason", "because")])
def test_a_report_that_does_not_exist_is_a_usage_error(gate_command, command):
    outcome = gate_command("baseline", *command, "nothing")
    assert outcome.code == 2
    assert "nothing: there is no such report" in outcome.err


def test_where_there_is_no_baseline_the_command_for_one_is_named(gate_command):
    assert "gate baseline accept --reason" in gate_command("baseline", "show").err


def test_a_recording_replaces_no_file_of_others(gate_command, project):
    spec = (project / "gate.toml").read_text()
    (project / "mine").mkdir()
    (project / "mine" / "notes.txt").write_text("kept")
    for out in ("gate.toml", "mine", "."):
        assert gate_command("record", "gate.toml", "-o", out).code == 2, out
    assert (project / "gate.toml").read_text() == spec
    assert (project / "mine" / "notes.txt").read_text() == "kept"
    assert gate_command("record", "gate.toml", "-o", "recording").code == 0
    assert gate_command("record", "gate.toml", "-o", "recording").code == 0


def test_commands_to_paste_quote_their_paths(gate_command):
    outcome = gate_command("check", "gate.toml", "--seal", "my dist")
    assert "gate verify 'my dist/tiny/ort'" in outcome.out
    assert "gate verify 'my dist/tiny/ort'" in gate_command("verify", "my dist").err
    assert "--reference 'my recording'" in gate_command("record", "gate.toml", "-o", "my recording").out
    assert (
        "gate check 'my gate.toml'"
        in gate_command("init", "model:load", "--input", "input:float32:batch,4", "-o", "my gate.toml").out
    )
