"""What `verify` returns, and how little else can."""

import copy
import dataclasses
import pickle
import shutil
from pathlib import Path

import pytest

from gate.errors import (
    ApprovalsMissing,
    BundleError,
    DigestMismatch,
    GateError,
    IdentityMismatch,
    SignatureMismatch,
    SpecError,
    StaleVerdict,
    VerificationError,
)
from gate.ledger import read_ledger
from gate.promotion import promote
from gate.signing import open_signer
from gate.trust import ledger_path, read_policy
from gate.verification import VerifiedBundle, verify
from tests.withstand.release_artefacts import key_file, lay_out_keys

GOOD = Path(__file__).parent / "data" / "release" / "good"
MODEL, SLOT = "digits-cnn", "production"


@pytest.fixture
def good(tmp_path):
    shutil.copytree(GOOD, tmp_path / "good")
    return tmp_path / "good"


def policy_of(good, *changes):
    """The policy, after changes of its text."""
    path = good / "release/trust.toml"
    text = path.read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(text)
    return read_policy(path)


def verified(good, *, policy=None, **options):
    policy = policy or policy_of(good)
    path = ledger_path(policy)
    history = None if path is None else read_ledger(path, policy).history
    return verify(good / "bundle", **{"policy": policy, "model": MODEL, "slot": SLOT, "history": history, **options})


def test_steps_are_those_of_the_documentation_in_their_order(good):
    told = []
    with verified(good, on_step=told.append) as found:
        assert [each.name for each in told] == [
            "tree", "policy", "signature", "schema", "digests", "subject", "verdict", "freshness", "approvals",
        ]  # fmt: skip
        assert found.steps == tuple(told)
        assert all(each.ok for each in told)
        assert found.signed_by == "gate-ci"
        assert {each.role for each in found.approvals} == {"release"}


def test_a_verified_bundle_cannot_be_made_by_hand(good):
    with verified(good) as found:
        fields = {each.name: getattr(found, each.name) for each in dataclasses.fields(found)}
        with pytest.raises(VerificationError, match="is what gate.verification.verify returns, and nothing else"):
            VerifiedBundle(**{**fields, "_token": object()})
        with pytest.raises(ValueError, match="_token"):
            dataclasses.replace(found, slot="staging")
        with pytest.raises(TypeError):
            VerifiedBundle(**{name: value for name, value in fields.items() if name != "_token"})
        for make in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(VerificationError, match="cannot be copied; verify it again"):
                make(found)
        with pytest.raises(dataclasses.FrozenInstanceError):
            found.slot = "other"


def test_what_is_opened_is_the_file_that_was_hashed_whatever_has_its_name_now(good):
    engine = good / "bundle/artifacts/model.onnx"
    genuine = engine.read_bytes()
    with verified(good) as found:
        engine.rename(engine.with_name("elsewhere"))
        engine.write_bytes(b"another")
        for _ in range(2):
            with found.open(found.engine) as stream:
                assert stream.read() == genuine
        with pytest.raises(BundleError, match="is not a file that is kept open"):
            found.open("evidence/metrics.json")
    with pytest.raises(BundleError, match="is not a file that is kept open"):
        found.open(found.engine)


def test_nothing_stays_open_after_a_refusal(good):
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    with pytest.raises(VerificationError):
        verified(good, now="2200-01-01T00:00:00Z")
    (good / "bundle/policy/gate.toml").write_bytes(b"x")
    with pytest.raises(DigestMismatch):
        verified(good)
    assert len(list(descriptors.iterdir())) == before


def promoted(good):
    """The good bundle, let into the slot."""
    lay_out_keys(good / "keys")
    signer = open_signer(str(good / key_file("promoter")))
    promote(good / "bundle", policy=policy_of(good), model=MODEL, slot=SLOT, signer=signer, reason="")
    return good


def test_what_was_never_let_in_is_not_taken_for_what_was(good):
    with pytest.raises(StaleVerdict, match="by the ledger it was never let into production"):
        verified(good, admission=False)
    with pytest.raises(SpecError, match="what the ledger says was not given"):
        verified(good, admission=False, history=None)


def test_what_the_ledger_says_has_to_be_given_where_there_is_one(good):
    with pytest.raises(SpecError, match="what the ledger says was not given"):
        verified(good, history=None)


def test_what_was_let_in_before_outlives_its_keys_but_not_their_revocation(good):
    promoted(good)
    late = "2126-01-01T00:00:00Z"
    with pytest.raises(SignatureMismatch, match="key gate-ci expired on"):
        verified(good, now=late)
    with verified(good, now=late, admission=False) as found:
        assert sorted(each.key for each in found.approvals) == ["ada", "grace"]
        assert found.warnings == ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.stage = "full"
    stolen = policy_of(good, ('name        = "gate-ci"', 'name = "gate-ci"\nrevoked = 2026-11-01\nreason = "stolen"'))
    for admission in (True, False):
        with pytest.raises(SignatureMismatch, match="key gate-ci was revoked on 2026-11-01: stolen"):
            verified(good, policy=stolen, admission=admission)


def test_a_promoters_word_alone_does_not_let_in_what_nobody_approved(good):
    promoted(good)
    for path in (good / "bundle/seals").glob("approval-*"):
        path.unlink()
    with pytest.raises(ApprovalsMissing, match="needs 2 more approvals by role release"):
        verified(good, admission=False)


def test_approvals_of_a_key_that_was_revoked_since_do_not_count_any_more(good):
    promoted(good)
    policy = policy_of(good, ('name        = "ada"', 'name = "ada"\nrevoked = 2026-11-01\nreason = "left"'))
    with pytest.raises(ApprovalsMissing, match="key ada was revoked on 2026-11-01: left"):
        verified(good, policy=policy, admission=False)


def test_a_policy_that_moved_on_warns_of_what_runs_and_does_not_stop_it(good):
    promoted(good)
    policy = policy_of(
        good,
        ('data     = ["' + "d" * 64, 'data     = ["' + "e" * 64),
        ('evidence  = "host"\nfindings  = ["parity", "latency.p99_ms"]', 'evidence = "device"\nfindings = ["task"]'),
    )
    with pytest.raises(IdentityMismatch, match="its data is dddddddd…"):
        verified(good, policy=policy)
    with verified(good, policy=policy, admission=False, stage="full") as found:
        changed = "the policy has changed since it was let in: "
        assert [each.removeprefix(changed) for each in found.warnings] == [
            "its data is dddddddd…, the policy takes eeeeeeee…",
            "the policy asks for task, which was not checked",
            "it asks for evidence device, this is host",
        ]


def test_what_had_all_of_the_traffic_had_it_whatever_the_stage_is_called_now(good):
    promoted(good)
    policy = policy_of(good, ("[slot.staging]", '  [[slot.production.stage]]\n  name = "everyone"\n\n[slot.staging]'))
    with verified(good, policy=policy, admission=False, stage="full") as found:
        assert found.stage == "everyone"
        assert found.warnings == ("stage full of production is not in the policy any more; held against everyone",)
    with verified(good, policy=policy, admission=False, stage="everyone") as found:
        assert found.warnings == ()


def test_an_owner_of_the_gates_key_does_not_approve(good):
    policy = policy_of(good, ('owner       = "Ada"', 'owner = "CI of the digits team"'))
    with pytest.raises(ApprovalsMissing, match="holds the key that signed the verdict, too"):
        verified(good, policy=policy)


def test_a_large_file_in_place_of_another_is_refused_by_its_size_alone(good):
    with (good / "bundle/artifacts/model.onnx").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(DigestMismatch, match="has 1099511627776 bytes, sealed were 2751"):
        verified(good)


def test_a_bundle_that_is_reached_by_a_link_says_where_it_leads(good):
    (good / "current").symlink_to(good / "bundle")
    policy = policy_of(good)
    with pytest.raises(VerificationError, match="is a symbolic link, not a bundle") as caught:
        verify(
            good / "current",
            policy=policy,
            model=MODEL,
            slot=SLOT,
            history=read_ledger(ledger_path(policy), policy).history,
        )
    assert str(good / "bundle") in caught.value.hint


def test_approvals_may_be_left_to_come(good):
    for path in (good / "bundle/seals").glob("approval-*"):
        path.unlink()
    with pytest.raises(VerificationError, match="needs 2 more approvals by role release"):
        verified(good)
    with verified(good, approvals=False) as found:
        assert found.approvals == ()


@pytest.mark.parametrize(("asked", "message"), [({"slot": "nowhere"}, "nowhere"), ({"stage": "nowhere"}, "nowhere")])
def test_a_slot_or_stage_that_the_policy_does_not_have_is_a_wrong_use(good, asked, message):
    with pytest.raises(SpecError, match=message):
        verified(good, **asked)


@pytest.mark.parametrize("now", ["", "now", "2026-02-31T00:00:00Z", "2026-11-21", "2026-11-21T10:00:00+00:00"])
def test_a_time_that_is_none_verifies_nothing(good, now):
    with pytest.raises(GateError):
        verified(good, now=now)
