"""The rules by which a verdict is let in, each with what keeps it and what breaks it."""

import msgspec
import pytest

from gate.errors import ApprovalsMissing, IdentityMismatch, StaleVerdict, VerificationError
from gate.manifest import Digests
from gate.release.rules import (
    Vote,
    moment,
    require_approved,
    require_findings,
    require_fresh,
    require_identity,
    require_unrevoked,
    tally,
)
from gate.release.statements import LedgerEntry, StatedDevice, VerdictPredicate

SPEC, DATA, BASELINE, VERDICT = (letter * 64 for letter in "abcd")
NOW = "2026-11-21T12:00:00Z"


def predicate(**changes):
    said = VerdictPredicate(
        status="PASSED",
        evidence="device",
        model_id="detector@3a1f9c2",
        engine="trt-fp16",
        slots=("production", "staging"),
        serial=118,
        created="2026-11-20T12:00:00Z",
        not_after="2026-12-20T12:00:00Z",
        metadata_sha256="1" * 64,
        engine_sha256="2" * 64,
        digests=Digests(reference="3" * 64, data=DATA, spec=SPEC, baseline=BASELINE, weights=None, calibration=None),
        device=StatedDevice(name="NVIDIA H200", compute_capability="9.0", driver="580.159"),
        findings=(),
        gate_version="0.1.0",
    )
    return msgspec.structs.replace(said, **changes)


def identity(said=None, **changes):
    asked = {"model": "detector", "slot": "production", "spec": None, "data": None, "baseline": None}
    return require_identity(said or predicate(), **{**asked, **changes})


class Ledger:
    """What a ledger says, given."""

    def __init__(self, *, last=None, revoked=False, in_slot=False, dropped=False):
        self.last, self.is_revoked, self.in_slot, self.dropped = last, revoked, in_slot, dropped

    def last_serial(self, model, slot):
        return self.last if (model, slot) == ("detector", "production") else None

    def revoked(self, verdict):
        if not self.is_revoked:
            return None
        return LedgerEntry(
            index=0, previous="0" * 64, time=NOW, action="revoke", model="detector", slot="", stage="", full=False,
            verdict=verdict, serial=118, engine="trt-fp16", engine_sha256="2" * 64, bundle="", policy_sha256="4" * 64,
            approvals=(), requests=None, reason="wrong boxes",
        )  # fmt: skip

    def against(self, verdict, *, serial, engine, model, slot):
        return "it was rolled back from full on 2026-11-20" if self.dropped else None

    def is_in_slot(self, verdict, model, slot):
        return self.in_slot and (verdict, model, slot) == (VERDICT, "detector", "production")


def fresh(said=None, *, now=NOW, max_age_days=None, accepted=None, slot="production"):
    return require_fresh(said or predicate(), VERDICT, slot=slot, now=now, max_age_days=max_age_days, accepted=accepted)


def test_identity_names_what_it_is_and_what_it_rests_on():
    text = identity(spec=frozenset({SPEC}), data=None, baseline=frozenset({BASELINE, "e" * 64}))
    assert text == "detector / production; spec aaaaaaaa…, data bbbbbbbb… (any), baseline cccccccc…"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "other"}, "it is of model 'detector@3a1f9c2', asked for is 'other'"),
        ({"model": "detector@3a1f9c2"}, "asked for is 'detector@3a1f9c2'"),
        ({"slot": "canary"}, "it was sealed for production, staging, asked for is 'canary'"),
        ({"spec": frozenset({"e" * 64})}, "its spec is aaaaaaaa…, the policy takes eeeeeeee…"),
        ({"data": frozenset({"e" * 64})}, "its data is bbbbbbbb…"),
        ({"baseline": frozenset({"e" * 64})}, "its baseline is cccccccc…"),
        ({"baseline": frozenset()}, "its baseline is cccccccc…, the policy takes none"),
        ({"data": frozenset()}, "its data is bbbbbbbb…, the policy takes none"),
    ],
)
def test_what_is_of_something_else_is_refused(changes, message):
    with pytest.raises(IdentityMismatch, match=message):
        identity(**changes)


def test_no_baseline_is_taken_only_where_none_or_any_is_asked_for():
    bare = predicate(digests=msgspec.structs.replace(predicate().digests, baseline=None))
    assert "baseline none" in identity(bare, baseline=frozenset())
    assert "baseline none (any)" in identity(bare, baseline=None)
    with pytest.raises(IdentityMismatch, match="its baseline is none, the policy takes cccccccc…"):
        identity(bare, baseline=frozenset({BASELINE}))


def test_a_bundle_for_no_slot_is_refused():
    with pytest.raises(IdentityMismatch, match="it was sealed for no slot"):
        identity(predicate(slots=()))


def test_findings_that_the_policy_asks_for_must_have_been_checked():
    checks = ("parity.rel_rmse", "latency.p99_ms[batch=8]")
    require_findings(checks, ("parity", "latency.p99_ms"))
    for missing in ("task", "parity.rel", "latency.p95_ms"):
        with pytest.raises(VerificationError, match=f"the policy asks for {missing}, which was not checked"):
            require_findings(checks, (missing,))
    with pytest.raises(VerificationError, match="the policy asks for parity"):
        require_findings((), ("parity",))


def test_a_fresh_verdict_says_what_was_compared():
    assert fresh() == "serial 118, no ledger to compare with, valid until 2026-12-20"
    assert (
        fresh(accepted=Ledger())
        == "serial 118, the first of detector in production by the ledger, valid until 2026-12-20"
    )
    assert fresh(accepted=Ledger(last=117)) == "serial 118 > 117, valid until 2026-12-20"
    assert fresh(accepted=Ledger(last=118, in_slot=True)) == "serial 118, in the slot already, valid until 2026-12-20"
    assert "the first of detector in staging" in fresh(accepted=Ledger(last=500), slot="staging")


@pytest.mark.parametrize("last", [118, 119])
def test_a_serial_that_is_not_above_the_last_is_refused(last):
    with pytest.raises(StaleVerdict, match=f"its serial is 118, {last} was accepted before"):
        fresh(accepted=Ledger(last=last))


def test_what_speaks_against_a_verdict_beside_its_serial_is_said_first():
    with pytest.raises(StaleVerdict, match="it was rolled back from full on 2026-11-20"):
        fresh(accepted=Ledger(last=118, dropped=True))


def test_an_expired_verdict_is_refused_from_its_very_end_on():
    assert fresh(now="2026-12-20T11:59:59Z")
    for now in ("2026-12-20T12:00:00Z", "2027-01-01T00:00:00Z"):
        with pytest.raises(StaleVerdict, match="it expired on 2026-12-20T12:00:00Z, now is"):
            fresh(now=now)


def test_a_verdict_of_the_future_is_refused_but_for_clocks_that_differ_a_little():
    assert fresh(now="2026-11-20T11:55:00Z")
    with pytest.raises(StaleVerdict, match="one of the two clocks is wrong"):
        fresh(now="2026-11-20T11:54:59Z")


def test_a_check_that_is_too_old_is_refused():
    assert fresh(max_age_days=1.0)
    with pytest.raises(StaleVerdict, match="it was checked 1.0 days ago, the policy takes 0.9"):
        fresh(max_age_days=0.9)


@pytest.mark.parametrize("in_slot", [False, True])
def test_a_revoked_verdict_is_refused_wherever_it_is(in_slot):
    with pytest.raises(StaleVerdict, match="it was revoked on 2026-11-21T12:00:00Z: wrong boxes"):
        fresh(accepted=Ledger(revoked=True, in_slot=in_slot))
    with pytest.raises(StaleVerdict, match="wrong boxes"):
        require_unrevoked(VERDICT, Ledger(revoked=True))
    require_unrevoked(VERDICT, Ledger())
    require_unrevoked(VERDICT, None)


@pytest.mark.parametrize("text", ["2026-02-31T00:00:00Z", "2026-13-01T00:00:00Z", "2026-01-01T25:00:00Z", "", "now"])
def test_a_day_that_there_is_not_is_an_error_and_no_crash(text):
    with pytest.raises(VerificationError, match="is no time"):
        moment(text)
    with pytest.raises(VerificationError, match="is no time"):
        fresh(predicate(not_after=text))


ADA = Vote("seals/approval-1.dsse.json", key="ada", owner="Ada", role="release")
GRACE = Vote("seals/approval-2.dsse.json", key="grace", owner="Grace", role="release")
LIN = Vote("seals/approval-3.dsse.json", key="lin", owner="Lin", role="safety")


def test_approvals_are_counted_by_role():
    found = tally([ADA, GRACE, LIN], {"release": 2, "safety": 1})
    assert found.text == "2 of 2 release (ada, grace); 1 of 1 safety (lin)"
    assert [each.key for each in found.counted] == ["ada", "grace", "lin"]
    assert require_approved(found, title="b", command="") == found.text
    assert tally([], {}).text == "none asked for"


def test_two_keys_of_one_owner_count_once():
    found = tally([ADA, changed(ADA, path="seals/approval-9.dsse.json", key="ada-2")], {"release": 2})
    assert dict(found.missing) == {"release": 1}
    assert "Ada has approved with key ada already" in found.text


def test_one_owner_does_not_fill_two_roles():
    both = [ADA, changed(ADA, path="seals/approval-8.dsse.json", key="ada-2", role="safety")]
    assert dict(tally(both, {"release": 1, "safety": 1}).missing) == {"safety": 1}


def test_owners_that_are_written_in_two_ways_are_one():
    for other in ("ada", "Ada ", " ADA", "\uff21da"):
        both = [ADA, changed(ADA, path="seals/approval-9.dsse.json", key="ada-2", owner=other)]
        assert dict(tally(both, {"release": 2}).missing) == {"release": 1}


@pytest.mark.parametrize("turned", [False, True])
def test_as_many_places_are_filled_as_can_be_whatever_the_order_of_the_files(turned):
    ada_safety = changed(ADA, path="seals/approval-4.dsse.json", key="ada-2", role="safety")
    votes = [ADA, ada_safety, GRACE]
    found = tally(votes[::-1] if turned else votes, {"release": 1, "safety": 1})
    assert not found.missing
    assert {(each.key, each.role) for each in found.counted} == {("grace", "release"), ("ada-2", "safety")}
    more = [*votes, LIN]
    assert not tally(more, {"release": 2, "safety": 1}).missing
    assert sum(tally(more, {"release": 2, "safety": 2}).missing.values()) == 1


def test_more_approvals_than_are_asked_for_are_all_named():
    assert tally([ADA, GRACE], {"release": 1}).text == "2 of 1 release (ada, grace)"


def test_what_does_not_count_is_named_with_its_reason():
    bad = Vote("seals/approval-7.dsse.json", against="key 12ab… is not in the policy")
    found = tally([bad, LIN, ADA], {"release": 2})
    assert found.text == (
        "1 of 2 release (ada); not counted: approval-7.dsse.json: key 12ab… is not in the policy; "
        "not counted: approval-3.dsse.json: role safety is not asked for"
    )
    with pytest.raises(ApprovalsMissing, match="bundle needs 1 more approval by role release: 1 of 2") as caught:
        require_approved(found, title="bundle", command="gate approve bundle")
    assert caught.value.hint == "gate approve bundle"
    assert caught.value.exit_code == 4


def test_a_vote_that_does_not_count_does_not_use_up_its_owner():
    stale = changed(ADA, path="seals/approval-0.dsse.json", against="it is of another verdict")
    assert not tally([stale, ADA], {"release": 1}).missing


def changed(vote, **changes):
    return Vote(
        **{name: changes.get(name, getattr(vote, name)) for name in ("path", "key", "owner", "role", "against")}
    )
