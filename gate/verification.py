"""A bundle held against a trust policy: who signed it, for what, and whether that is enough here and now.

Nothing of the bundle is parsed before its signature holds, but for the envelope around it, and nothing is opened by a
framework at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from gate import atomic
from gate.engines.containers import FALLBACK_PATH, require_engine
from gate.errors import (
    BundleError,
    GateError,
    IdentityMismatch,
    SignatureMismatch,
    SpecError,
    StaleVerdict,
    VerificationError,
)
from gate.manifest import FileDigest
from gate.metadata import Metadata
from gate.release.history import History
from gate.release.policy import GATE, Requirements, TrustedKey, is_valid, requirements
from gate.release.rules import (
    Vote,
    is_ahead,
    require_approved,
    require_findings,
    require_fresh,
    require_identity,
    require_unrevoked,
    tally,
)
from gate.release.statements import (
    IN_TOTO,
    ApprovalStatement,
    CountedApproval,
    Envelope,
    LedgerEntry,
    VerdictStatement,
    envelope_from_bytes,
    statement_from_payload,
)
from gate.signing import verified
from gate.store import VERDICT_PATH, SealCheck, Step, Steps, approval_path
from gate.trust import Pinned, PolicyFile, Trusted, pinned
from gate.utc import utc_now
from gate.verdict import Evidence

MAX_APPROVAL_BYTES = 64 * 1024
_TOKEN = object()


@dataclass(frozen=True)
class VerifiedBundle:
    """A bundle that a policy lets into a slot. Only `verify` makes one; only it can be promoted or loaded.

    It holds the files that were hashed open; closing it closes them.

    Args:
        folder: Where it lies.
        metadata: Of its engine.
        statement: The verdict.
        verdict_sha256: Of the statement's bytes: what approvals and the ledger name.
        files: Every file but the seals, by its path in the bundle.
        engine: The engine's path in the bundle.
        model, slot, stage: What it was verified for.
        signed_by: The name of the key that signed the verdict.
        approvals: Those that count.
        policy: It was held against.
        steps: What was looked at, in order.
        warnings: What a reader must know although it passed.
    """

    folder: Path
    metadata: Metadata
    statement: VerdictStatement
    verdict_sha256: str
    files: Mapping[str, FileDigest]
    engine: str
    model: str
    slot: str
    stage: str
    signed_by: str
    approvals: tuple[CountedApproval, ...]
    policy: PolicyFile
    steps: tuple[Step, ...]
    warnings: tuple[str, ...]
    _check: SealCheck
    _token: InitVar[object]

    def __post_init__(self, _token: object) -> None:
        if _token is not _TOKEN:
            raise VerificationError("a verified bundle is what gate.verification.verify returns, and nothing else")

    def __enter__(self) -> VerifiedBundle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise VerificationError("a verified bundle holds open files and cannot be copied; verify it again")

    def open(self, name: str) -> BinaryIO:
        """The file that was hashed, at its beginning; one stream of a file at a time.

        What is read may still have been written to meanwhile by whoever can write there: hash it as it is read.

        Raises:
            BundleError: It is not one of `artifacts/` or `policy/`, or the bundle was closed.
        """
        stream = self._check.opened.get(name)
        if stream is None:
            raise BundleError("is not a file that is kept open", where=str(self.folder / name))
        file = os.dup(stream.fileno())
        os.lseek(file, 0, os.SEEK_SET)
        return os.fdopen(file, "rb")

    def close(self) -> None:
        """Close every file."""
        self._check.close()


def verify(
    bundle: Path,
    *,
    policy: PolicyFile,
    model: str,
    slot: str,
    stage: str | None = None,
    history: History | None = None,
    now: str | None = None,
    admission: bool = True,
    approvals: bool = True,
    on_step: Callable[[Step], None] | None = None,
) -> VerifiedBundle:
    """Hold a bundle against a policy: nothing in it is loaded, the first thing that is wrong ends it.

    Args:
        bundle: Its folder.
        policy: The trust policy, from elsewhere than the bundle.
        model: Asked for, without the digits of its weights.
        slot: Asked for.
        stage: Of the slot; None: its last, which is all of the traffic.
        history: What the ledger says; None: the policy names none.
        now: The time; None: the system's clock.
        admission: False for what the ledger says was let into the stage before (a rollback, a restart): it need not be
            fresh again, keys are judged as of then, and what the policy asks for otherwise by now is a warning. A
            revoked verdict, or one of a revoked key, is still refused, and so is one with too few approvals: an entry of
            the ledger alone is one promoter's word.
        approvals: False leaves that step out, for those who are about to approve.
        on_step: Told each step when it is done, the one that fails included.

    Raises:
        BundleError: It is not there, or a file is missing, a link, or not strict JSON.
        SpecError: The policy has no such slot or stage, or what it pins is not there; or it names a ledger, and its
            history was not given.
        VerificationError: DigestMismatch, SignatureMismatch, IdentityMismatch, StaleVerdict, ApprovalsMissing, or the
            bundle is not what it says it is.
    """
    at = utc_now() if now is None else now
    if history is None and (policy.policy.ledger is not None or not admission):
        raise SpecError(
            "what the ledger says was not given, so nobody knows what was let in or revoked",
            where=str(policy.path),
            hint="history=gate.ledger.read_ledger(gate.trust.ledger_path(policy), policy).history",
        )
    asked = _Asked(policy, model=model, slot=slot, stage=stage, history=history, now=at, admission=admission)
    check = SealCheck(bundle, keep_open=True)
    steps = Steps(bundle, on_step)
    counted: tuple[CountedApproval, ...] = ()
    try:
        steps.take("tree", check.tree)
        steps.take("policy", asked.said)
        steps.take("signature", lambda: asked.signature(check))
        steps.take("schema", lambda: _schema(asked, check))
        steps.take("digests", lambda: _digests(check))
        steps.take("subject", lambda: asked.subject(check))
        steps.take("verdict", lambda: asked.verdict(check))
        steps.take("freshness", lambda: asked.freshness(check))
        if approvals:
            command = f"gate approve {bundle} --policy {policy.path} --model {model} --slot {slot} --key KEY"
            found = tally(asked.votes(check), asked.needed.approvals)
            steps.take("approvals", lambda: require_approved(found, title=bundle.name, command=command))
            counted = found.counted
        return VerifiedBundle(
            folder=bundle,
            metadata=check.metadata,
            statement=check.statement,
            verdict_sha256=check.verdict_sha256,
            files=dict(check.files),
            engine=check.engine,
            model=model,
            slot=slot,
            stage=asked.needed.stage,
            signed_by=asked.signer.entry.name,
            approvals=counted,
            policy=policy,
            steps=tuple(steps.taken),
            warnings=(*check.metadata.warnings, *asked.warnings),
            _check=check,
            _token=_TOKEN,
        )
    except BaseException:
        check.close()
        raise


class _Asked:
    """What a bundle is held against."""

    def __init__(
        self,
        policy: PolicyFile,
        *,
        model: str,
        slot: str,
        stage: str | None,
        history: History | None,
        now: str,
        admission: bool,
    ) -> None:
        self.policy = policy
        self.model = model
        self.slot = slot
        self.history = history
        self.now = now
        self.admission = admission
        self.warnings: list[str] = []
        self.let_in: LedgerEntry | None = None
        self.signer: Trusted
        there = policy.policy.slot.get(slot)
        names = [] if there is None else [each.name for each in there.stage]
        self.stage = stage
        if names and stage is not None and stage not in names and not admission:
            self.warnings.append(f"stage {stage} of {slot} is not in the policy any more; held against {names[-1]}")
            stage = None
        self.needed: Requirements = requirements(policy.policy, slot, stage or (names[-1] if names else ""))

    def said(self) -> str:
        """What the policy is."""
        asked = ", ".join(f"{count} of {role}" for role, count in self.needed.approvals.items())
        count = len(self.policy.keys)
        return f"{self.policy.path}, {count} key{'s' if count > 1 else ''}, approvals: {asked or 'none'}"

    def signature(self, check: SealCheck) -> str:
        """One key of the gate signed the verdict, and may."""
        where = check.where(VERDICT_PATH)
        envelope = check.read_envelope()
        if not envelope.signatures:
            raise SignatureMismatch(
                "nobody signed the verdict",
                where=where,
                hint="Seal it with a key: gate seal SPEC --key KEY --slot SLOT",
            )
        if len(envelope.signatures) != 1:
            raise SignatureMismatch(f"{len(envelope.signatures)} keys signed the verdict, one does", where=where)
        if not self.admission:
            self.let_in = self._let_in(check)
        self.signer = self._signer(envelope, role=GATE, where=where)
        return f"verdict by {self.signer.entry.name} ({self.signer.public.keyid[:12]}…)"

    def signed_then(self, check: SealCheck) -> None:
        """The key was good on the day that the verdict names, too."""
        created = check.statement.predicate.created
        if (why := is_valid(self.signer.entry, created)) is not None:
            raise SignatureMismatch(
                f"key {self.signer.entry.name} {why}, the verdict says it was made on {created}",
                where=check.where(VERDICT_PATH),
            )

    def _signer(self, envelope: Envelope, *, role: str, where: str) -> Trusted:
        """The trusted key that signed, whose signature holds, which counts now and has the role.

        Raises:
            SignatureMismatch: There is none; says why.
        """
        keyid = envelope.signatures[0].keyid
        key = self.policy.keys.get(keyid)
        if key is None:
            raise SignatureMismatch(f"key {keyid[:12]}… is not in the policy", where=where)
        if (why := self.against(key.entry)) is not None:
            raise SignatureMismatch(f"key {key.entry.name} {why}", where=where)
        if role not in key.entry.roles:
            roles = ", ".join(key.entry.roles)
            raise SignatureMismatch(f"key {key.entry.name} is of role {roles}, not {role}", where=where)
        if verified(envelope, [key.public], where=where) != (keyid,):
            raise SignatureMismatch(f"the signature by key {key.entry.name} does not hold", where=where)
        return key

    def _let_in(self, check: SealCheck) -> LedgerEntry:
        """The entry by which the verdict was let in.

        Raises:
            StaleVerdict: The ledger has none.
        """
        is_last = self.needed.stage == self.policy.policy.slot[self.slot].stage[-1].name
        if self.history is not None:
            entry = self.history.let_in(
                check.verdict_sha256, model=self.model, slot=self.slot, stage=self.stage, is_last=is_last
            )
            if entry is not None:
                return entry
        raise StaleVerdict(
            f"by the ledger it was never let into {self.slot}{f', {self.stage}' if self.stage else ''}",
            where=check.where(VERDICT_PATH),
        )

    def against(self, entry: TrustedKey) -> str | None:
        """Why a key does not count: now, or, for what was let in before, unless it is revoked by now, then."""
        if self.let_in is None or (entry.revoked is not None and self.now >= entry.revoked):
            return is_valid(entry, self.now)
        return is_valid(entry, self.let_in.time)

    def subject(self, check: SealCheck) -> str:
        """Model, slot, and what the verdict rests on."""
        said = check.statement.predicate
        pins = Pinned(None, None, None)
        try:
            pins = pinned(self.policy, self.model)
        except SpecError as err:
            self._changed(err)
        text = require_identity(said, model=self.model, slot=self.slot, spec=None, data=None, baseline=None)
        try:
            return require_identity(
                said, model=self.model, slot=self.slot, spec=pins.spec, data=pins.data, baseline=pins.baseline
            )
        except IdentityMismatch as err:
            self._changed(err)
            return text

    def _changed(self, err: GateError) -> None:
        """Keep as a warning what refuses a verdict that is to be let in.

        Raises:
            GateError: The same, where it is to be let in.
        """
        if self.admission:
            raise err
        self.warnings.append(f"the policy has changed since it was let in: {err.message}")

    def verdict(self, check: SealCheck) -> str:
        """Every outcome recomputed; the checks and the evidence that the policy asks for."""
        needed = Evidence(self.needed.evidence)
        text = check.verdict(needed if self.admission else None)
        try:
            require_findings((each.check for each in check.metadata.verdict.findings), self.needed.findings)
        except VerificationError as err:
            self._changed(err)
        got = check.metadata.verdict.evidence
        if got.rank < needed.rank:
            self.warnings.append(
                f"the policy has changed since it was let in: it asks for evidence {needed.value}, this is {got.value}"
            )
        return text

    def freshness(self, check: SealCheck) -> str:
        """Not expired, not revoked, not older than what was let in."""
        said = check.statement.predicate
        if self.let_in is not None:
            require_unrevoked(check.verdict_sha256, self.history)
            return f"serial {said.serial}, let in on {self.let_in.time}, not revoked"
        return require_fresh(
            said,
            check.verdict_sha256,
            slot=self.slot,
            now=self.now,
            max_age_days=self.needed.max_age_days,
            accepted=self.history,
        )

    def votes(self, check: SealCheck) -> tuple[Vote, ...]:
        """Every approval in the bundle, with what speaks against it."""
        return tuple(self._vote(check, name) for name in check.approvals)

    def _vote(self, check: SealCheck, name: str) -> Vote:
        where = check.where(name)
        try:
            data = atomic.read_regular(check.bundle / name, limit_bytes=MAX_APPROVAL_BYTES, single_link=True)
            envelope = envelope_from_bytes(data, payload_type=IN_TOTO, where=where)
            if len(envelope.signatures) != 1:
                return Vote(name, against=f"{len(envelope.signatures)} keys signed it, one does")
            keyid = envelope.signatures[0].keyid
            key = self.policy.keys.get(keyid)
            if key is None:
                return Vote(name, against=f"key {keyid[:12]}… is not in the policy")
            entry = key.entry
            if verified(envelope, [key.public], where=where) != (keyid,):
                return Vote(name, against=f"the signature by key {entry.name} does not hold")
            if GATE in entry.roles:
                return Vote(name, against=f"key {entry.name} issues verdicts and cannot approve them")
            if (why := self.against(entry)) is not None and is_valid(entry, self.now) is not None:
                return Vote(name, against=f"key {entry.name} {why}")
            if entry.owner == self.signer.entry.owner:
                return Vote(name, against=f"{entry.owner} holds the key that signed the verdict, too")
            statement = statement_from_payload(envelope.payload, ApprovalStatement, where=where)
        except GateError as err:
            return Vote(name, against=err.message)
        said = statement.predicate
        against = ""
        if statement.subject[0].digest.sha256 != check.verdict_sha256:
            against = f"it is of another verdict, {statement.subject[0].digest.sha256[:12]}…"
        elif said.slot != self.slot:
            against = f"it is for slot {said.slot}"
        elif said.role not in entry.roles:
            against = f"key {entry.name} is not of role {said.role}"
        elif name != approval_path(keyid, said.slot):
            against = f"it was renamed; it is {approval_path(keyid, said.slot)}"
        elif (why := is_valid(entry, said.created)) is not None:
            against = f"key {entry.name} {why}, it says it was made on {said.created}"
        elif is_ahead(said.created, self.now):
            against = f"it says it was made on {said.created}"
        return Vote(name, key=entry.name, owner=entry.owner, role=said.role, against=against)


def _schema(asked: _Asked, check: SealCheck) -> str:
    text = check.schema()
    asked.signed_then(check)
    return text


def _digests(check: SealCheck) -> str:
    """Every file hashed; the engine, and the graph beside it, are what their names say."""
    text = check.digests()
    kinds = []
    for name in (check.engine, FALLBACK_PATH):
        if name in check.opened:
            stream = check.opened[name]
            stream.seek(0)
            try:
                kinds.append(require_engine(stream, name))
            except VerificationError as err:
                raise VerificationError(err.message, where=check.where(name), hint=err.hint) from err
    return f"{text}; {'; '.join(kinds)}"
