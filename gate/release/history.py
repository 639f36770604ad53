"""What a ledger's entries mean: what is where, what was there when, and what may come next. Pure.

A slot holds, for each model, at most two verdicts: the *current* one, which has all of the traffic, and beside it a
*candidate* in one of the stages before the last.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from gate.errors import LedgerError, PromotionRefused
from gate.release.policy import StagePolicy, moment_from_text
from gate.release.statements import FIRST_PREVIOUS, LedgerEntry

_Place = tuple[str, str]


@dataclass(frozen=True)
class Occupation:
    """A time for which a verdict was in a stage of a slot.

    Args:
        start, until: Times; `until` is None while it lasts.
        model, slot, stage: Where.
        full: Whether it had all of the traffic.
        engine, serial, verdict: What.
        how: `promote` or `rollback`, which brought it there.
        ended: What ended it: `promote` (of itself to the next stage, or of another in its place) or `rollback`.
        revoked: Since when nobody may load it; None where it is not revoked.
        index: Of the entry that brought it there.
    """

    start: str
    until: str | None
    model: str
    slot: str
    stage: str
    full: bool
    engine: str
    serial: int
    verdict: str
    how: str
    ended: str | None
    revoked: str | None
    index: int


@dataclass
class _State:
    """Of one model in one slot, while entries are read.

    Args:
        stack: What had all of the traffic, oldest first, the current one last; what was rolled back is gone from it.
        ever: Every verdict that had all of the traffic, with the entry that last brought it there.
        candidate: What is in a stage before the last.
        last_serial: The highest that was promoted.
    """

    stack: list[LedgerEntry] = field(default_factory=list)
    ever: dict[str, LedgerEntry] = field(default_factory=dict)
    candidate: LedgerEntry | None = None
    last_serial: int | None = None


@dataclass(frozen=True)
class History:
    """What the entries of a ledger say; `history_from` makes it.

    Args:
        entries: All of them, in order.
    """

    entries: tuple[LedgerEntry, ...] = ()
    _states: Mapping[_Place, _State] = field(default_factory=lambda: MappingProxyType({}), repr=False, compare=False)
    _revoked: Mapping[str, LedgerEntry] = field(default_factory=lambda: MappingProxyType({}), repr=False, compare=False)

    def current(self, model: str, slot: str) -> LedgerEntry | None:
        """The entry that brought what has all of the traffic, revoked or not."""
        state = self._states.get((model, slot))
        return state.stack[-1] if state and state.stack else None

    def candidate(self, model: str, slot: str) -> LedgerEntry | None:
        """The entry that brought what is in a stage before the last into that stage, revoked or not."""
        state = self._states.get((model, slot))
        return state.candidate if state else None

    def last_serial(self, model: str, slot: str) -> int | None:
        """The highest serial that was ever let in."""
        state = self._states.get((model, slot))
        return state.last_serial if state else None

    def revoked(self, verdict_sha256: str) -> LedgerEntry | None:
        """The entry that revoked a verdict."""
        return self._revoked.get(verdict_sha256)

    def let_in(self, verdict: str, *, model: str, slot: str, stage: str | None, is_last: bool) -> LedgerEntry | None:
        """The first entry that promoted a verdict into a stage of a slot, whatever became of it since.

        Args:
            verdict: Its digest.
            model, slot: Where to.
            stage: Its name then; None: no matter.
            is_last: All of the traffic will do, too: it is all of it, whatever its stage was called.
        """
        for each in self.entries:
            if (each.action, each.verdict, each.model, each.slot) != ("promote", verdict, model, slot):
                continue
            if each.stage == stage or (is_last and each.full):
                return each
        return None

    def is_in_slot(self, verdict_sha256: str, model: str, slot: str) -> bool:
        """Whether a verdict has a stage of the slot and is not revoked."""
        if verdict_sha256 in self._revoked:
            return False
        places = (self.current(model, slot), self.candidate(model, slot))
        return any(each is not None and each.verdict == verdict_sha256 for each in places)

    def held(self, model: str, slot: str) -> tuple[LedgerEntry, ...]:
        """Every verdict that ever had all of the traffic, by the entry that last brought it there; newest first."""
        state = self._states.get((model, slot))
        return tuple(sorted(state.ever.values(), key=lambda each: -each.index)) if state else ()

    def against(self, verdict: str, *, serial: int, engine: str, model: str, slot: str) -> str | None:
        """What speaks against letting a verdict in anew, where that is more than that its serial is an old one.

        Args:
            verdict: Its digest.
            serial: Its.
            engine: Its; empty where that is not known.
            model, slot: Where to.
        """
        past = [each for each in _occupations(self, slot) if (each.model, each.verdict) == (model, verdict)]
        if past and past[-1].ended == "rollback":
            return f"it was rolled back from {past[-1].stage} on {past[-1].until}: check, seal and promote anew"
        for each in (self.candidate(model, slot), self.current(model, slot)):
            if each is None or each.verdict == verdict or each.serial != serial:
                continue
            if engine in ("", each.engine):
                return f"serial {serial} is that of another verdict on {each.engine}, which is in the slot: give a higher serial"
            return (
                f"serial {serial} is that of {each.engine}, which is in the slot: one engine is in a slot at a time; "
                "use a slot for each engine, or a higher serial"
            )
        return None

    def places_of(self, verdict_sha256: str) -> tuple[LedgerEntry, ...]:
        """The entries that brought a verdict to where it is now, in any slot; revoked or not."""
        found = []
        for state in self._states.values():
            for each in (state.stack[-1] if state.stack else None, state.candidate):
                if each is not None and each.verdict == verdict_sha256:
                    found.append(each)
        return tuple(found)

    def occupations(self, slot: str | None = None) -> tuple[Occupation, ...]:
        """What was where from when until when, in the order in which it came.

        Args:
            slot: Only this one; None: all.
        """
        return tuple(_occupations(self, slot))


def history_from(entries: Sequence[LedgerEntry], digests: Sequence[str], *, where: str = "ledger") -> History:
    """Check that entries follow each other, and what they come to.

    Args:
        entries: In order.
        digests: SHA-256 of the line of each, its newline included, which the next one names.
        where: Names them in errors, followed by the line's number.

    Raises:
        LedgerError: Indices have gaps, an entry names another one before it, times go back, or an entry does what
            none may: promote a revoked verdict, a second candidate, an older serial; roll back to what never had the
            whole slot or was revoked; or revoke twice.
    """
    states: dict[_Place, _State] = {}
    revoked: dict[str, LedgerEntry] = {}
    previous, last = FIRST_PREVIOUS, None
    for number, (entry, digest) in enumerate(zip(entries, digests, strict=True)):
        wrong = _chain_fault(entry, number, previous, last) or _act(states, revoked, entry)
        if wrong is not None:
            raise LedgerError(wrong, where=f"{where}:{number + 1}")
        previous, last = digest, entry
    return History(tuple(entries), MappingProxyType(states), MappingProxyType(revoked))


def next_stage(history: History, *, model: str, slot: str, stages: Sequence[StagePolicy], verdict: str) -> StagePolicy:
    """The stage that a verdict enters next: the one after its own, or the first.

    Raises:
        PromotionRefused: It is in the last one already, or in one that the policy no longer has.
    """
    candidate, current = history.candidate(model, slot), history.current(model, slot)
    if current is not None and current.verdict == verdict:
        raise PromotionRefused(
            f"it is there already: serial {current.serial} has all of the traffic since {current.time}",
            where=_place(model, slot),
        )
    if candidate is not None and candidate.verdict == verdict:
        names = [each.name for each in stages]
        if candidate.stage not in names:
            raise PromotionRefused(
                f"it is in the stage {candidate.stage!r}, which the policy does not have; it has {', '.join(names)}",
                where=_place(model, slot),
                hint="gate rollback takes it out",
            )
        position = names.index(candidate.stage) + 1
        if position == len(stages):
            raise PromotionRefused(
                f"it is in {candidate.stage}, which is the last stage of the policy now and was not when it came there",
                where=_place(model, slot),
                hint="gate rollback takes it out",
            )
        return stages[position]
    return stages[0]


def may_enter(
    history: History,
    *,
    model: str,
    slot: str,
    stage: str,
    stages: Sequence[StagePolicy],
    verdict: str,
    serial: int,
    now: str,
    requests: int | None,
    engine: str = "",
) -> None:
    """Decide whether a verdict may be promoted into a stage; what the bundle itself must have is not looked at here.

    Args:
        history: Of the ledger.
        model, slot, stage: Where to.
        stages: Of the slot, in order.
        verdict: SHA-256 of the payload of its envelope.
        serial: The verdict's.
        now: Time, as in the ledger.
        requests: Served in the stage that it leaves, as the promoter says.
        engine: The verdict's, for the message.

    Raises:
        PromotionRefused: It is revoked or there already, another bundle is in a stage, a stage would be skipped, it
            was not long enough in the stage before or served too little there, or its serial is not above the last.
    """
    where = _place(model, slot)
    names = [each.name for each in stages]
    if stage not in names:
        raise PromotionRefused(f"the policy has no stage {stage!r} here; it has {', '.join(names)}", where=where)
    if (gone := history.revoked(verdict)) is not None:
        raise PromotionRefused(
            f"the verdict was revoked at {gone.time}: {gone.reason or 'no reason given'}",
            where=where,
            hint="a revocation is for good: check and seal anew",
        )
    candidate = history.candidate(model, slot)
    if candidate is not None and candidate.verdict != verdict:
        raise PromotionRefused(
            f"serial {candidate.serial} ({candidate.engine}) is in the stage {candidate.stage} since {candidate.time}; "
            "one bundle at a time",
            where=where,
            hint=f"promote it further ({candidate.bundle}), or roll it back first: {_rollback(model, slot)}",
        )
    if candidate is not None and candidate.stage == stage:
        raise PromotionRefused(f"it is in the stage {stage} already, since {candidate.time}", where=where)
    following = next_stage(history, model=model, slot=slot, stages=stages, verdict=verdict)
    if following.name != stage:
        passed = "" if candidate is None else f"; it is in {candidate.stage}"
        raise PromotionRefused(
            f"the next stage is {following.name}, not {stage}: stages are passed in order{passed}",
            where=where,
            hint=f"gate promote ... --stage {following.name}",
        )
    if candidate is None:
        against = history.against(verdict, serial=serial, engine=engine, model=model, slot=slot)
        _require_new(history, model=model, slot=slot, serial=serial, requests=requests, against=against)
    else:
        _require_served(candidate, stages[names.index(candidate.stage)], now=now, requests=requests)


def rollback_targets(history: History, model: str, slot: str) -> tuple[LedgerEntry, ...]:
    """What had all of the traffic before the current one, newest first; neither revoked nor rolled back from."""
    state = history._states.get((model, slot))  # noqa: SLF001  of the same module
    if state is None:
        return ()
    now = state.stack[-1].verdict if state.stack else None
    earlier = (each for each in reversed(state.stack[:-1]) if each.verdict != now)
    return tuple(each for each in earlier if history.revoked(each.verdict) is None)


def moment(text: str) -> dt.datetime:
    """A time of the ledger.

    Raises:
        LedgerError: There is no such day or time.
    """
    found = moment_from_text(text)
    if found is None:
        raise LedgerError(f"{text!r} is no time such as 2026-11-21T10:00:00Z")
    return found


def _require_new(
    history: History, *, model: str, slot: str, serial: int, requests: int | None, against: str | None
) -> None:
    where = _place(model, slot)
    last = history.last_serial(model, slot)
    if last is not None and serial <= last:
        if against is not None:
            raise PromotionRefused(against, where=where)
        raise PromotionRefused(
            f"its serial {serial} is not above {last}, the highest that was let in",
            where=where,
            hint="an older verdict comes back by gate rollback alone; else check and seal anew with a higher --serial",
        )
    if requests is not None:
        raise PromotionRefused(
            f"{requests} requests are said of the stage that it leaves, and it is in none yet", where=where
        )


def _require_served(candidate: LedgerEntry, stage: StagePolicy, *, now: str, requests: int | None) -> None:
    where = _place(candidate.model, candidate.slot)
    if stage.min_hours is not None:
        since = moment(candidate.time)
        try:
            until = since + dt.timedelta(hours=stage.min_hours)
        except OverflowError:
            until = dt.datetime.max.replace(tzinfo=dt.timezone.utc)
        if moment(now) < until:
            spent = (moment(now) - since).total_seconds() / 3600
            raise PromotionRefused(
                f"it has been in {stage.name} for {spent:.1f} h of the {stage.min_hours:g} h that the policy asks for",
                where=where,
                hint=f"it may go on at {until:%Y-%m-%dT%H:%M:%SZ}",
            )
    if stage.min_requests is not None and (requests is None or requests < stage.min_requests):
        said = "none are said" if requests is None else f"{requests} are said"
        raise PromotionRefused(
            f"it has to serve {stage.min_requests} requests in {stage.name} before it goes on; {said}",
            where=where,
            hint="say how many it served there: --requests N",
        )


def _chain_fault(entry: LedgerEntry, number: int, previous: str, last: LedgerEntry | None) -> str | None:
    if entry.index != number:
        return f"is entry {entry.index}, and entry {number} belongs here: a line was added, removed or moved"
    if entry.previous != previous:
        return f"follows the line {entry.previous[:12]}, and the one before it is {previous[:12]}"
    try:
        moment(entry.time)
    except LedgerError as err:
        return err.message
    if last is not None and entry.time < last.time:
        return f"is of {entry.time}, before the entry above it, of {last.time}"
    return None


def _act(states: dict[_Place, _State], revoked: dict[str, LedgerEntry], entry: LedgerEntry) -> str | None:
    """Do what an entry says; what is wrong with it, where nobody may do that."""
    if entry.action == "revoke":
        if entry.slot or entry.stage or entry.full:
            return "revokes a verdict in one slot; a revocation holds everywhere"
        if entry.verdict in revoked:
            return f"revokes {entry.verdict[:12]} a second time"
        revoked[entry.verdict] = entry
        return None
    if not (entry.model and entry.slot and entry.stage):
        return f"does not say the model, slot and stage of its {entry.action}"
    if entry.verdict in revoked and (entry.action == "promote" or entry.full):
        return f"is a {entry.action} of {entry.verdict[:12]}, which was revoked before"
    state = states.setdefault((entry.model, entry.slot), _State())
    return _promote(state, entry) if entry.action == "promote" else _roll_back(state, entry)


def _promote(state: _State, entry: LedgerEntry) -> str | None:
    candidate = state.candidate
    if state.stack and state.stack[-1].verdict == entry.verdict:
        return f"promotes {entry.verdict[:12]}, which has all of the traffic already"
    if candidate is not None:
        if candidate.verdict != entry.verdict:
            return f"promotes {entry.verdict[:12]} while {candidate.verdict[:12]} is in the stage {candidate.stage}"
        if candidate.stage == entry.stage:
            return f"promotes {entry.verdict[:12]} into {entry.stage}, where it is already"
        if candidate.serial != entry.serial:
            return f"gives {entry.verdict[:12]} the serial {entry.serial}, and it was {candidate.serial}"
    elif state.last_serial is not None and entry.serial <= state.last_serial:
        return f"promotes the serial {entry.serial}, and {state.last_serial} was let in before"
    state.last_serial = max(entry.serial, state.last_serial or 0)
    if entry.full:
        state.candidate = None
        state.stack.append(entry)
        state.ever[entry.verdict] = entry
    else:
        state.candidate = entry
    return None


def _roll_back(state: _State, entry: LedgerEntry) -> str | None:
    candidate = state.candidate
    if not entry.full:
        if candidate is None or (candidate.verdict, candidate.stage) != (entry.verdict, entry.stage):
            return f"drops the candidate {entry.verdict[:12]} from {entry.stage}, where it is not"
        state.candidate = None
        return None
    if candidate is not None:
        return f"goes back to {entry.verdict[:12]} while {candidate.verdict[:12]} is in the stage {candidate.stage}"
    if entry.verdict not in state.ever:
        return f"goes back to {entry.verdict[:12]}, which never had all of the traffic here"
    if state.stack[-1].verdict == entry.verdict:
        return f"goes back to {entry.verdict[:12]}, which has all of the traffic"
    if state.ever[entry.verdict].serial != entry.serial:
        return f"gives {entry.verdict[:12]} the serial {entry.serial}, and it was {state.ever[entry.verdict].serial}"
    below = next((i for i, each in enumerate(state.stack) if each.verdict == entry.verdict), len(state.stack))
    del state.stack[below:]
    state.stack.append(entry)
    state.ever[entry.verdict] = entry
    return None


def _occupations(history: History, slot: str | None) -> Iterator[Occupation]:
    opened: list[LedgerEntry] = []
    closed: dict[int, LedgerEntry] = {}
    now: dict[tuple[str, str, bool], LedgerEntry] = {}
    for entry in history.entries:
        if entry.action == "revoke" or slot not in (None, entry.slot):
            continue
        place = (entry.model, entry.slot)
        gone = [now.pop((*place, False), None)]
        arrives = entry.action == "promote" or entry.full
        if entry.full:
            gone.append(now.pop((*place, True), None))
        closed.update({each.index: entry for each in gone if each is not None})
        if arrives:
            now[(*place, entry.full)] = entry
            opened.append(entry)
    for entry in opened:
        end, revocation = closed.get(entry.index), history.revoked(entry.verdict)
        yield Occupation(
            start=entry.time,
            until=None if end is None else end.time,
            model=entry.model,
            slot=entry.slot,
            stage=entry.stage,
            full=entry.full,
            engine=entry.engine,
            serial=entry.serial,
            verdict=entry.verdict,
            how=entry.action,
            ended=None if end is None else end.action,
            revoked=None if revocation is None else revocation.time,
            index=entry.index,
        )


def _place(model: str, slot: str) -> str:
    return f"{model} / {slot}"


def _rollback(model: str, slot: str) -> str:
    return f"gate rollback --policy POLICY --model {model} --slot {slot} --reason TEXT"
