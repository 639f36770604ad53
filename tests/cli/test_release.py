"""`gate approve`, `promote`, `rollback`, `revoke` and `ledger`, over real bundles and keys."""

import datetime as dt
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from time import sleep

import msgspec
import pytest

from gate.cli.main import main
from gate.manifest import canonical_json, sha256_hex
from gate.results import run_from_builtins
from gate.signing import new_key, open_signer
from gate.store import Release, seal

DATA = Path(__file__).parents[1] / "data"
POLICY = """schema = 1
ledger = "ledger.jsonl"

[[key]]
name = "gate-ci"
owner = "CI"
roles = ["gate"]
public = "{gate}"

[[key]]
name = "ada"
owner = "Ada"
roles = ["release"]
public = "{ada}"

[[key]]
name = "pam"
owner = "Pam"
roles = ["promoter"]
public = "{pam}"

[model.digits-cnn]
spec = "any"
data = "any"
baseline = "any"

[slot.staging]
evidence = "host"

[slot.production]
evidence = "host"
approvals = {{ release = 1 }}
  [[slot.production.stage]]
  name = "canary"
  min_requests = 10
  [[slot.production.stage]]
  name = "full"
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three sealed bundles that were checked just now, a policy, and keys; read only."""
    import onnx
    from onnx import TensorProto, helper

    root = tmp_path_factory.mktemp("made")
    public = {name: new_key(root / name, password=None).text for name in ("gate", "ada", "pam", "eve")}
    (root / "trust.toml").write_text(POLICY.format(**public))
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", value[:1], value[1:])
    onnx.save(helper.make_model(graph), root / "model.onnx")
    run = run_from_builtins(json.loads((DATA / "run.json").read_bytes()))
    latency = msgspec.structs.replace(
        run.engines[0].latencies[0], durations_ns=tuple(200_000 + (i * 7919) % 50_000 for i in range(500))
    )
    digest = sha256_hex((root / "model.onnx").read_bytes())
    result = msgspec.structs.replace(run.engines[0], latencies=(latency,), engine_sha256=digest)
    now = dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    run = msgspec.structs.replace(run, engines=(result,), created=now)
    for serial in (1, 2, 3):
        seal(
            result.verdict.require_passed(),
            run=run,
            result=result,
            engine_file=root / "model.onnx",
            extra={"policy/gate.toml": (DATA / "sealed.toml").read_bytes()},
            out=root / f"b{serial}",
            release=Release(slots=("staging", "production"), serial=serial, signer=open_signer(str(root / "gate"))),
        )
    return root


@dataclass
class Answer:
    code: int
    out: str
    err: str


@pytest.fixture
def gate(made, tmp_path, monkeypatch, capsys):
    """Runs the command in a folder with the bundles."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GATE_KEY", raising=False)

    def call(*arguments, key=None):
        words = [str(each) for each in arguments]
        if key is not None:
            words += ["--key", key]
        code = main(words)
        return Answer(code, *capsys.readouterr())

    return call


def at(slot):
    return ("--policy", "trust.toml", "--model", "digits-cnn", "--slot", slot)


def test_a_bundle_is_approved_promoted_and_shown(gate):
    refused = gate("promote", "b1", *at("production"), key="pam")
    assert refused.code == 4
    assert "gate approve b1" in refused.err
    approved = gate("approve", "b1", *at("production"), "--comment", "fine", key="ada")
    assert approved.code == 0, approved.err
    assert "APPROVED  digits-cnn for production: serial 1, ort-fp16, by ada as release" in approved.out
    first = gate("promote", "b1", *at("production"), key="pam")
    assert first.code == 0, first.err
    assert "PROMOTED  digits-cnn to production, canary: serial 1" in first.out
    assert "witness   entry 0, sha256 " in first.out
    assert "next      full after 10 requests (--requests N): gate promote b1" in first.out
    assert gate("promote", "b1", *at("production"), "--requests", "9", key="pam").code == 4
    second = gate("promote", "b1", *at("production"), "--requests", "10", key="pam")
    assert second.code == 0, second.err
    shown = gate("ledger", "show", "--policy", "trust.toml", "--slot", "production")
    lines = shown.out.splitlines()
    assert lines[0].split() == ["from", "until", "model", "slot", "stage", "engine", "serial", "verdict", "how"]
    assert [line.split()[4] for line in lines[1:]] == ["canary", "full"]
    assert lines[2].split()[1] == "now"
    assert lines[2].endswith("promote by pam")
    assert len({line.index("ort-fp16") for line in lines[1:]}) == 1


def test_rollback_and_revoke_say_what_happened_and_what_is_next(gate):
    for bundle in ("b1", "b2"):
        assert gate("promote", bundle, *at("staging"), key="pam").code == 0
    revoked = gate("revoke", "b2", "--policy", "trust.toml", "--reason", "wrong labels", key="pam")
    assert revoked.code == 0, revoked.err
    assert "REVOKED  digits-cnn: serial 2, ort-fp16\n" in revoked.out
    assert re.search("^   verdict   sha256 [0-9a-f]{64}$", revoked.out, re.MULTILINE)
    assert "   slots     production, staging\n" in revoked.out
    assert "gate rollback --policy trust.toml --model digits-cnn --slot staging" in revoked.out
    back = gate("rollback", *at("staging"), "--reason", "wrong labels", key="pam")
    assert back.code == 0, back.err
    assert "ROLLED BACK  digits-cnn in staging: serial 1, ort-fp16 has all of the traffic again" in back.out
    shown = gate("ledger", "show", "--policy", "trust.toml").out.splitlines()
    assert "promote by pam, REVOKED" in shown[2]
    assert "rollback by pam" in shown[3]
    refused = gate("promote", "b2", *at("staging"), key="pam")
    assert refused.code == 4
    assert "revoked" in refused.err
    assert gate("rollback", *at("staging"), "--reason", "again", key="pam").code == 4


def test_a_verdict_that_nobody_knows_is_revoked_by_its_digest_and_said_to_be_unknown(gate):
    done = gate("revoke", "a" * 64, "--policy", "trust.toml", "--reason", "leaked", key="pam")
    assert done.code == 0, done.err
    assert done.out.startswith("REVOKED  model not known: serial and engine not known\n")
    assert f"   verdict   sha256 {'a' * 64}\n   slots     not known\n" in done.out
    assert "   note      the ledger does not know this verdict" in done.out


def test_a_bundle_whose_verdict_nobody_signed_is_not_revoked(gate):
    path = Path("b1/seals/verdict.dsse.json")
    path.write_bytes(canonical_json({**json.loads(path.read_bytes()), "signatures": []}))
    done = gate("revoke", "b1", "--policy", "trust.toml", "--reason", "leaked", key="pam")
    assert done.code == 4
    assert "b1/seals/verdict.dsse.json: nobody signed the verdict" in done.err
    assert "gate revoke SHA256 --policy trust.toml" in done.err
    assert not Path("ledger.jsonl").exists()


def test_a_rollback_names_what_is_wrong_with_the_last_good_one_and_how_to_go_on(gate):
    for bundle in ("b1", "b2", "b3"):
        assert gate("promote", bundle, *at("staging"), key="pam").code == 0
    Path("b2/artifacts/model.onnx").write_bytes(b"x")
    refused = gate("rollback", *at("staging"), "--reason", "r", key="pam")
    assert refused.code == 4
    assert "b2/artifacts/model.onnx" in refused.err
    assert "--older" in refused.err
    back = gate("rollback", *at("staging"), "--reason", "r", "--older", key="pam")
    assert back.code == 0, back.err
    assert "serial 1, ort-fp16 has all of the traffic again" in back.out
    assert "   note      passed over serial 2, " in back.out
    with pytest.raises(SystemExit, match="2"):
        gate("rollback", *at("staging"), "--reason", "r", "--older", "--bundle", "b1", key="pam")


def policy_with(key, more):
    """The policy with a line more for a key."""
    path = Path("trust.toml")
    path.write_text(path.read_text().replace(f'name = "{key}"\n', f'name = "{key}"\n{more}\n', 1))


def second_promoter():
    """Ada becomes a promoter beside Pam."""
    text = Path("trust.toml").read_text()
    before, name, after = text.partition('name = "ada"\n')
    Path("trust.toml").write_text(before + name + after.replace('["release"]', '["release", "promoter"]', 1))


def test_a_ledger_of_a_revoked_promoter_is_taken_over_by_another(gate):
    second_promoter()
    gate("promote", "b1", *at("staging"), key="pam")
    kept = json.loads(gate("promote", "b2", *at("staging"), "--json", key="pam").out)["sha256"]
    policy_with("pam", 'revoked = 2099-01-01\nreason = "stolen"')
    assert gate("ledger", "verify", "--policy", "trust.toml").code == 0
    lines = Path("ledger.jsonl").read_bytes()
    time = json.loads(gate("ledger", "show", "--policy", "trust.toml", "--json").out)["entries"][-1]["time"]
    second = dt.datetime.fromisoformat(time.replace("Z", "+00:00")) + dt.timedelta(seconds=1)
    policy = Path("trust.toml").read_text()
    Path("trust.toml").write_text(policy.replace("2099-01-01", second.strftime("%Y-%m-%dT%H:%M:%SZ")))
    while dt.datetime.now(dt.timezone.utc) < second:
        sleep(0.05)
    for words in (
        ("ledger", "verify"),
        ("ledger", "show"),
        ("verify", "b2", "--model", "digits-cnn", "--slot", "staging"),
    ):
        refused = gate(*words, "--policy", "trust.toml")
        assert refused.code == 4, words
        assert "gate ledger sign --policy trust.toml --key KEY" in refused.err
    head = Path("ledger.jsonl.head").read_bytes()
    for more, key, code in (((), "pam", 4), (("--expect", "a" * 64), "ada", 4), (("--expect", "x"), "ada", 2)):
        assert gate("ledger", "sign", "--policy", "trust.toml", *more, key=key).code == code
        assert Path("ledger.jsonl.head").read_bytes() == head
    done = gate("ledger", "sign", "--policy", "trust.toml", "--expect", kept, key="ada")
    assert done.code == 0, done.err
    assert "entries   2; the head is signed by pam" in done.out
    assert "promote serial 2 full of digits-cnn / staging, by pam: no reason" in done.out
    assert f"entry 1, sha256 {kept}; compare it" in done.out
    assert done.out.endswith("SIGNED  ledger.jsonl by ada\n")
    assert gate("ledger", "verify", "--policy", "trust.toml", "--expect", kept).code == 0
    assert Path("ledger.jsonl").read_bytes() == lines
    assert json.loads(gate("ledger", "sign", "--policy", "trust.toml", "--json", key="ada").out)["signed"] is True


def test_there_is_nothing_to_sign_before_the_first_entry(gate):
    refused = gate("ledger", "sign", "--policy", "trust.toml", key="pam")
    assert refused.code == 4
    assert "there is no ledger yet" in refused.err


def test_every_command_tells_what_a_writer_that_was_stopped_left(gate):
    gate("promote", "b1", *at("staging"), key="pam")
    kept = Path("ledger.jsonl").read_bytes()

    def torn():
        Path("ledger.jsonl").write_bytes(kept + b'{"payload"')

    for words, key in (
        (("verify", "b1", *at("staging")), None),
        (("verify", "b3", *at("production")), None),
        (("ledger", "verify", "--policy", "trust.toml"), None),
        (("ledger", "show", "--policy", "trust.toml"), None),
        (("ledger", "sign", "--policy", "trust.toml"), "pam"),
        (("approve", "b2", *at("production")), "ada"),
        (("revoke", "b3", "--policy", "trust.toml", "--reason", "r"), "pam"),
    ):
        torn()
        told = gate(*words, key=key).out
        assert re.search("^ *note:? .*line 2 is torn", told, re.MULTILINE), words
    Path("ledger.jsonl").unlink()
    Path("ledger.jsonl.head").unlink()
    gate("promote", "b1", *at("staging"), key="pam")
    kept = Path("ledger.jsonl").read_bytes()
    for path in Path("b2/seals").glob("approval-*"):
        path.unlink()
    for words, key in (
        (("verify", "b1", *at("staging")), None),
        (("verify", "b3", *at("production")), None),
        (("ledger", "verify", "--policy", "trust.toml"), None),
        (("ledger", "show", "--policy", "trust.toml"), None),
        (("ledger", "sign", "--policy", "trust.toml"), "pam"),
        (("approve", "b2", *at("production")), "ada"),
        (("promote", "b2", *at("staging")), "pam"),
    ):
        torn()
        assert any("line 2 is torn" in each for each in json.loads(gate(*words, "--json", key=key).out)["warnings"])


def test_the_ledger_is_verified_with_a_line_that_was_kept_elsewhere(gate, tmp_path):
    gate("promote", "b1", *at("staging"), key="pam")
    old = {name: Path(name).read_bytes() for name in ("ledger.jsonl", "ledger.jsonl.head")}
    kept = json.loads(gate("promote", "b2", *at("staging"), "--json", key="pam").out)["sha256"]
    good = gate("ledger", "verify", "--policy", "trust.toml", "--expect", kept)
    assert good.code == 0
    assert good.out.startswith("VERIFIED  ledger.jsonl: 2 entries")
    assert "expected  is entry 1" in good.out
    for name, content in old.items():
        Path(name).write_bytes(content)
    assert gate("ledger", "verify", "--policy", "trust.toml").code == 0
    bad = gate("ledger", "verify", "--policy", "trust.toml", "--expect", kept)
    assert bad.code == 4
    assert "put back to an older state" in bad.err
    assert gate("ledger", "verify", "--policy", "trust.toml", "--expect", "abc").code == 2


@pytest.mark.parametrize(
    "change", [lambda data: data[:-5], lambda data: data.replace(b'"keyid"', b'"keyID"'), lambda _: b""]
)
def test_a_ledger_that_was_edited_or_cut_is_refused_by_every_command(gate, change):
    for bundle in ("b1", "b2"):
        gate("promote", bundle, *at("staging"), key="pam")
    path = Path("ledger.jsonl")
    path.write_bytes(change(path.read_bytes()))
    for words in (
        ("ledger", "verify", "--policy", "trust.toml"),
        ("ledger", "show", "--policy", "trust.toml"),
        ("promote", "b3", *at("staging"), "--key", "pam"),
        ("rollback", *at("staging"), "--reason", "x", "--key", "pam"),
        ("revoke", "b1", "--policy", "trust.toml", "--reason", "x", "--key", "pam"),
    ):
        answer = gate(*words)
        assert answer.code == 4
        assert "ledger.jsonl" in answer.err
        assert "Traceback" not in answer.err


def test_json_is_one_object_on_one_line(gate):
    approved = json.loads(gate("approve", "b1", *at("production"), "--json", key="ada").out)
    assert (approved["key"], approved["role"], approved["serial"]) == ("ada", "release", 1)
    promoted = json.loads(gate("promote", "b1", *at("production"), "--json", key="pam").out)
    assert promoted["entry"]["stage"] == "canary"
    assert promoted["next_stage"] == "full"
    dropped = json.loads(gate("rollback", *at("production"), "--reason", "r", "--json", key="pam").out)
    assert (dropped["entry"]["action"], dropped["entry"]["full"]) == ("rollback", False)
    revoked = json.loads(
        gate("revoke", promoted["entry"]["verdict"], "--policy", "trust.toml", "--reason", "r", "--json", key="pam").out
    )
    assert (revoked["entry"]["action"], revoked["slots"]) == ("revoke", ["production"])
    shown = json.loads(gate("ledger", "show", "--policy", "trust.toml", "--json").out)
    assert [each["stage"] for each in shown["occupations"]] == ["canary"]
    assert [each["action"] for each in shown["entries"]] == ["promote", "rollback", "revoke"]
    verified = json.loads(gate("ledger", "verify", "--policy", "trust.toml", "--json").out)
    assert (verified["entries"], verified["sha256"]) == (3, revoked["sha256"])


def test_wrong_use_exits_2(gate):
    assert gate("promote", "b1", *at("staging")).code == 2
    assert gate("promote", "b1", *at("prod"), key="pam").code == 2
    assert gate("ledger", "show", "--policy", "trust.toml", "--slot", "prod").code == 2
    assert gate("ledger", "verify", "--policy", "none.toml").code == 2
    for requests in ("-1", "1.5", "1e3", "many", ""):
        with pytest.raises(SystemExit, match="2"):
            gate("promote", "b1", *at("staging"), "--requests", requests, key="pam")


@pytest.mark.parametrize("key", ["gate", "ada", "eve"])
def test_the_key_of_somebody_else_is_refused(gate, key):
    answer = gate("promote", "b1", *at("staging"), key=key)
    assert answer.code == 4
    assert "not promoter" in answer.err or "does not have the key" in answer.err
    assert not Path("ledger.jsonl").exists()


def test_an_empty_ledger_says_so(gate):
    assert gate("ledger", "show", "--policy", "trust.toml").out == "nothing was promoted: ledger.jsonl\n"
    assert gate("ledger", "verify", "--policy", "trust.toml").out == "VERIFIED  ledger.jsonl: 0 entries\n"
    assert gate("ledger", "verify", "--policy", "trust.toml", "--expect", "a" * 64).code == 4


def test_text_in_the_ledger_cannot_move_the_cursor(gate):
    gate("promote", "b1", *at("staging"), "--reason", "\x1b[2Jgone", key="pam")
    assert "\x1b" not in gate("ledger", "show", "--policy", "trust.toml").out


def test_of_two_commands_at_once_one_wins_and_the_other_is_told(gate, tmp_path):
    """Serials 1 and 2 start together; whichever is second is refused with the reason, and the ledger verifies."""
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "gate", "promote", bundle, *at("production"), "--stage", "canary", "--key", "pam"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for bundle in ("b1", "b2")
        if gate("approve", bundle, *at("production"), key="ada").code == 0
    ]
    said = [each.communicate(timeout=60) for each in both]
    assert sorted(each.returncode for each in both) == [0, 4]
    told = next(err for each, (_, err) in zip(both, said, strict=True) if each.returncode == 4)
    assert (
        "somebody else was first" in told or "is in the stage canary" in told or "not above" in told or "serial" in told
    )
    found = gate("ledger", "verify", "--policy", "trust.toml", "--json")
    assert json.loads(found.out)["entries"] == 1
