import base64
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from gate import promotion
from gate.errors import (
    ApprovalsMissing,
    BundleError,
    DigestMismatch,
    IdentityMismatch,
    LedgerError,
    PromotionRefused,
    SignatureMismatch,
    SpecError,
    StaleVerdict,
    VerificationError,
)
from gate.ledger import read_ledger, sign_head
from gate.manifest import canonical_json, sha256_hex
from gate.release.policy import SlotPolicy, StagePolicy, TrustedKey
from gate.release.statements import IN_TOTO
from gate.results import run_from_builtins
from gate.signing import KeySigner, new_key, open_signer
from gate.store import Release, seal
from gate.trust import PolicyFile, read_policy

DATA = Path(__file__).parent / "data"
NAMES = ("gate", "ada", "ben", "cyd", "pam", "eve")
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
name = "ben"
owner = "Ben"
roles = ["release", "safety"]
public = "{ben}"

[[key]]
name = "cyd"
owner = "Cyd"
roles = ["release"]
public = "{cyd}"
revoked = 2026-11-20

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
approvals = {{ release = 2 }}
  [[slot.production.stage]]
  name = "shadow"
  approvals = {{}}
  min_hours = 24
  [[slot.production.stage]]
  name = "canary"
  min_requests = 1000
  [[slot.production.stage]]
  name = "full"
"""


@dataclass
class World:
    root: Path
    signers: dict[str, KeySigner]
    policy: PolicyFile

    def bundle(self, serial):
        return self.root / f"serial-{serial}"

    def promote(self, serial, *, slot="staging", now="2026-11-22T00:00:00Z", who="pam", **more):
        return promotion.promote(
            self.bundle(serial),
            policy=self.policy,
            model="digits-cnn",
            slot=slot,
            signer=self.signers[who],
            now=now,
            **more,
        )

    def approve(self, serial, who, *, slot="production", now="2026-11-22T00:00:00Z", **more):
        return promotion.approve(
            self.bundle(serial),
            policy=self.policy,
            model="digits-cnn",
            slot=slot,
            signer=self.signers[who],
            now=now,
            **more,
        )

    def rollback(self, *, slot="staging", now="2026-11-25T00:00:00Z", reason="slow", who="pam", **more):
        return promotion.rollback(
            policy=self.policy, model="digits-cnn", slot=slot, signer=self.signers[who], now=now, reason=reason, **more
        )

    def revoke(self, what, *, now="2026-11-25T00:00:00Z", reason="wrong labels", who="pam"):
        return promotion.revoke(str(what), policy=self.policy, signer=self.signers[who], reason=reason, now=now)

    def history(self):
        return read_ledger(self.root / "ledger.jsonl", self.policy).history

    def current(self, slot="staging"):
        found = self.history().current("digits-cnn", slot)
        return None if found is None else found.serial


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Four sealed bundles with serials 1 to 4, and keys; read only."""
    import onnx
    from onnx import TensorProto, helper

    root = tmp_path_factory.mktemp("made")
    for name in NAMES:
        new_key(root / name, password=None)
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", value[:1], value[1:])
    onnx.save(helper.make_model(graph), root / "model.onnx")
    run = run_from_builtins(json.loads((DATA / "run.json").read_bytes()))
    first = run.engines[0]
    latency = msgspec.structs.replace(
        first.latencies[0], durations_ns=tuple(200_000 + (i * 7919) % 50_000 for i in range(500))
    )
    engine_sha256 = sha256_hex((root / "model.onnx").read_bytes())
    result = msgspec.structs.replace(first, latencies=(latency,), engine_sha256=engine_sha256)
    run = msgspec.structs.replace(run, engines=(result,))
    for serial in (1, 2, 3, 4):
        seal(
            result.verdict.require_passed(),
            run=run,
            result=result,
            engine_file=root / "model.onnx",
            extra={"policy/gate.toml": (DATA / "sealed.toml").read_bytes()},
            out=root / f"serial-{serial}",
            release=Release(slots=("staging", "production"), serial=serial, signer=open_signer(str(root / "gate"))),
        )
    return root


@pytest.fixture
def world(made, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    signers = {name: open_signer(str(tmp_path / name)) for name in NAMES}
    (tmp_path / "trust.toml").write_text(POLICY.format(**{name: each.public.text for name, each in signers.items()}))
    return World(tmp_path, signers, read_policy(tmp_path / "trust.toml"))


def test_a_bundle_is_verified_and_written_into_the_ledger(world):
    done = world.promote(1, reason="first")
    found = world.history().current("digits-cnn", "staging")
    assert found == done.entry
    assert (found.serial, found.stage, found.full, found.reason, found.index) == (1, "full", True, "first", 0)
    assert found.bundle == str(world.bundle(1))
    assert found.policy_sha256 == world.policy.sha256
    assert done.key == "pam"
    assert done.following is None


def test_a_bundle_goes_through_every_stage_with_approvals_hours_and_requests(world):
    assert world.promote(1, slot="production").following.name == "canary"
    with pytest.raises(ApprovalsMissing):
        world.promote(1, slot="production", now="2026-11-24T00:00:00Z")
    world.approve(1, "ada")
    with pytest.raises(ApprovalsMissing):
        world.promote(1, slot="production", now="2026-11-24T00:00:00Z")
    world.approve(1, "ben", role="release")
    with pytest.raises(PromotionRefused, match="for 1.0 h of the 24 h"):
        world.promote(1, slot="production", now="2026-11-22T01:00:00Z")
    done = world.promote(1, slot="production", now="2026-11-24T00:00:00Z")
    assert (done.entry.stage, done.entry.full) == ("canary", False)
    assert {each.key for each in done.entry.approvals} == {"ada", "ben"}
    with pytest.raises(PromotionRefused, match="has to serve 1000 requests in canary"):
        world.promote(1, slot="production", now="2026-11-25T00:00:00Z")
    done = world.promote(1, slot="production", now="2026-11-25T00:00:00Z", requests=1500)
    assert (done.entry.stage, done.entry.full, done.entry.requests) == ("full", True, 1500)
    with pytest.raises(PromotionRefused, match="it is there already"):
        world.promote(1, slot="production", now="2026-11-26T00:00:00Z")


def test_no_stage_is_skipped(world):
    for who in ("ada", "ben"):
        world.approve(1, who, role="release")
    for stage in ("canary", "full"):
        with pytest.raises(PromotionRefused, match=f"the next stage is shadow, not {stage}"):
            world.promote(1, slot="production", stage=stage)
    with pytest.raises(SpecError, match="there is no stage"):
        world.promote(1, slot="production", stage="everything")
    assert world.history().entries == ()


def test_another_bundle_waits_until_the_first_is_through_or_rolled_back(world):
    world.promote(1, slot="production")
    with pytest.raises(PromotionRefused, match="serial 1 .* is in the stage shadow"):
        world.promote(2, slot="production")
    world.rollback(slot="production")
    assert world.history().candidate("digits-cnn", "production") is None
    assert world.promote(2, slot="production", now="2026-11-26T00:00:00Z").entry.serial == 2


def test_an_older_serial_is_refused(world):
    world.promote(2)
    with pytest.raises((StaleVerdict, PromotionRefused), match="2"):
        world.promote(1)


@pytest.mark.parametrize("who", ["gate", "ada", "cyd", "eve"])
def test_only_a_promoter_promotes_rolls_back_and_revokes(world, who):
    for act in (lambda: world.promote(1, who=who), lambda: world.rollback(who=who), lambda: world.revoke("x", who=who)):
        with pytest.raises(PromotionRefused, match="not promoter|does not have the key|revoked"):
            act()
    assert not (world.root / "ledger.jsonl").exists()


def test_a_bundle_that_does_not_verify_is_neither_promoted_nor_approved(world):
    with (world.bundle(1) / "artifacts" / "model.onnx").open("ab") as stream:
        stream.write(b"x")
    for act in (lambda: world.promote(1), lambda: world.approve(1, "ada")):
        with pytest.raises(DigestMismatch, match="model.onnx"):
            act()
    assert not (world.root / "ledger.jsonl").exists()
    assert not list((world.bundle(1) / "seals").glob("approval-*"))


def test_another_model_or_slot_is_refused(world):
    arguments = {"policy": world.policy, "signer": world.signers["pam"], "now": "2026-11-22T00:00:00Z"}
    with pytest.raises(IdentityMismatch, match="'other'"):
        promotion.promote(world.bundle(1), model="other", slot="staging", **arguments)
    with pytest.raises(SpecError, match="no slot 'prod'"):
        promotion.promote(world.bundle(1), model="digits-cnn", slot="prod", **arguments)
    with pytest.raises(SpecError, match="no slot 'prod'"):
        promotion.rollback(model="digits-cnn", slot="prod", reason="x", **arguments)


@pytest.mark.parametrize(
    "bundle, message", [("nothing", "there is no bundle"), ("trust.toml", "is not a folder"), (".", "")]
)
def test_what_is_no_bundle_is_refused(world, bundle, message):
    with pytest.raises(BundleError, match=f"{message}(.|\\n)*gate revoke SHA256 --policy"):
        world.revoke(world.root / bundle)
    with pytest.raises(BundleError, match="verdict.dsse.json"):
        promotion.promote(
            world.root / bundle, policy=world.policy, model="digits-cnn", slot="staging", signer=world.signers["pam"]
        )


def test_a_bundle_that_is_reached_by_a_link_is_refused_with_what_it_leads_to(world):
    link = world.root / "latest"
    link.symlink_to(world.bundle(1))
    asked = {"policy": world.policy, "model": "digits-cnn", "now": "2026-11-22T00:00:00Z"}
    message = "latest: is a symbolic link; give what it leads to, .*serial-1"
    with pytest.raises(VerificationError, match=message):
        promotion.promote(link, slot="staging", signer=world.signers["pam"], **asked)
    with pytest.raises(VerificationError, match=message):
        promotion.approve(link, slot="production", signer=world.signers["ada"], **asked)
    with pytest.raises(VerificationError, match=message):
        world.revoke(link)
    for serial in (1, 2):
        world.promote(serial)
    with pytest.raises(PromotionRefused, match=message):
        world.rollback(bundle=link)


def test_a_key_approves_once_and_for_one_slot_at_a_time(world):
    done = world.approve(1, "ada", comment="looked at it")
    assert done.path.name == f"approval-{world.signers['ada'].public.keyid[:16]}-production.dsse.json"
    before = done.path.read_bytes()
    with pytest.raises(PromotionRefused, match="ada approved it for production already"):
        world.approve(1, "ada")
    assert done.path.read_bytes() == before


@pytest.mark.parametrize(
    "who, more, message",
    [
        ("gate", {}, "gate-ci issues verdicts, and cannot approve them"),
        ("gate", {"role": "release"}, "cannot approve"),
        ("pam", {}, "pam is promoter; production asks for approvals by release"),
        ("pam", {"role": "release"}, "pam is promoter, not release"),
        ("ada", {"role": "safety"}, "ada is release, not safety"),
        ("ben", {"role": "safety"}, "production asks for no approval by safety, but by release"),
        ("cyd", {}, "key cyd was revoked"),
        ("eve", {}, "does not have the key"),
        ("ada", {"slot": "staging"}, "staging asks for approvals by nobody"),
    ],
)
def test_a_key_that_may_not_approve_writes_nothing(world, who, more, message):
    with pytest.raises(PromotionRefused, match=message):
        world.approve(1, who, **more)
    assert not list((world.bundle(1) / "seals").glob("approval-*"))


def test_a_key_of_several_roles_that_are_asked_for_has_to_say_which(world):
    slot = SlotPolicy(approvals={"release": 1}, stage=(StagePolicy(name="full", approvals={"safety": 1}),))
    policy = msgspec.structs.replace(world.policy.policy, slot={"s": slot})
    key = TrustedKey(name="ben", owner="Ben", roles=("release", "safety"), public="")
    with pytest.raises(PromotionRefused, match="may approve as release or safety"):
        promotion.role_of(key, policy, "s", None, where="trust.toml")
    assert promotion.role_of(key, policy, "s", "safety", where="trust.toml") == "safety"


def test_a_rollback_goes_to_the_last_good_one_and_says_what_was_passed_over(world):
    for serial in (1, 2, 3):
        world.promote(serial)
    shutil.rmtree(world.bundle(2))
    done = world.rollback(older=True)
    assert (done.entry.serial, done.entry.action, done.entry.full) == (1, "rollback", True)
    assert any("passed over serial 2, " in note and "serial-2" in note for note in done.notes)
    assert world.current() == 1


def test_a_rollback_does_not_go_further_back_by_itself(world):
    for serial in (1, 2, 3):
        world.promote(serial)
    with (world.bundle(2) / "artifacts" / "model.onnx").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(PromotionRefused, match="serial 2, the last good one before, cannot be gone back to") as caught:
        world.rollback()
    assert "artifacts/model.onnx: " in caught.value.message
    assert "--bundle DIR" in caught.value.hint
    assert "or go further back, to serial 1 or the next older that verifies: gate rollback" in caught.value.hint
    assert caught.value.hint.endswith("--older")
    assert world.current() == 3
    assert world.rollback(older=True).entry.serial == 1


def test_a_rollback_to_the_older_ones_takes_the_last_good_one_where_that_verifies(world):
    for serial in (1, 2, 3):
        world.promote(serial)
    assert world.rollback(older=True).entry.serial == 2
    with pytest.raises(SpecError, match="one or the other"):
        world.rollback(older=True, bundle=world.bundle(1))


def test_a_rollback_takes_the_candidate_out_before_anything_older(world):
    world.promote(1, slot="production")
    with pytest.raises(PromotionRefused, match="is in the stage shadow: that is taken out first(.|\n)*--older"):
        world.rollback(slot="production", older=True)


def test_a_folder_that_was_sealed_into_again_is_told_so(world):
    for serial in (1, 2):
        world.promote(serial)
    shutil.rmtree(world.bundle(1))
    shutil.copytree(world.bundle(3), world.bundle(1))
    for older in (False, True):
        with pytest.raises(
            PromotionRefused,
            match="serial-1 now holds serial 3; the one that was promoted, serial 1, is not there: keep each bundle in a "
            "folder of its own, or give --bundle",
        ):
            world.rollback(older=older)
    assert world.current() == 2


def test_a_rollback_never_goes_to_a_revoked_one_however_it_is_asked_for(world):
    for serial in (1, 2):
        world.promote(serial)
    world.revoke(world.bundle(1))
    with pytest.raises(PromotionRefused, match="nothing good was here before serial 2; 1 was revoked"):
        world.rollback()
    with pytest.raises(PromotionRefused, match="nothing good"):
        world.rollback(bundle=world.bundle(1))
    assert world.current() == 2


def test_a_rollback_finds_a_bundle_that_was_moved_where_it_is_told(world):
    for serial in (1, 2):
        world.promote(serial)
    world.bundle(1).rename(world.root / "moved")
    with pytest.raises(PromotionRefused, match="serial 1, the last good one before(.|\n)*--bundle DIR$"):
        world.rollback()
    assert world.rollback(bundle=world.root / "moved").entry.bundle == str(world.root / "moved")
    assert world.current() == 1


def test_a_rollback_to_what_never_was_there_or_is_there_is_refused(world):
    for serial in (1, 2):
        world.promote(serial)
    for serial in (2, 3):
        with pytest.raises(PromotionRefused, match="it holds the verdict"):
            world.rollback(bundle=world.bundle(serial))
    assert world.current() == 2


def test_a_bundle_that_was_changed_since_is_not_gone_back_to(world):
    for serial in (1, 2):
        world.promote(serial)
    (world.bundle(1) / "artifacts" / "model.onnx").write_bytes(b"x")
    with pytest.raises(PromotionRefused, match="artifacts/model.onnx: "):
        world.rollback()
    with pytest.raises(PromotionRefused, match="none of the bundles before this one verifies(.|\n)*--bundle DIR"):
        world.rollback(older=True)
    with pytest.raises(PromotionRefused, match="artifacts/model.onnx: "):
        world.rollback(bundle=world.bundle(1))
    assert world.current() == 2


def test_a_rollback_works_when_the_verdict_is_long_expired(world):
    for serial in (1, 2):
        world.promote(serial)
    assert world.rollback(now="2036-01-01T00:00:00Z").entry.serial == 1


def test_a_rollback_of_nothing_is_refused(world):
    with pytest.raises(PromotionRefused, match="nothing was promoted here"):
        world.rollback()
    world.promote(1)
    with pytest.raises(PromotionRefused, match="nothing good was here before serial 1"):
        world.rollback()


@pytest.mark.parametrize("reason", ["", "  \n"])
def test_a_rollback_and_a_revocation_say_why(world, reason):
    world.promote(1)
    for act in (lambda: world.rollback(reason=reason), lambda: world.revoke(world.bundle(1), reason=reason)):
        with pytest.raises(PromotionRefused, match="says no reason"):
            act()


def test_a_revoked_verdict_is_neither_promoted_nor_approved_again(world):
    verdict = world.promote(1).entry.verdict
    done = world.revoke(verdict)
    assert done.entry.model == "digits-cnn"
    assert [each.slot for each in done.places] == ["staging"]
    with pytest.raises(StaleVerdict, match="revoked"):
        world.promote(1, slot="production", now="2026-11-26T00:00:00Z")
    with pytest.raises(StaleVerdict, match="revoked"):
        world.approve(1, "ada", now="2026-11-26T00:00:00Z")
    with pytest.raises(PromotionRefused, match="was revoked at 2026-11-25T00:00:00Z: wrong labels"):
        world.revoke(world.bundle(1))


def test_a_bundle_that_was_never_promoted_can_be_revoked_by_its_folder(world):
    verdict = promotion.peek(world.bundle(3))[1]
    done = world.revoke(world.bundle(3))
    assert (done.entry.verdict, done.entry.model, done.slots) == (verdict, "digits-cnn", ("production", "staging"))
    assert world.history().revoked(verdict).serial == 3


def test_a_verdict_that_the_ledger_does_not_know_is_revoked_by_its_digest_and_stays_unnamed(world):
    verdict = promotion.peek(world.bundle(3))[1]
    done = world.revoke(verdict.upper())
    assert (done.entry.verdict, done.entry.model, done.entry.engine, done.slots) == (verdict, "", "", None)
    assert "the ledger does not know this verdict" in done.notes[0]
    with pytest.raises(StaleVerdict, match="revoked"):
        world.promote(3, now="2026-11-26T00:00:00Z")


def test_a_verdict_that_the_ledger_knows_is_revoked_by_its_digest_with_what_it_is(world):
    verdict = world.promote(1).entry.verdict
    (world.root / verdict).mkdir()
    done = world.revoke(verdict)
    assert (done.entry.model, done.entry.serial, done.slots) == ("digits-cnn", 1, ("staging",))
    assert done.notes == ()


def unsigned(world, bundle):
    path = bundle / "seals" / "verdict.dsse.json"
    said = json.loads(path.read_bytes())
    path.write_bytes(canonical_json({**said, "signatures": []}))


def edited(world, bundle):
    path = bundle / "seals" / "verdict.dsse.json"
    said = json.loads(path.read_bytes())
    payload = base64.b64decode(said["payload"]).replace(b'"serial":1', b'"serial":9')
    path.write_bytes(canonical_json({**said, "payload": base64.b64encode(payload).decode()}))


def signed_by(who):
    def change(world, bundle):
        path = bundle / "seals" / "verdict.dsse.json"
        payload = base64.b64decode(json.loads(path.read_bytes())["payload"])
        path.write_bytes(world.signers[who].sign(payload, IN_TOTO).to_bytes())

    return change


def signed_twice(world, bundle):
    path = bundle / "seals" / "verdict.dsse.json"
    said = json.loads(path.read_bytes())
    second = json.loads(world.signers["ada"].sign(base64.b64decode(said["payload"]), IN_TOTO).to_bytes())
    path.write_bytes(canonical_json({**said, "signatures": said["signatures"] + second["signatures"]}))


def of_another(world, bundle):
    shutil.copy(world.bundle(2) / "seals" / "verdict.dsse.json", bundle / "seals" / "verdict.dsse.json")
    (bundle / "artifacts" / "model.onnx").write_bytes(b"x")


def of_another_tree(world, bundle):
    shutil.copy(world.bundle(2) / "seals" / "verdict.dsse.json", bundle / "seals" / "verdict.dsse.json")
    (bundle / "evidence" / "more.json").write_bytes(b"{}")


@pytest.mark.parametrize(
    "change, error, message",
    [
        (unsigned, SignatureMismatch, "nobody signed the verdict"),
        (edited, SignatureMismatch, "does not hold"),
        (signed_by("eve"), SignatureMismatch, "is not in the policy"),
        (signed_by("pam"), SignatureMismatch, "key pam is of role promoter, not gate"),
        (signed_twice, SignatureMismatch, "2 keys signed the verdict, one does"),
        (of_another, DigestMismatch, "model.onnx"),
        (of_another_tree, VerificationError, "was not sealed: it was added"),
    ],
)
def test_only_a_verdict_by_the_gate_over_these_files_is_revoked_by_its_folder(world, change, error, message):
    world.promote(1)
    change(world, world.bundle(1))
    before = (world.root / "ledger.jsonl").read_bytes()
    with pytest.raises(error, match=message) as caught:
        world.revoke(world.bundle(1))
    assert caught.value.hint.startswith("gate revoke SHA256 --policy ")
    assert "not from this folder" in caught.value.hint
    assert (world.root / "ledger.jsonl").read_bytes() == before


@pytest.mark.parametrize("more", ["revoked = 2026-11-01", "valid_until = 2026-11-01"])
def test_a_verdict_by_a_key_that_no_longer_counts_can_be_revoked(world, more):
    path = world.root / "trust.toml"
    path.write_text(path.read_text().replace('roles = ["gate"]\n', f'roles = ["gate"]\n{more}\n'))
    world.policy = read_policy(path)
    assert world.revoke(world.bundle(1)).entry.serial == 1


def test_a_head_by_a_revoked_promoter_stops_every_action(world):
    world.promote(1)
    path = world.root / "trust.toml"
    path.write_text(
        path.read_text().replace('roles = ["promoter"]\n', 'roles = ["promoter"]\nrevoked = 2026-11-23\n', 1)
    )
    path.write_text(
        path.read_text().replace(
            'roles = ["release"]\npublic = "' + world.signers["ada"].public.text,
            'roles = ["release", "promoter"]\npublic = "' + world.signers["ada"].public.text,
        )
    )
    world.policy = read_policy(path)
    for act in (
        lambda: world.promote(2, who="ada", now="2026-11-24T00:00:00Z"),
        lambda: world.rollback(who="ada"),
        lambda: world.revoke(world.bundle(1), who="ada"),
        lambda: world.approve(2, "ben", role="release", now="2026-11-24T00:00:00Z"),
    ):
        with pytest.raises(
            LedgerError, match="its head is signed by pam, whose key was revoked(.|\n)*gate ledger sign"
        ):
            act()
    sign_head(world.root / "ledger.jsonl", world.policy, world.signers["ada"], now="2026-11-24T00:00:00Z")
    assert world.promote(2, who="ada", now="2026-11-24T00:00:00Z").entry.serial == 2


def test_what_was_rolled_back_from_is_told_so_when_it_is_promoted_again(world):
    world.promote(1, slot="production")
    world.rollback(slot="production")
    with pytest.raises(
        StaleVerdict, match="it was rolled back from shadow on 2026-11-25T00:00:00Z: check, seal and"
    ) as caught:
        world.promote(1, slot="production", now="2026-11-26T00:00:00Z")
    assert "older verdict" not in str(caught.value)


STALE = ".tmp-999999999-0123456789abcdef"


def test_what_an_approval_that_was_stopped_left_is_removed(world):
    (world.bundle(1) / "seals" / STALE).write_bytes(b"{")
    world.approve(1, "ada")
    assert not (world.bundle(1) / "seals" / STALE).exists()


def linked_seals(bundle, outside):
    shutil.copytree(bundle / "seals", outside, dirs_exist_ok=True)
    shutil.rmtree(bundle / "seals")
    (bundle / "seals").symlink_to(outside)


def link_beside(bundle, outside):
    (bundle / "seals" / STALE).write_bytes(b"{")
    (bundle / "evidence" / "link").symlink_to(outside)


def folder_among_them(bundle, outside):
    (bundle / "seals" / STALE).mkdir()
    (bundle / "seals" / STALE / "data").write_bytes(b"x")


@pytest.mark.parametrize("change", [linked_seals, link_beside, folder_among_them])
def test_nothing_is_removed_where_the_tree_is_not_that_of_a_bundle(world, change, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / STALE).mkdir()
    (outside / STALE / "data").write_bytes(b"x")
    change(world.bundle(1), outside)
    with pytest.raises(BundleError, match="symbolic link|dot-file"):
        world.approve(1, "ada")
    assert (outside / STALE / "data").read_bytes() == b"x"
    assert (world.bundle(1) / "seals" / STALE).exists()


def test_an_edited_ledger_stops_everything(world):
    world.promote(1)
    path = world.root / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"payload":"', b'"payload": "'))
    for act in (
        lambda: world.promote(2),
        world.rollback,
        lambda: world.revoke(world.bundle(1)),
        lambda: world.approve(2, "ada"),
    ):
        with pytest.raises(LedgerError, match=r"ledger\.jsonl:1"):
            act()


def test_a_policy_without_a_ledger_promotes_nothing(world):
    path = world.root / "trust.toml"
    path.write_text(
        path.read_text().replace('ledger = "ledger.jsonl"\n', "").replace('"host"', '"host"\nload = "approved"')
    )
    world.policy = read_policy(path)
    with pytest.raises(PromotionRefused, match="names no ledger"):
        world.promote(1)
