import hashlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gate.errors import LedgerError, PromotionRefused
from gate.release.history import (
    History,
    history_from,
    may_enter,
    next_stage,
    rollback_targets,
)
from gate.release.policy import StagePolicy
from gate.release.statements import FIRST_PREVIOUS, LedgerEntry

STAGES = (
    StagePolicy(name="shadow", min_hours=24),
    StagePolicy(name="canary", min_requests=1000),
    StagePolicy(name="full"),
)
A, B, C, D = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)
SERIALS = {A: 1, B: 2, C: 3, D: 4}


def entry(action, verdict, stage="full", *, full=None, time=None, slot="production", model="detector", **values):
    full = stage == "full" if full is None else full
    if action == "revoke":
        slot, stage, full = "", "", False
    made = {
        "index": 0, "previous": FIRST_PREVIOUS, "time": time or "2026-11-21T10:00:00Z", "action": action,
        "model": model, "slot": slot, "stage": stage, "full": full, "verdict": verdict, "serial": SERIALS[verdict],
        "engine": "trt-fp16", "engine_sha256": "e" * 64, "bundle": f"/bundles/{verdict[0]}",
        "policy_sha256": "f" * 64, "approvals": (), "requests": None, "reason": "",
    }  # fmt: skip
    return LedgerEntry(**{**made, **values})


def digest(index):
    return hashlib.sha256(str(index).encode()).hexdigest()


def chained(*entries):
    return [
        msgspec.structs.replace(
            each,
            index=index,
            previous=digest(index - 1) if index else FIRST_PREVIOUS,
            time=each.time if each.time != "2026-11-21T10:00:00Z" else f"2026-11-21T10:{index:02}:00Z",
        )
        for index, each in enumerate(entries)
    ]


def history(*entries):
    made = chained(*entries)
    return history_from(made, [digest(index) for index in range(len(made))])


def enter(found, verdict, stage, *, now="2026-12-01T00:00:00Z", requests=None, serial=None, stages=STAGES):
    may_enter(
        found,
        model="detector",
        slot="production",
        stage=stage,
        stages=stages,
        verdict=verdict,
        serial=SERIALS[verdict] if serial is None else serial,
        now=now,
        requests=requests,
    )


def where(found):
    places = found.current("detector", "production"), found.candidate("detector", "production")
    return tuple(None if each is None else each.verdict for each in places)


def test_an_empty_ledger_holds_nothing():
    found = history()
    assert where(found) == (None, None)
    assert found.last_serial("detector", "production") is None
    assert rollback_targets(found, "detector", "production") == ()
    assert found.occupations() == ()
    assert found == History()


def test_a_stage_before_the_last_makes_a_candidate_beside_the_current_one():
    found = history(entry("promote", A), entry("promote", B, "shadow"), entry("promote", B, "canary"))
    assert where(found) == (A, B)
    assert found.candidate("detector", "production").stage == "canary"
    assert found.is_in_slot(A, "detector", "production")
    assert found.is_in_slot(B, "detector", "production")
    assert not found.is_in_slot(B, "detector", "staging")
    assert not found.is_in_slot(B, "other", "production")


def test_the_last_stage_makes_it_current_and_the_candidate_is_gone():
    found = history(entry("promote", A), entry("promote", B, "shadow"), entry("promote", B))
    assert where(found) == (B, None)
    assert found.last_serial("detector", "production") == 2
    assert rollback_targets(found, "detector", "production")[0].verdict == A


def test_a_rollback_with_a_candidate_drops_it_and_leaves_the_current_one():
    found = history(entry("promote", A), entry("promote", B, "shadow"), entry("rollback", B, "shadow"))
    assert where(found) == (A, None)
    assert found.last_serial("detector", "production") == 2


def test_a_revoked_candidate_can_be_dropped():
    found = history(entry("promote", B, "shadow"), entry("revoke", B), entry("rollback", B, "shadow"))
    assert where(found) == (None, None)


def test_a_rollback_without_a_candidate_makes_an_earlier_one_current():
    found = history(entry("promote", A), entry("promote", B), entry("promote", C), entry("rollback", B))
    assert where(found) == (B, None)
    assert [each.verdict for each in rollback_targets(found, "detector", "production")] == [A]
    assert [each.verdict for each in found.held("detector", "production")] == [B, C, A]


def test_what_was_rolled_back_from_is_not_gone_back_to_by_itself():
    found = history(entry("promote", A), entry("promote", B), entry("rollback", A), entry("promote", C))
    assert [each.verdict for each in rollback_targets(found, "detector", "production")] == [A]


def test_what_was_rolled_back_from_may_be_named():
    found = history(entry("promote", A), entry("promote", B), entry("rollback", A), entry("rollback", B))
    assert where(found) == (B, None)
    assert rollback_targets(found, "detector", "production")[0].verdict == A


def test_a_rollback_never_goes_to_a_revoked_one():
    found = history(entry("promote", A), entry("promote", B), entry("promote", C), entry("revoke", B))
    assert rollback_targets(found, "detector", "production")[0].verdict == A
    assert found.revoked(B).action == "revoke"
    found = history(entry("promote", A), entry("promote", B), entry("revoke", A))
    assert rollback_targets(found, "detector", "production") == ()


def test_a_revoked_one_is_in_no_slot_any_more_although_it_is_still_there():
    found = history(entry("promote", A), entry("revoke", A))
    assert where(found) == (A, None)
    assert not found.is_in_slot(A, "detector", "production")
    assert [each.slot for each in found.places_of(A)] == ["production"]


@pytest.mark.parametrize(
    "entries, message",
    [
        ([entry("promote", B), entry("promote", A)], "ledger:2: promotes the serial 1, and 2 was let in before"),
        ([entry("promote", A), entry("promote", A)], "ledger:2: promotes aaaaaaaaaaaa, which has all"),
        ([entry("promote", A), entry("promote", A, "shadow")], "which has all of the traffic already"),
        ([entry("promote", A, "shadow"), entry("promote", B, "shadow")], "while aaaaaaaaaaaa is in the stage shadow"),
        ([entry("promote", A, "shadow"), entry("promote", B)], "while aaaaaaaaaaaa is in the stage shadow"),
        ([entry("promote", A, "shadow"), entry("promote", A, "shadow")], "into shadow, where it is already"),
        ([entry("promote", A, "shadow"), entry("promote", A, serial=9)], "the serial 9, and it was 1"),
        ([entry("promote", A), entry("revoke", A), entry("promote", A)], "ledger:3: .* revoked before"),
        ([entry("revoke", A), entry("promote", A)], "is a promote of aaaaaaaaaaaa, which was revoked before"),
        ([entry("promote", A, "shadow"), entry("revoke", A), entry("promote", A)], "revoked before"),
        ([entry("promote", A), entry("promote", B), entry("revoke", A), entry("rollback", A)], "revoked before"),
        ([entry("revoke", A), entry("revoke", A)], "a second time"),
        ([entry("promote", A), entry("rollback", B)], "goes back to bbbbbbbbbbbb, which never had all"),
        ([entry("rollback", A)], "goes back to aaaaaaaaaaaa, which never had all"),
        ([entry("promote", A), entry("rollback", A)], "goes back to aaaaaaaaaaaa, which has all of the traffic"),
        ([entry("promote", A, "shadow"), entry("rollback", A, "canary")], "drops the candidate .* where it is not"),
        ([entry("promote", A), entry("promote", B, "shadow"), entry("rollback", A)], "while bbbbbbbbbbbb is in"),
        ([entry("promote", A), entry("promote", B), entry("rollback", A, serial=7)], "the serial 7, and it was 1"),
        ([entry("promote", B, "shadow"), entry("rollback", B, "shadow"), entry("promote", B, "shadow")], "let in"),
        ([entry("promote", A, slot="")], "does not say the model, slot and stage"),
        ([entry("promote", A, time="2026-13-01T00:00:00Z")], "is no time"),
        ([entry("promote", A, time="2026-11-22T00:00:00Z"), entry("promote", B)], "ledger:2: is of .* before"),
    ],
)
def test_an_entry_that_nobody_may_write_is_an_error_that_names_its_line(entries, message):
    with pytest.raises(LedgerError, match=message):
        history(*entries)


@pytest.mark.parametrize("place", [{"slot": "production"}, {"stage": "full"}, {"full": True}])
def test_a_revocation_in_one_slot_is_an_error(place):
    with pytest.raises(LedgerError, match="a revocation holds everywhere"):
        history(msgspec.structs.replace(entry("revoke", A), **place))


def test_indices_and_the_chain_are_checked():
    made = chained(entry("promote", A), entry("promote", B), entry("promote", C))
    digests = [digest(index) for index in range(3)]
    assert len(history_from(made, digests).entries) == 3
    with pytest.raises(LedgerError, match=r"where\.jsonl:2: is entry 2, and entry 1 belongs here"):
        history_from([made[0], made[2]], [digests[0], digests[2]], where="where.jsonl")
    with pytest.raises(LedgerError, match="ledger:2: follows the line"):
        history_from(made, [digest(9), *digests[1:]])
    with pytest.raises(LedgerError, match="ledger:1: is entry 1"):
        history_from(made[1:], digests[1:])


def test_stages_are_passed_in_order_and_none_is_skipped():
    empty = history()
    assert next_stage(empty, model="detector", slot="production", stages=STAGES, verdict=A).name == "shadow"
    enter(empty, A, "shadow")
    for stage in ("canary", "full"):
        with pytest.raises(PromotionRefused, match=f"the next stage is shadow, not {stage}"):
            enter(empty, A, stage)
    there = history(entry("promote", A, "shadow"))
    with pytest.raises(PromotionRefused, match="the next stage is canary, not full"):
        enter(there, A, "full")
    enter(there, A, "canary")
    with pytest.raises(PromotionRefused, match="has no stage 'fulll' here; it has shadow, canary, full"):
        enter(there, A, "fulll")


def test_a_stage_that_was_passed_is_not_entered_again():
    there = history(entry("promote", A, "shadow"), entry("promote", A, "canary"))
    with pytest.raises(PromotionRefused, match="the next stage is full, not shadow"):
        enter(there, A, "shadow")
    with pytest.raises(PromotionRefused, match="is in the stage canary already"):
        enter(there, A, "canary", requests=1000)


def test_what_is_current_is_there_already():
    there = history(entry("promote", A))
    for stage in ("shadow", "canary", "full"):
        with pytest.raises(PromotionRefused, match="it is there already: serial 1 has all of the traffic"):
            enter(there, A, stage)


def test_another_bundle_in_a_stage_is_named():
    there = history(entry("promote", A, "shadow"))
    with pytest.raises(PromotionRefused, match="serial 1 .trt-fp16. is in the stage shadow(.|\n)*roll it back first"):
        enter(there, B, "shadow")


@pytest.mark.parametrize(
    "now, message",
    [
        ("2026-11-21T10:00:00Z", "for 0.0 h of the 24 h"),
        ("2026-11-22T09:59:59Z", "it may go on at 2026-11-22T10:00:00Z"),
        ("2026-11-20T10:00:00Z", "for -24.0 h of the 24 h"),
    ],
)
def test_it_stays_as_long_in_a_stage_as_the_policy_says(now, message):
    there = history(entry("promote", A, "shadow"))
    with pytest.raises(PromotionRefused, match=message):
        enter(there, A, "canary", now=now)
    enter(there, A, "canary", now="2026-11-22T10:00:00Z")


def test_hours_beyond_any_calendar_are_not_over():
    stages = (StagePolicy(name="shadow", min_hours=1e300), StagePolicy(name="full"))
    with pytest.raises(PromotionRefused, match="it may go on at 9999"):
        enter(history(entry("promote", A, "shadow")), A, "full", stages=stages)


@pytest.mark.parametrize("requests, said", [(None, "none are said"), (0, "0 are said"), (999, "999 are said")])
def test_it_serves_as_many_requests_as_the_policy_says(requests, said):
    there = history(entry("promote", A, "shadow"), entry("promote", A, "canary"))
    with pytest.raises(PromotionRefused, match=f"has to serve 1000 requests in canary before it goes on; {said}"):
        enter(there, A, "full", requests=requests)
    enter(there, A, "full", requests=1000)


def test_requests_of_no_stage_are_refused():
    with pytest.raises(PromotionRefused, match="5 requests are said of the stage that it leaves, and it is in none"):
        enter(history(), A, "shadow", requests=5)


def test_a_serial_has_to_be_above_every_one_that_was_let_in():
    there = history(entry("promote", B))
    with pytest.raises(PromotionRefused, match="its serial 1 is not above 2"):
        enter(there, A, "shadow")
    with pytest.raises(PromotionRefused, match="serial 2 is that of another verdict on trt-fp16, which is in the slot"):
        enter(there, C, "shadow", serial=2)
    enter(there, C, "shadow")


def test_a_candidate_that_was_dropped_does_not_come_back():
    there = history(entry("promote", A, "shadow"), entry("rollback", A, "shadow"))
    with pytest.raises(PromotionRefused, match="it was rolled back from shadow on .*: check, seal and promote anew"):
        enter(there, A, "shadow")


def test_the_serials_of_other_models_and_slots_do_not_count():
    there = history(entry("promote", B, model="other"), entry("promote", B, slot="staging"))
    enter(there, A, "shadow")


def test_a_revoked_verdict_enters_nothing():
    there = history(entry("promote", A, "shadow"), entry("revoke", A, reason="wrong labels"))
    with pytest.raises(PromotionRefused, match="was revoked at .*: wrong labels"):
        enter(there, A, "canary")


def test_a_stage_that_the_policy_no_longer_has_is_said():
    there = history(entry("promote", A, "beta", full=False))
    with pytest.raises(PromotionRefused, match="in the stage 'beta', which the policy does not have"):
        next_stage(there, model="detector", slot="production", stages=STAGES, verdict=A)
    there = history(entry("promote", A, "full", full=False))
    with pytest.raises(PromotionRefused, match="which is the last stage of the policy now"):
        next_stage(there, model="detector", slot="production", stages=STAGES, verdict=A)


def test_the_table_says_what_was_where_from_when_until_when():
    found = history(
        entry("promote", A),
        entry("promote", B, "shadow"),
        entry("promote", B),
        entry("revoke", B),
        entry("rollback", A),
        entry("promote", C, slot="staging"),
    )
    rows = [
        (each.start[14:16], each.until and each.until[14:16], each.stage, each.verdict, each.how)
        for each in found.occupations("production")
    ]
    assert rows == [
        ("00", "02", "full", A, "promote"),
        ("01", "02", "shadow", B, "promote"),
        ("02", "04", "full", B, "promote"),
        ("04", None, "full", A, "rollback"),
    ]
    assert [each.revoked is not None for each in found.occupations("production")] == [False, True, True, False]
    assert [each.ended for each in found.occupations("production")] == ["promote", "promote", "rollback", None]
    assert [each.verdict for each in found.occupations("staging")] == [C]
    assert len(found.occupations()) == 5


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["promote", "rollback", "revoke"]),
        st.sampled_from([A, B, C, D]),
        st.sampled_from(["shadow", "canary", "full"]),
    ),
    max_size=30,
)


@given(ACTIONS)
def test_whatever_is_written_a_revoked_verdict_never_arrives_and_the_table_ends_where_the_slot_is(actions):
    kept, found, dead = [], history(), set()
    for action, verdict, stage in actions:
        try:
            found = history(*kept, entry(action, verdict, stage))
        except LedgerError:
            continue
        kept.append(entry(action, verdict, stage))
        arrives = action == "promote" or (action == "rollback" and stage == "full")
        assert not (arrives and verdict in dead)
        if action == "revoke":
            dead.add(verdict)
    open_rows = {(each.verdict, each.full) for each in found.occupations() if each.until is None}
    current, candidate = where(found)
    assert open_rows == {(v, f) for v, f in ((current, True), (candidate, False)) if v is not None}
    assert not {each.verdict for each in rollback_targets(found, "detector", "production")} & {*dead, current}


def test_another_engine_with_the_serial_of_the_one_in_the_slot_is_told_so():
    there = history(entry("promote", B))
    asked = {"model": "detector", "slot": "production"}
    assert there.against(A, serial=2, engine="ort", **asked) == (
        "serial 2 is that of trt-fp16, which is in the slot: one engine is in a slot at a time; use a slot for each "
        "engine, or a higher serial"
    )
    assert "another verdict on trt-fp16" in there.against(A, serial=2, engine="trt-fp16", **asked)
    assert there.against(A, serial=1, engine="ort", **asked) is None
    assert there.against(B, serial=2, engine="trt-fp16", **asked) is None
    assert there.against(A, serial=2, engine="ort", model="detector", slot="staging") is None


def test_what_was_rolled_back_from_is_told_so_and_what_was_replaced_is_not():
    found = history(
        entry("promote", A), entry("promote", B), entry("promote", C, "shadow"), entry("rollback", C, "shadow")
    )
    asked = {"engine": "trt-fp16", "model": "detector", "slot": "production"}
    assert found.against(C, serial=3, **asked) == (
        "it was rolled back from shadow on 2026-11-21T10:03:00Z: check, seal and promote anew"
    )
    assert found.against(A, serial=1, **asked) is None
    assert found.against(C, serial=3, engine="trt-fp16", model="other", slot="production") is None


def test_the_first_promotion_into_a_stage_is_when_it_was_let_in():
    found = history(
        entry("promote", A, "shadow"),
        entry("promote", A),
        entry("promote", B),
        entry("rollback", A),
        entry("revoke", A),
    )
    assert found.let_in(A, model="detector", slot="production", stage="full", is_last=False).index == 1
    assert found.let_in(A, model="detector", slot="production", stage="shadow", is_last=False).index == 0
    for verdict, model, slot, stage in (
        (B, "detector", "production", "shadow"),
        (A, "detector", "staging", "full"),
        (A, "other", "production", "full"),
        (A, "detector", "production", "everyone"),
        (A, "detector", "production", None),
    ):
        assert found.let_in(verdict, model=model, slot=slot, stage=stage, is_last=False) is None
    assert found.let_in(A, model="detector", slot="production", stage="everyone", is_last=True).index == 1
    assert found.let_in(A, model="detector", slot="production", stage=None, is_last=True).index == 1
