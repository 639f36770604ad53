"""The rules by which a verdict is let in: identity, freshness, approvals. Pure: no clock, no file, no key."""

from __future__ import annotations

import datetime as dt
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gate.errors import ApprovalsMissing, IdentityMismatch, StaleVerdict, VerificationError
from gate.manifest import Digests
from gate.release.policy import moment_from_text
from gate.release.statements import CountedApproval, LedgerEntry, VerdictPredicate, model_name
from gate.verdict import is_covered

CLOCK_SKEW_S = 300
"""How far the clock of the machine that checked may be ahead of the one that verifies, in seconds."""


class Accepted(Protocol):
    """What a ledger says of verdicts, such as gate.release.history.History."""

    def last_serial(self, model: str, slot: str) -> int | None:
        """The highest serial that was ever let into a slot."""
        ...

    def revoked(self, verdict: str) -> LedgerEntry | None:
        """The entry that revoked a verdict."""
        ...

    def is_in_slot(self, verdict: str, model: str, slot: str) -> bool:
        """Whether it is there now, with some or all of the traffic."""
        ...

    def against(self, verdict: str, *, serial: int, engine: str, model: str, slot: str) -> str | None:
        """What else than the age of its serial speaks against letting it in anew."""
        ...


@dataclass(frozen=True)
class Vote:
    """One approval in a bundle, and what is known of it.

    Args:
        path: Its file.
        key: The key's name in the policy; empty where no trusted key signed it.
        owner: Who holds that key.
        role: As which it approves.
        against: Why it cannot count; empty where nothing speaks against it.
    """

    path: str
    key: str = ""
    owner: str = ""
    role: str = ""
    against: str = ""


@dataclass(frozen=True)
class Tally:
    """Approvals counted.

    Args:
        counted: Those that count, in the order of the files.
        missing: How many of each role there are too few.
        text: `2 of 2 release (ada, grace)`, with why others do not count.
    """

    counted: tuple[CountedApproval, ...]
    missing: Mapping[str, int]
    text: str


def moment(text: str) -> dt.datetime:
    """A timestamp of a statement or a policy as a time in UTC.

    Raises:
        VerificationError: There is no such day or time.
    """
    found = moment_from_text(text)
    if found is None:
        raise VerificationError(f"{text!r:.40} is no time such as 2026-11-21T10:00:00Z")
    return found


def is_ahead(text: str, now: str) -> bool:
    """Whether a time lies after now, by more than clocks differ."""
    return moment(text) > moment(now) + dt.timedelta(seconds=CLOCK_SKEW_S)


def require_identity(
    said: VerdictPredicate,
    *,
    model: str,
    slot: str,
    spec: frozenset[str] | None,
    data: frozenset[str] | None,
    baseline: frozenset[str] | None,
) -> str:
    """The verdict is on the model, for the slot, and rests on what the verifier holds.

    Args:
        said: The verdict.
        model: Asked for, without the digits of its weights.
        slot: Asked for.
        spec, data, baseline: The digests that will do; None: any. An empty set of baselines: none.

    Returns:
        What it is, in one line.

    Raises:
        IdentityMismatch: It is of something else.
    """
    if model_name(said.model_id) != model:
        raise IdentityMismatch(f"it is of model {said.model_id!r}, asked for is {model!r}")
    if slot not in said.slots:
        sealed = ", ".join(said.slots) or "no slot"
        raise IdentityMismatch(
            f"it was sealed for {sealed}, asked for is {slot!r}", hint=f"Seal it for that slot: gate seal --slot {slot}"
        )
    texts = []
    digests: Digests = said.digests
    for name, allowed, got in (
        ("spec", spec, digests.spec),
        ("data", data, digests.data),
        ("baseline", baseline, digests.baseline),
    ):
        shown = "none" if got is None else f"{got[:8]}…"
        if allowed is None:
            texts.append(f"{name} {shown} (any)")
            continue
        if (got is None and allowed) or (got is not None and got not in allowed):
            held = ", ".join(sorted(f"{each[:8]}…" for each in allowed)) or "none"
            raise IdentityMismatch(f"its {name} is {shown}, the policy takes {held}", hint=f"{name}: {got}")
        texts.append(f"{name} {shown}")
    return f"{model} / {slot}; {', '.join(texts)}"


def require_findings(checks: Iterable[str], needed: Sequence[str]) -> None:
    """Each check, or group of checks, that the policy asks for was made.

    Raises:
        VerificationError: One was not.
    """
    there = tuple(checks)
    for name in needed:
        if not is_covered(name, there):
            raise VerificationError(f"the policy asks for {name}, which was not checked")


def require_fresh(
    said: VerdictPredicate, verdict: str, *, slot: str, now: str, max_age_days: float | None, accepted: Accepted | None
) -> str:
    """The verdict holds now, is not too old, not revoked, and newer than what was let in before.

    Args:
        said: The verdict.
        verdict: Its digest.
        slot: Where to.
        now: The time.
        max_age_days: How old the check may be; None: as old as the verdict holds.
        accepted: What the ledger says; None: there is none.

    Returns:
        What was looked at, in one line.

    Raises:
        StaleVerdict: It is not.
    """
    require_unrevoked(verdict, accepted)
    at, made, ends = moment(now), moment(said.created), moment(said.not_after)
    if is_ahead(said.created, now):
        raise StaleVerdict(f"it says it was made on {said.created}, now is {now}: one of the two clocks is wrong")
    if at >= ends:
        raise StaleVerdict(f"it expired on {said.not_after}, now is {now}", hint="Check and seal again.")
    days = (at - made).total_seconds() / 86_400.0
    if max_age_days is not None and days > max_age_days:
        raise StaleVerdict(
            f"it was checked {days:.1f} days ago, the policy takes {max_age_days:g}", hint="Check and seal again."
        )
    valid = f"valid until {said.not_after[:10]}"
    if accepted is None:
        return f"serial {said.serial}, no ledger to compare with, {valid}"
    model = model_name(said.model_id)
    last = accepted.last_serial(model, slot)
    if accepted.is_in_slot(verdict, model, slot):
        return f"serial {said.serial}, in the slot already, {valid}"
    if last is not None and said.serial <= last:
        why = accepted.against(verdict, serial=said.serial, engine=said.engine, model=model, slot=slot)
        if why is not None:
            raise StaleVerdict(why)
        raise StaleVerdict(
            f"its serial is {said.serial}, {last} was accepted before: an older verdict is not let in again",
            hint="Seal again with a higher serial; to go back to what was there: gate rollback",
        )
    if last is None:
        return f"serial {said.serial}, the first of {model} in {slot} by the ledger, {valid}"
    return f"serial {said.serial} > {last}, {valid}"


def require_unrevoked(verdict: str, accepted: Accepted | None) -> None:
    """The ledger does not say that the verdict was revoked.

    Raises:
        StaleVerdict: It does.
    """
    entry = None if accepted is None else accepted.revoked(verdict)
    if entry is not None:
        raise StaleVerdict(f"it was revoked on {entry.time}: {entry.reason or 'no reason was given'}")


def tally(votes: Sequence[Vote], needed: Mapping[str, int]) -> Tally:
    """Count approvals: one for each owner, whatever keys and roles they have, so that as many as can be are found.

    Args:
        votes: Each approval in the bundle.
        needed: How many of each role.
    """
    left_out: list[str] = []
    by_owner: dict[str, dict[str, Vote]] = {}
    for vote in votes:
        against = vote.against
        if not against and vote.role not in needed:
            against = f"role {vote.role} is not asked for"
        if against:
            left_out.append(f"{vote.path.rpartition('/')[2]}: {against}")
            continue
        by_owner.setdefault(person(vote.owner), {}).setdefault(vote.role, vote)
    role_of = _matched({owner: tuple(roles) for owner, roles in by_owner.items()}, needed)
    chosen = {owner: roles[role_of[owner]] for owner, roles in by_owner.items()}
    for vote in votes:
        mine = chosen.get(person(vote.owner))
        if not vote.against and vote.role in needed and mine is not None and mine is not vote:
            left_out.append(f"{vote.path.rpartition('/')[2]}: {vote.owner} has approved with key {mine.key} already")
    counted = tuple(CountedApproval(vote.key, vote.role) for vote in votes if vote in chosen.values())
    by_role = {role: [each.key for each in counted if each.role == role] for role in needed}
    missing = {role: count - len(by_role[role]) for role, count in needed.items() if len(by_role[role]) < count}
    parts = [_count(by_role[role], count, role) for role, count in needed.items()] or ["none asked for"]
    return Tally(counted, missing, "; ".join([*parts, *(f"not counted: {each}" for each in left_out)]))


def person(owner: str) -> str:
    """An owner's name without what two writings of it differ in: case, spaces, Unicode forms."""
    return " ".join(unicodedata.normalize("NFKC", owner).casefold().split())


def _matched(roles: Mapping[str, Sequence[str]], needed: Mapping[str, int]) -> dict[str, str]:
    """One role for each owner, so that the most places are filled; who finds none free is one more of the first role.

    Source: augmenting paths (Kuhn), on owners and the places of roles.
    """
    places = [(role, number) for role, count in needed.items() for number in range(count)]
    taken: dict[tuple[str, int], str] = {}

    def place(owner: str, seen: set[tuple[str, int]]) -> bool:
        for each in places:
            if each[0] in roles[owner] and each not in seen:
                seen.add(each)
                if each not in taken or place(taken[each], seen):
                    taken[each] = owner
                    return True
        return False

    for owner in roles:
        place(owner, set())
    found = {owner: each[0] for each, owner in taken.items()}
    return {owner: found.get(owner, own[0]) for owner, own in roles.items()}


def _count(names: Sequence[str], needed: int, role: str) -> str:
    who = f" ({', '.join(names)})" if names else ""
    return f"{len(names)} of {needed} {role}{who}"


def require_approved(found: Tally, *, title: str, command: str) -> str:
    """Each role approved often enough.

    Args:
        found: The approvals.
        title: Of the bundle, for the message.
        command: To approve with.

    Raises:
        ApprovalsMissing: One did not.
    """
    if found.missing:
        role, count = next(iter(found.missing.items()))
        more = f"{count} more approval{'s' if count > 1 else ''} by role {role}"
        raise ApprovalsMissing(f"{title} needs {more}: {found.text}", hint=command)
    return found.text
