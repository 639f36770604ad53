"""What `verify` returns, and how little else can."""

import copy
import dataclasses
import pickle
import shutil
from pathlib import Path

import pytest

from gate.errors import BundleError, DigestMismatch, GateError, SignatureMismatch, SpecError, VerificationError
from gate.ledger import read_ledger
from gate.trust import ledger_path, read_policy
from gate.verification import VerifiedBundle, verify

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
    return verify(good / "bundle", policy=policy, model=MODEL, slot=SLOT, **{"history": history, **options})


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
    policy = policy_of(good)
    with pytest.raises(VerificationError):
        verify(good / "bundle", policy=policy, model=MODEL, slot="production", now="2200-01-01T00:00:00Z")
    (good / "bundle/policy/gate.toml").write_bytes(b"x")
    with pytest.raises(DigestMismatch):
        verify(good / "bundle", policy=policy, model=MODEL, slot="production")
    assert len(list(descriptors.iterdir())) == before


def test_what_was_let_in_before_outlives_its_key_but_not_the_keys_revocation(good):
    policy = policy_of(good)
    entry = next(each.entry for each in policy.keys.values() if each.entry.name == "gate-ci")
    late = entry.valid_until
    with pytest.raises(SignatureMismatch, match="key gate-ci expired on"):
        verified(good, now=late)
    with verified(good, now=late, admission=False) as found:
        assert found.approvals == ()
    stolen = policy_of(good, ('name        = "gate-ci"', 'name = "gate-ci"\nrevoked = 2026-11-01\nreason = "stolen"'))
    for admission in (True, False):
        with pytest.raises(SignatureMismatch, match="key gate-ci was revoked on 2026-11-01: stolen"):
            verified(good, policy=stolen, admission=admission)


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
        verify(good / "bundle", policy=policy_of(good), **{"model": MODEL, "slot": SLOT, **asked})


@pytest.mark.parametrize("now", ["", "now", "2026-02-31T00:00:00Z", "2026-11-21", "2026-11-21T10:00:00+00:00"])
def test_a_time_that_is_none_verifies_nothing(good, now):
    with pytest.raises(GateError):
        verified(good, now=now)
