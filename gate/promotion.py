"""Approvals, promotions, rollbacks and revocations: verified first, then signed and written.

Only what `gate.verification.verify` returned is promoted, and only what it accepts is rolled back to. Only a verdict that
the gate signed, over the files that lie beside it, is revoked by its folder.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gate import atomic
from gate.errors import (
    BundleError,
    GateError,
    PromotionRefused,
    SignatureMismatch,
    SpecError,
    StaleVerdict,
    VerificationError,
)
from gate.ledger import Ledger, append, read_ledger
from gate.manifest import MAX_JSON_BYTES, sha256_hex
from gate.release.history import History, may_enter, next_stage, rollback_targets
from gate.release.policy import GATE, PROMOTER, StagePolicy, TrustedKey, TrustPolicy, is_valid, requirements
from gate.release.rules import require_unrevoked
from gate.release.statements import (
    IN_TOTO,
    ApprovalPredicate,
    ApprovalStatement,
    ApprovedVerdict,
    Envelope,
    LedgerEntry,
    SubjectDigest,
    VerdictStatement,
    envelope_from_bytes,
    model_name,
    payload_of,
    statement_from_payload,
)
from gate.signing import KeySigner, verified
from gate.store import MAX_FILES, VERDICT_PATH, SealCheck, approval_path
from gate.trust import PolicyFile, ledger_path
from gate.utc import utc_now
from gate.verification import VerifiedBundle, verify

MAX_DEPTH = 8
"""Of the folders in a bundle."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Approved:
    """An approval that was written.

    Args:
        path: Its file.
        key: The key's name in the policy.
        role, slot: As which, for what.
        verdict_sha256, serial, engine: What was approved.
        notes: What was found in the ledger on the way.
    """

    path: Path
    key: str
    role: str
    slot: str
    verdict_sha256: str
    serial: int
    engine: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recorded:
    """An entry that is in the ledger now.

    Args:
        entry: It.
        sha256: Of its line: kept elsewhere, it shows a ledger that was put back to an older state.
        key: The name of the key that signed it.
        path: The ledger's file.
        notes: What was found on the way: what a writer that was killed left, and bundles that were passed over.
        following: The stage that comes next; None where there is none.
        places: Where a revoked verdict still is.
        slots: What a revoked verdict was sealed for, or, by its digest alone, where it was; None: not known.
    """

    entry: LedgerEntry
    sha256: str
    key: str
    path: Path
    notes: tuple[str, ...] = ()
    following: StagePolicy | None = None
    places: tuple[LedgerEntry, ...] = ()
    slots: tuple[str, ...] | None = None


def approve(
    bundle: Path,
    *,
    policy: PolicyFile,
    model: str,
    slot: str,
    signer: KeySigner,
    role: str | None = None,
    comment: str = "",
    now: str | None = None,
) -> Approved:
    """Sign an approval of a bundle's verdict for a slot, and put it beside the verdict.

    Everything but the approvals is verified first, as for the slot's first stage: nobody approves what would be
    refused.

    Args:
        bundle: Its folder.
        policy: The trust policy.
        model, slot: For what.
        signer: The approver's key.
        role: As which; None: the only role of the key that the slot asks for.
        comment: Why.
        now: The time; None: the system's clock.

    Raises:
        VerificationError: The bundle would be refused.
        PromotionRefused: The key is not in the policy, not valid, has not that role, or approved it already.
    """
    now = utc_now() if now is None else now
    require_no_link(bundle)
    stages = stages_of(policy.policy, slot)
    key = _require_key(policy, signer, now)
    role = role_of(key, policy.policy, slot, role, where=str(policy.path))
    history, notes = _history(policy, now)
    _sweep(bundle)
    verdict = peek(bundle)[1]
    require_unrevoked(verdict, history)
    stage = next_stage(history, model=model, slot=slot, stages=stages, verdict=verdict).name
    with verify(
        bundle, policy=policy, model=model, slot=slot, stage=stage, history=history, now=now, approvals=False
    ) as verified:
        said = verified.statement.predicate
        target = bundle / approval_path(signer.public.keyid, slot)
        if os.path.lexists(target):
            raise PromotionRefused(
                f"{key.name} approved it for {slot} already; one key counts once",
                where=str(target),
                hint="another key has to approve; an approval that does not count may be removed and made anew",
            )
        statement = ApprovalStatement(
            subject=(ApprovedVerdict(SubjectDigest(verified.verdict_sha256)),),
            predicate=ApprovalPredicate(
                role=role, slot=slot, model_id=said.model_id, serial=said.serial, created=now, comment=comment
            ),
        )
        payload = payload_of(statement)
        statement_from_payload(payload, ApprovalStatement, where=str(target))
        atomic.write_bytes(target, signer.sign(payload, IN_TOTO).to_bytes(), beside=_outside(bundle))
        return Approved(target, key.name, role, slot, verified.verdict_sha256, said.serial, said.engine, notes)


def promote(
    bundle: Path,
    *,
    policy: PolicyFile,
    model: str,
    slot: str,
    signer: KeySigner,
    stage: str | None = None,
    requests: int | None = None,
    reason: str = "",
    now: str | None = None,
) -> Recorded:
    """Verify a bundle for a stage of a slot and write into the ledger that it is there now.

    Args:
        bundle: Its folder.
        policy: The trust policy.
        model, slot: Where to.
        signer: A promoter's key.
        stage: Where to; None: the next one of this bundle.
        requests: Served in the stage that it leaves.
        reason: Why.
        now: The time; None: the system's clock.

    Raises:
        VerificationError: The bundle is refused.
        LedgerError: The ledger is not what was signed.
        PromotionRefused: The policy does not allow it, or somebody else was first.
    """
    now = utc_now() if now is None else now
    require_no_link(bundle)
    stages = stages_of(policy.policy, slot)
    _require_key(policy, signer, now, role=PROMOTER)
    ledger = read_ledger(_ledger_path(policy), policy, now=now)
    history = ledger.history
    if stage is None:
        verdict = peek(bundle)[1]
        require_unrevoked(verdict, history)
        stage = next_stage(history, model=model, slot=slot, stages=stages, verdict=verdict).name
    try:
        admitted = verify(bundle, policy=policy, model=model, slot=slot, stage=stage, history=history, now=now)
    except StaleVerdict as err:
        raise _said_better(err, bundle, history, model=model, slot=slot) from err
    with admitted as verified:
        serial = verified.statement.predicate.serial
        may_enter(
            history,
            model=model,
            slot=slot,
            stage=stage,
            stages=stages,
            verdict=verified.verdict_sha256,
            serial=serial,
            now=now,
            requests=requests,
            engine=verified.statement.predicate.engine,
        )
        position = [each.name for each in stages].index(stage)
        is_full = position == len(stages) - 1
        entry = _entry_for(verified, action="promote", is_full=is_full, now=now, requests=requests, reason=reason)
        following = None if is_full else stages[position + 1]
        return _record(ledger, policy, entry, signer, following=following)


def rollback(
    *,
    policy: PolicyFile,
    model: str,
    slot: str,
    signer: KeySigner,
    reason: str,
    bundle: Path | None = None,
    older: bool = False,
    now: str | None = None,
) -> Recorded:
    """Take the candidate out of its stage; where there is none, go back to the last good bundle.

    What is gone back to is verified again, but for freshness and approvals. Where the last good one does not verify,
    nothing is done unless `older` says so: whoever can spoil a bundle must not choose how far back it goes.

    Args:
        policy: The trust policy.
        model, slot: Where.
        signer: A promoter's key.
        reason: Why.
        bundle: The folder to go back to, where it no longer lies where it was promoted from, or where it is not to be
            the last one; it must have had all of the traffic before.
        older: Pass over those that do not verify, to the newest that does.
        now: The time; None: the system's clock.

    Raises:
        LedgerError: The ledger is not what was signed.
        PromotionRefused: There is nothing to go back to, the last good one does not verify, or somebody else was first.
        SpecError: `bundle` and `older` are both given.
    """
    now = utc_now() if now is None else now
    if bundle is not None and older:
        raise SpecError("a bundle is named, and the next older one is asked for: it is one or the other")
    stages = stages_of(policy.policy, slot)
    _require_key(policy, signer, now, role=PROMOTER)
    _require_reason(reason)
    ledger = read_ledger(_ledger_path(policy), policy, now=now)
    history = ledger.history
    candidate = history.candidate(model, slot)
    if candidate is not None:
        if bundle is not None or older:
            option = "--older" if older else "--bundle"
            raise PromotionRefused(
                f"serial {candidate.serial} is in the stage {candidate.stage}: that is taken out first",
                where=f"{model} / {slot}",
                hint=f"run it without {option}, then again with it",
            )
        dropped = _replaced(candidate, policy=policy, now=now, reason=reason)
        return _record(ledger, policy, dropped, signer)
    notes: list[str] = []
    targets = _targets(history, model=model, slot=slot, bundle=bundle)
    for number, target in enumerate(targets):
        try:
            _require_still_there(target)
            with verify(
                target.folder,
                policy=policy,
                model=model,
                slot=slot,
                stage=stages[-1].name,
                history=history,
                now=now,
                admission=False,
            ) as verified:
                _require_meant(target, verified.verdict_sha256)
                entry = _entry_for(verified, action="rollback", is_full=True, now=now, requests=None, reason=reason)
        except GateError as err:
            if not older:
                raise _stopped_at(target, err, targets[number + 1 :], policy=policy, model=model, slot=slot) from err
            notes.append(f"passed over {target.name}: {str(err).splitlines()[0]}")
            continue
        return _record(ledger, policy, entry, signer, notes=tuple(notes))
    raise _nothing_to_go_back_to(history, model, slot, notes)


def revoke(
    what: str,
    *,
    policy: PolicyFile,
    signer: KeySigner,
    reason: str,
    now: str | None = None,
) -> Recorded:
    """Write into the ledger that a verdict counts for nothing from now on, anywhere.

    Args:
        what: A bundle's folder, whose verdict has to be the gate's and of its files, or a verdict's SHA-256. 64 hex digits
            are a digest, also where a folder is called so.
        policy: The trust policy.
        signer: A promoter's key.
        reason: Why.
        now: The time; None: the system's clock.

    Raises:
        VerificationError: The verdict in the folder is not one by the gate over these files; SignatureMismatch,
            DigestMismatch.
        BundleError: It is no bundle.
        LedgerError: The ledger is not what was signed.
        PromotionRefused: It is revoked already.
    """
    now = utc_now() if now is None else now
    _require_key(policy, signer, now, role=PROMOTER)
    _require_reason(reason)
    ledger = read_ledger(_ledger_path(policy), policy, now=now)
    history = ledger.history
    notes: tuple[str, ...] = ()
    slots: tuple[str, ...] | None
    entry = LedgerEntry(
        index=0,
        previous="0" * 64,
        time=now,
        action="revoke",
        model="",
        slot="",
        stage="",
        full=False,
        verdict="0" * 64,
        serial=0,
        engine="",
        engine_sha256="0" * 64,
        bundle="",
        policy_sha256=policy.sha256,
        approvals=(),
        requests=None,
        reason=reason,
    )
    if _SHA256.fullmatch(what.lower()):
        verdict = what.lower()
        known = [each for each in history.entries if each.verdict == verdict]
        slots = tuple(sorted({each.slot for each in known if each.slot})) if known else None
        if known:
            entry = _changed(_replaced(known[-1], policy=policy, now=now, reason=reason), action="revoke")
            entry = _changed(entry, slot="", stage="", full=False)
        else:
            notes = ("the ledger does not know this verdict: nothing here says what it is of; compare all 64 digits",)
            entry = _changed(entry, verdict=verdict)
    else:
        bundle = Path(what)
        statement, verdict = _by_the_gate(bundle, policy)
        said = statement.predicate
        slots = said.slots
        entry = _changed(
            entry,
            model=model_name(said.model_id),
            verdict=verdict,
            serial=said.serial,
            engine=said.engine,
            engine_sha256=said.engine_sha256,
            bundle=str(bundle.absolute()),
        )
    if (gone := history.revoked(verdict)) is not None:
        raise PromotionRefused(
            f"the verdict {verdict[:12]} was revoked at {gone.time}: {gone.reason or 'no reason given'}",
            where=str(ledger.path),
        )
    return _record(ledger, policy, entry, signer, notes=notes, places=history.places_of(verdict), slots=slots)


def require_no_link(bundle: Path) -> None:
    """A bundle's folder is not reached by a symbolic link of that name; links above it are the system's.

    Raises:
        VerificationError: It is.
    """
    if bundle.is_symlink():
        raise VerificationError(
            f"is a symbolic link; give what it leads to, {os.path.realpath(bundle)}", where=str(bundle)
        )


def stages_of(policy: TrustPolicy, slot: str) -> tuple[StagePolicy, ...]:
    """The stages of a slot, in order.

    Raises:
        SpecError: The policy has no such slot.
    """
    stages = policy.slot[slot].stage if slot in policy.slot else ()
    requirements(policy, slot, stages[0].name if stages else "")
    return stages


def role_of(key: TrustedKey, policy: TrustPolicy, slot: str, role: str | None, *, where: str) -> str:
    """As which a key approves for a slot.

    Args:
        key: The approver's.
        policy: Says which roles the slot, or a stage of it, asks for.
        slot: For what.
        role: Asked for; None: the only one that the key has and the slot asks for.
        where: Names the policy in errors.

    Raises:
        PromotionRefused: The key has not that role, the slot asks for none of it, or there are several.
    """
    asked = policy.slot[slot]
    needed = {*asked.approvals, *(name for each in asked.stage for name in each.approvals or ())}
    if GATE in key.roles:
        raise PromotionRefused(f"{key.name} issues verdicts, and cannot approve them", where=where)
    if role is None:
        fitting = [each for each in key.roles if each in needed]
        if len(fitting) > 1:
            raise PromotionRefused(
                f"{key.name} may approve as {' or '.join(fitting)}", where=where, hint=f"say which: --role {fitting[0]}"
            )
        role = fitting[0] if fitting else None
    if role is None or role not in key.roles:
        raise PromotionRefused(
            f"{key.name} is {', '.join(key.roles)}"
            + (f", not {role}" if role else f"; {slot} asks for approvals by {', '.join(sorted(needed)) or 'nobody'}"),
            where=where,
        )
    if role not in needed:
        raise PromotionRefused(
            f"{slot} asks for no approval by {role}, but by {', '.join(sorted(needed)) or 'nobody'}", where=where
        )
    return role


def peek(bundle: Path) -> tuple[VerdictStatement, str]:
    """What a bundle's verdict says it is, and the SHA-256 of its payload; nothing of it is verified.

    Raises:
        BundleError: It is no bundle, or its verdict cannot be read.
    """
    path = bundle / VERDICT_PATH
    try:
        envelope: Envelope = envelope_from_bytes(
            atomic.read_regular(path, limit_bytes=MAX_JSON_BYTES), payload_type=IN_TOTO, where=str(path)
        )
    except OSError as err:
        raise BundleError(f"cannot be read: {err.strerror}", where=str(path)) from err
    return statement_from_payload(envelope.payload, VerdictStatement, where=str(path)), sha256_hex(envelope.payload)


def _by_the_gate(bundle: Path, policy: PolicyFile) -> tuple[VerdictStatement, str]:
    """The verdict of a bundle, which a key of the gate signed and which is of the files that are there, and its SHA-256.

    The key counts whatever its dates: a verdict of a key that was revoked may well be revoked.

    Raises:
        BundleError: It is not that; VerificationError, SignatureMismatch, DigestMismatch.
    """
    try:
        require_no_link(bundle)
        with SealCheck(bundle) as check:
            check.tree()
            where = check.where(VERDICT_PATH)
            envelope = check.read_envelope()
            if len(envelope.signatures) != 1:
                count = len(envelope.signatures)
                raise SignatureMismatch(
                    "nobody signed the verdict" if not count else f"{count} keys signed the verdict, one does",
                    where=where,
                )
            keyid = envelope.signatures[0].keyid
            key = policy.keys.get(keyid)
            if key is None:
                raise SignatureMismatch(f"key {keyid[:12]}… is not in the policy", where=where)
            if GATE not in key.entry.roles:
                roles = ", ".join(key.entry.roles)
                raise SignatureMismatch(f"key {key.entry.name} is of role {roles}, not {GATE}", where=where)
            if verified(envelope, [key.public], where=where) != (keyid,):
                raise SignatureMismatch(f"the signature by key {key.entry.name} does not hold", where=where)
            check.schema()
            check.digests()
            return check.statement, check.verdict_sha256
    except BundleError as err:
        raise type(err)(
            err.message,
            where=err.where,
            hint=f"gate revoke SHA256 --policy {policy.path} --reason TEXT --key KEY revokes a verdict by its digest. Take "
            "that from gate approve, gate ledger show --json or the release ticket, not from this folder",
        ) from err


def _said_better(err: StaleVerdict, bundle: Path, history: History, *, model: str, slot: str) -> StaleVerdict:
    """The same refusal, with what the ledger knows of the serial; the signature of the verdict holds by then."""
    statement, verdict = peek(bundle)
    said = statement.predicate
    against = history.against(verdict, serial=said.serial, engine=said.engine, model=model, slot=slot)
    last = history.last_serial(model, slot)
    if against is None or last is None or said.serial > last or history.revoked(verdict) is not None:
        return err
    return StaleVerdict(f"its serial is {said.serial}, {last} was accepted before: {against}", where=err.where)


def _sweep(bundle: Path) -> None:
    """Remove what an approval that was stopped left among the seals, where all else there is as a bundle has it.

    Nobody has verified the bundle yet, so nothing in it may say where something is removed.
    """
    seals = bundle / "seals"
    try:
        if stat.S_ISDIR(seals.lstat().st_mode):
            left = [each for each in seals.iterdir() if each.name.startswith(".tmp-")]
            if left and _is_plain(bundle, but={each.name for each in left}):
                atomic.remove_stale(seals)
    except OSError:
        return


def _is_plain(bundle: Path, *, but: set[str]) -> bool:
    """Whether a tree holds folders and files of one name alone, as bundles do, some names among its seals left out."""
    folders = [(bundle, 0)]
    count = 0
    while folders:
        folder, depth = folders.pop()
        with os.scandir(folder) as listing:
            for item in listing:
                count += 1
                mode, links = item.stat(follow_symlinks=False).st_mode, item.stat(follow_symlinks=False).st_nlink
                is_left = folder == bundle / "seals" and item.name in but
                if stat.S_ISDIR(mode) and not is_left and depth < MAX_DEPTH and count <= MAX_FILES:
                    folders.append((folder / item.name, depth + 1))
                elif not stat.S_ISREG(mode) or links != 1 or (item.name.startswith(".") and not is_left):
                    return False
    return (bundle / VERDICT_PATH).is_file()


def _outside(bundle: Path) -> Path | None:
    """What a temporary file lies beside so that it is no file of the bundle; None where the bundle is a mount of its own."""
    folder = Path(os.path.realpath(bundle))
    can = folder.stat().st_dev == folder.parent.stat().st_dev and os.access(folder.parent, os.W_OK | os.X_OK)
    return folder if can else None


def _ledger_path(policy: PolicyFile) -> Path:
    path = ledger_path(policy)
    if path is None:
        raise PromotionRefused(
            "names no ledger, so nothing can be promoted",
            where=str(policy.path),
            hint='add ledger = "ledger.jsonl" to it, above the first table',
        )
    return path


def _history(policy: PolicyFile, now: str) -> tuple[History, tuple[str, ...]]:
    path = ledger_path(policy)
    if path is None:
        return History(), ()
    ledger = read_ledger(path, policy, now=now)
    return ledger.history, ledger.notes


def _require_key(policy: PolicyFile, signer: KeySigner, now: str, *, role: str | None = None) -> TrustedKey:
    keyid = signer.public.keyid
    trusted = policy.keys.get(keyid)
    if trusted is None:
        raise PromotionRefused(
            f"does not have the key {keyid[:16]}",
            where=str(policy.path),
            hint="its owner prints it with gate key show; who may change the policy adds it as [[key]]",
        )
    key = trusted.entry
    if (why := is_valid(key, now)) is not None:
        raise PromotionRefused(f"key {key.name} {why}", where=str(policy.path))
    if role is not None and role not in key.roles:
        raise PromotionRefused(f"key {key.name} is {', '.join(key.roles)}, not {role}", where=str(policy.path))
    return key


def _require_reason(reason: str) -> None:
    if not reason.strip():
        raise PromotionRefused("says no reason", hint='say why: --reason "p99 doubled since noon"')


def _entry_for(
    verified: VerifiedBundle, *, action: str, is_full: bool, now: str, requests: int | None, reason: str
) -> LedgerEntry:
    said = verified.statement.predicate
    return LedgerEntry(
        index=0,
        previous="0" * 64,
        time=now,
        action="promote" if action == "promote" else "rollback",
        model=verified.model,
        slot=verified.slot,
        stage=verified.stage,
        full=is_full,
        verdict=verified.verdict_sha256,
        serial=said.serial,
        engine=said.engine,
        engine_sha256=said.engine_sha256,
        bundle=str(verified.folder.absolute()),
        policy_sha256=verified.policy.sha256,
        approvals=verified.approvals,
        requests=requests,
        reason=reason,
    )


def _replaced(entry: LedgerEntry, *, policy: PolicyFile, now: str, reason: str) -> LedgerEntry:
    """An entry on the same verdict that takes it away."""
    return _changed(
        entry, action="rollback", time=now, policy_sha256=policy.sha256, approvals=(), requests=None, reason=reason
    )


def _changed(entry: LedgerEntry, **values: object) -> LedgerEntry:
    import msgspec

    return msgspec.structs.replace(entry, **values)


def _record(
    ledger: Ledger,
    policy: PolicyFile,
    entry: LedgerEntry,
    signer: KeySigner,
    *,
    notes: Sequence[str] = (),
    following: StagePolicy | None = None,
    places: tuple[LedgerEntry, ...] = (),
    slots: tuple[str, ...] | None = None,
) -> Recorded:
    written = append(
        ledger.path,
        policy,
        ledger,
        lambda index, previous: _changed(entry, index=index, previous=previous),
        signer,
        now=entry.time,
    )
    return Recorded(
        entry=written.history.entries[-1],
        sha256=written.head,
        key=written.signers[-1],
        path=ledger.path,
        notes=(*ledger.notes, *notes),
        following=following,
        places=places,
        slots=slots,
    )


@dataclass(frozen=True)
class _Target:
    """A folder to go back to.

    Args:
        folder: It.
        allowed: The verdicts that it may hold.
        entry: What the ledger says was promoted from there; None where the folder was named.
    """

    folder: Path
    allowed: tuple[str, ...]
    entry: LedgerEntry | None

    @property
    def name(self) -> str:
        return str(self.folder) if self.entry is None else f"serial {self.entry.serial}, {self.folder}"


def _targets(history: History, *, model: str, slot: str, bundle: Path | None) -> tuple[_Target, ...]:
    """The folders to look at, in order."""
    if bundle is None:
        targets = rollback_targets(history, model, slot)
        return tuple(_Target(Path(each.bundle), (each.verdict,), each) for each in targets)
    current = history.current(model, slot)
    held = tuple(
        each.verdict
        for each in history.held(model, slot)
        if history.revoked(each.verdict) is None and (current is None or each.verdict != current.verdict)
    )
    return (_Target(bundle, held, None),) if held else ()


def _require_still_there(target: _Target) -> None:
    """The folder holds the verdict that was promoted, by its name; whether that is true is looked at afterwards.

    Raises:
        PromotionRefused: It was sealed into again.
        BundleError: It holds no verdict.
    """
    require_no_link(target.folder)
    statement, verdict = peek(target.folder)
    if target.entry is None or verdict in target.allowed:
        _require_meant(target, verdict)
        return
    raise PromotionRefused(
        f"{target.folder} now holds serial {statement.predicate.serial}; the one that was promoted, serial "
        f"{target.entry.serial}, is not there: keep each bundle in a folder of its own, or give --bundle"
    )


def _require_meant(target: _Target, verdict: str) -> None:
    if verdict not in target.allowed:
        raise PromotionRefused(
            f"it holds the verdict {verdict[:12]}, not {' or '.join(each[:12] for each in target.allowed)}",
            where=str(target.folder),
        )


def _stopped_at(
    target: _Target, err: GateError, others: Sequence[_Target], *, policy: PolicyFile, model: str, slot: str
) -> PromotionRefused:
    """That the one to go back to cannot be used, why, and how to go on."""
    said = str(err).splitlines()[0]
    command = f"gate rollback --policy {policy.path} --model {model} --slot {slot} --reason TEXT --key KEY"
    if target.entry is None:
        return PromotionRefused(
            said, where=f"{model} / {slot}", hint=f"give one that had all of the traffic: {command} --bundle DIR"
        )
    hint = f"say where a good copy lies: {command} --bundle DIR"
    if others and others[0].entry is not None:
        serial = others[0].entry.serial
        hint += f"\nor go further back, to serial {serial} or the next older that verifies: {command} --older"
    return PromotionRefused(
        f"serial {target.entry.serial}, the last good one before, cannot be gone back to: {said}",
        where=f"{model} / {slot}",
        hint=hint,
    )


def _nothing_to_go_back_to(history: History, model: str, slot: str, notes: Sequence[str]) -> PromotionRefused:
    where = f"{model} / {slot}"
    if notes:
        return PromotionRefused(
            "none of the bundles before this one verifies:\n" + "\n".join(f"  {each}" for each in notes),
            where=where,
            hint="say where a good one lies: gate rollback ... --bundle DIR",
        )
    current = history.current(model, slot)
    what = "nothing was promoted here" if current is None else f"nothing good was here before serial {current.serial}"
    gone = sum(history.revoked(each.verdict) is not None for each in history.held(model, slot))
    return PromotionRefused(
        what + (f"; {gone} {'was' if gone == 1 else 'were'} revoked" if gone else ""),
        where=where,
        hint="a revoked bundle never comes back: check, seal and promote a new one",
    )
