"""The ledger: who promoted, rolled back and revoked what, one signed line each, chained by SHA-256.

A line is the canonical JSON of a DSSE envelope around a LedgerEntry. Beside `ledger.jsonl` lie `ledger.jsonl.head`, an
envelope around the number of lines and the digest of the last one, and `ledger.jsonl.lock`. All is signed by keys of
the role `promoter`.

A writer appends the line, flushes it, then replaces the head. Killed in between it leaves a last line without its
newline, which was never committed and which the next writer cuts off, or one whole line that the head does not know
yet, which is committed and which the next writer puts into the head. Before the first line of all a head of no lines is
written, so that lines without a head, and a head of more lines than there are, are always an error.

Lines keep counting after the key that signed them was revoked, because the chain dates them; the head does not: whoever
holds that key could sign an older state, and nothing would tell. So the head, and a line that it does not know yet, have
to be signed by a key that is not revoked *now*, and `sign_head` lets another promoter take over.
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from gate import atomic
from gate.errors import BundleError, GateError, LedgerError, PromotionRefused, SpecError
from gate.manifest import canonical_json, sha256_hex
from gate.release.history import History, history_from
from gate.release.policy import PROMOTER, TrustedKey, is_valid
from gate.release.statements import (
    FIRST_PREVIOUS,
    LEDGER_ENTRY,
    LEDGER_HEAD,
    Envelope,
    LedgerEntry,
    LedgerHead,
    Signed,
    payload_of,
)
from gate.signing import PublicKey, verified
from gate.trust import PolicyFile
from gate.utc import utc_now

MAX_LINE_BYTES = 64 * 1024
MAX_LEDGER_BYTES = 256 * 1024 * 1024
_ATTEMPTS = 20
"""To read while others write: what does not fit is read again as long as the head moves."""
_Struct = TypeVar("_Struct", bound=msgspec.Struct)


class Signs(Protocol):
    """What signs: gate.signing.KeySigner."""

    @property
    def public(self) -> PublicKey:
        """Its public key."""

    def sign(self, payload: bytes, payload_type: str) -> Envelope:
        """Sign bytes."""


@dataclass(frozen=True)
class Ledger:
    """A ledger that was verified from the first line to the last.

    Args:
        path: Its file.
        history: What its entries say.
        lines: SHA-256 of each line, its newline included.
        signers: The name of the key that signed each.
        notes: What a writer that was killed left, and that the head's key has run out.
        size_bytes: Of the lines.
        content: SHA-256 of both files as they were read.
        is_behind: Whether the head does not know the last line yet.
        head_signer: The name of the key that signed the head; None where there is no head.
    """

    path: Path
    history: History
    lines: tuple[str, ...]
    signers: tuple[str, ...]
    notes: tuple[str, ...]
    size_bytes: int
    content: str
    is_behind: bool
    head_signer: str | None

    @property
    def head(self) -> str:
        """What the next entry names as the one before it: SHA-256 of the last line, or 64 zeros."""
        return self.lines[-1] if self.lines else FIRST_PREVIOUS

    def require_line(self, digest: str) -> int:
        """The index of the line with a digest that was kept elsewhere.

        Raises:
            LedgerError: There is none, so the ledger was put back to an older state, or is another one.
        """
        if digest not in self.lines:
            raise LedgerError(
                f"none of its {len(self.lines)} lines has the SHA-256 {digest}: it was put back to an older state, "
                "or is another ledger",
                where=str(self.path),
                hint="look for a copy that has the line; promote nothing before it is found",
            )
        return self.lines.index(digest)


def head_path(path: Path) -> Path:
    """The file beside a ledger that holds the signed digest of its last line."""
    return path.with_name(f"{path.name}.head")


def lock_path(path: Path) -> Path:
    """The file beside a ledger on which writers hold their lock."""
    return path.with_name(f"{path.name}.lock")


def read_ledger(path: Path, policy: PolicyFile, *, now: str | None = None) -> Ledger:
    """Read a ledger and verify every byte of it: signatures, chain, order of time, and what each entry may do.

    No ledger and no head are an empty history.

    Args:
        path: Its file.
        policy: Whose keys of the role `promoter` count. One that was revoked or ran out counts for the entries
            before that. A head by a key that was revoked is refused; by one that ran out it is noted.
        now: The time; None: the system's clock.

    Raises:
        LedgerError: It is not what was signed; names the line and the cause.
    """
    return _read(path, policy, now=utc_now() if now is None else now)


def _read(path: Path, policy: PolicyFile, *, now: str, is_taken_over: bool = False) -> Ledger:
    """Read it whole; `is_taken_over` leaves out whether the key of the head was revoked."""
    attempt = 0
    while True:
        attempt += 1
        # The head comes first: lines are only ever added, so what was in the head is in the lines.
        head = _read_head(path)
        reading = _Reading(path, policy, now, is_taken_over)
        try:
            found = reading.ledger(_scan(path, reading.take), head)
        except LedgerError:
            if attempt < _ATTEMPTS and _read_head(path) != head:
                continue
            raise
        if not found.notes or attempt == _ATTEMPTS or _read_head(path) == head:
            return found


def append(
    path: Path,
    policy: PolicyFile,
    expected: Ledger,
    make: Callable[[int, str], LedgerEntry],
    signer: Signs,
    *,
    now: str | None = None,
) -> Ledger:
    """Append one entry, under a lock, unless somebody else was first.

    Args:
        path: The ledger's file; made where it is missing, with its folder.
        policy: As in `read_ledger`.
        expected: What the entry was decided on.
        make: The entry, from its index and the digest of the line before it.
        signer: A key of the role `promoter`.
        now: As in `read_ledger`.

    Returns:
        The ledger with it.

    Raises:
        PromotionRefused: The ledger moved on since `expected` was read, the clock is behind its last entry, or the
            signer may not.
        LedgerError: The ledger is not what was signed, or the entry is not one that may follow.
        GateError: The disk is full, read-only or failing.
    """
    with ExitStack() as stack:
        _lock(stack, path)
        fresh = _again(path, policy, expected, now=now)
        _require_unmoved(fresh, expected)
        index = len(fresh.lines)
        entry = make(index, fresh.head)
        _require_no_earlier(fresh, entry.time)
        name = _require_may_sign(policy, signer, entry.time)
        line = signer.sign(payload_of(entry), LEDGER_ENTRY).to_bytes()
        if len(line) > MAX_LINE_BYTES:
            raise LedgerError(f"the entry is {len(line)} bytes long, the limit is {MAX_LINE_BYTES}", where=str(path))
        if fresh.size_bytes + len(line) > MAX_LEDGER_BYTES:
            raise LedgerError(f"would be longer than {MAX_LEDGER_BYTES} bytes", where=str(path))
        written, _ = _entry_of(line, policy, f"{path}:{index + 1}")
        lines = (*fresh.lines, sha256_hex(line))
        history = history_from((*fresh.history.entries, written), lines, where=str(path))
        head = _signed_head(signer, lines)
        _write(fresh, line, head, signer)
    return Ledger(
        path=path,
        history=history,
        lines=lines,
        signers=(*fresh.signers, name),
        notes=(),
        size_bytes=fresh.size_bytes + len(line),
        content="",
        is_behind=False,
        head_signer=name,
    )


def sign_head(
    path: Path,
    policy: PolicyFile,
    signer: Signs,
    *,
    show: Callable[[Ledger], None] | None = None,
    now: str | None = None,
) -> Ledger:
    """Sign the head anew, with what it says and with a line that it does not know yet, under a lock.

    It is for the day on which the key that signed it is revoked or runs out. All else is verified as ever.

    Args:
        path: The ledger's file.
        policy: As in `read_ledger`.
        signer: A key of the role `promoter` that counts now.
        show: Given what is about to be signed; where it raises, nothing is.
        now: As in `read_ledger`.

    Returns:
        The ledger, as it was read.

    Raises:
        PromotionRefused: There is nothing to sign, the clock is behind the last entry, or the signer may not.
        LedgerError: The ledger is not what was signed, or cannot be written.
    """
    at = utc_now() if now is None else now
    name = _require_may_sign(policy, signer, at)
    with ExitStack() as stack:
        _lock(stack, path)
        found = _read(path, policy, now=at, is_taken_over=True)
        if found.head_signer is None:
            raise PromotionRefused("there is no ledger yet, so nothing is to be signed", where=str(path))
        _require_no_earlier(found, at)
        if show is not None:
            show(found)
        try:
            atomic.write_bytes(head_path(path), _signed_head(signer, found.lines))
        except GateError as err:
            raise LedgerError(err.message, where=str(head_path(path)), hint=err.hint) from err
    return replace(found, head_signer=name, is_behind=False, content="")


def _require_no_earlier(ledger: Ledger, time: str) -> None:
    """The clock is not behind the last entry.

    Raises:
        PromotionRefused: It is.
    """
    last = ledger.history.entries[-1] if ledger.lines else None
    if last is not None and time < last.time:
        raise PromotionRefused(
            f"the clock here says {time}, and the last entry of the ledger is of {last.time}",
            where=str(ledger.path),
            hint="set the clock of this machine, or of the one that wrote that entry; time does not go back",
        )


@dataclass(frozen=True)
class _Raw:
    """What a ledger's file is: the length of its whole lines, of what follows the last newline, and the digest of all.

    `is_there` tells an empty file from none.
    """

    size_bytes: int
    torn_bytes: int
    digest: str
    is_there: bool


def _scan(path: Path, take: Callable[[bytes, int], None]) -> _Raw:
    """Give each whole line and its number to `take`; no more than one line is held.

    Raises:
        LedgerError: It is no regular file with one name, or too long.
    """
    if not os.path.lexists(path):
        return _Raw(0, 0, "none", is_there=False)
    size_bytes, torn_bytes, number, digest = 0, 0, 0, sha256()
    try:
        with atomic.open_regular(path, single_link=True) as stream:
            while line := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES or size_bytes + len(line) > MAX_LEDGER_BYTES:
                    raise LedgerError(
                        f"is too long: the limits are {MAX_LINE_BYTES} bytes a line and {MAX_LEDGER_BYTES} in all",
                        where=f"{path}:{number}",
                    )
                digest.update(line)
                if line.endswith(b"\n"):
                    size_bytes += len(line)
                    take(line, number)
                else:
                    torn_bytes = len(line)
    except BundleError as err:
        raise LedgerError(err.message, where=str(path)) from err
    except OSError as err:
        raise LedgerError(f"cannot be read: {err.strerror}", where=str(path)) from err
    return _Raw(size_bytes, torn_bytes, digest.hexdigest(), is_there=True)


def _read_head(path: Path) -> bytes | None:
    head = head_path(path)
    if not os.path.lexists(head):
        return None
    try:
        return atomic.read_regular(head, limit_bytes=MAX_LINE_BYTES, single_link=True)
    except BundleError as err:
        raise LedgerError(err.message, where=str(head)) from err
    except OSError as err:
        raise LedgerError(f"cannot be read: {err.strerror}", where=str(head)) from err


@dataclass
class _Reading:
    """A ledger while its lines come in."""

    path: Path
    policy: PolicyFile
    now: str
    is_taken_over: bool
    entries: list[LedgerEntry] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    signers: list[str] = field(default_factory=list)
    last_key: TrustedKey | None = None

    def take(self, line: bytes, number: int) -> None:
        """Verify a line by itself."""
        entry, self.last_key = _entry_of(line, self.policy, f"{self.path}:{number}")
        self.entries.append(entry)
        self.digests.append(sha256_hex(line))
        self.signers.append(self.last_key.name)

    def ledger(self, raw: _Raw, head: bytes | None) -> Ledger:
        """Verify what the lines come to, and that they are all there."""
        beside, found = head_path(self.path).name, len(self.entries)
        history = history_from(self.entries, self.digests, where=str(self.path))
        notes: list[str] = []
        is_behind, key = False, None
        if head is None:
            if found or raw.torn_bytes:
                raise LedgerError(
                    f"{beside}, which says how many lines it has, is missing",
                    where=str(self.path),
                    hint="put it back from where the ledger is kept; without it lines could be cut off unseen",
                )
        else:
            known, key = _head_of(head, self.policy, self.path)
            if not raw.is_there and known.entries:
                raise LedgerError(
                    f"is missing, and {beside} says that it has {known.entries} lines", where=str(self.path)
                )
            is_behind = self._require_head_fits(known, key, is_torn=raw.torn_bytes > 0)
            notes.extend(self._require_not_revoked(key, is_behind=is_behind))
            if found == 0:
                notes.append("its first entry was begun and never committed: whoever wrote it was stopped")
        if is_behind:
            notes.append(
                f"line {found} is whole, and {beside} does not know it yet: whoever wrote it was stopped; it counts, "
                "and the next entry mends the head"
            )
        if raw.torn_bytes and found:
            notes.append(
                f"line {found + 1} is torn ({raw.torn_bytes} bytes without their newline): whoever wrote it was "
                "stopped, it was never committed; the next entry cuts it off"
            )
        return Ledger(
            path=self.path,
            history=history,
            lines=tuple(self.digests),
            signers=tuple(self.signers),
            notes=tuple(notes),
            size_bytes=raw.size_bytes,
            content=_content(raw, head),
            is_behind=is_behind,
            head_signer=None if key is None else key.name,
        )

    def _require_head_fits(self, head: LedgerHead, key: TrustedKey, *, is_torn: bool) -> bool:
        """Hold the head against the lines; whether it is one line behind."""
        found, where = len(self.entries), str(head_path(self.path))
        if head.entries > found:
            raise LedgerError(
                f"has {found} whole lines, and its head says {head.entries}: lines were cut off at the end",
                where=str(self.path),
                hint="put the ledger back from where it is kept",
            )
        if head.entries < found - 1 or (head.entries < found and is_torn):
            raise LedgerError(
                f"says {head.entries} lines, and there are {found}: it is of an older ledger, or lines were added",
                where=where,
            )
        if head.entries == 0:
            if head.last != FIRST_PREVIOUS:
                raise LedgerError(f"says 0 lines, and that the last one is {head.last[:12]}", where=where)
            return found > 0
        if self.digests[head.entries - 1] != head.last:
            raise LedgerError(
                f"says that line {head.entries} is {head.last[:12]}, and it is {self.digests[head.entries - 1][:12]}",
                where=where,
            )
        time = self.entries[head.entries - 1].time
        if not _can_follow(key, time):
            raise LedgerError(
                f"is signed by {key.name}, whose key was no longer valid when the last entry was written, {time}",
                where=where,
            )
        return head.entries < found

    def _require_not_revoked(self, key: TrustedKey, *, is_behind: bool) -> list[str]:
        """What is signed last, and so dated by nothing that comes after it, is not signed by a key that was revoked.

        A key that has run out is noted and no more: its day is known long before, nobody says that it was stolen, and
        refusing it would stop every load at midnight, which is worse than what it would stop. Revoked is what a key is
        set to when somebody else may hold it.
        """
        command = f"gate ledger sign --policy {self.policy.path} --key KEY"
        last = [(key, str(head_path(self.path)), "its head")]
        if is_behind and self.last_key is not None:
            number = len(self.entries)
            last.append((self.last_key, f"{self.path}:{number}", f"line {number}, which the head does not know yet,"))
        notes = []
        for each, where, what in last:
            if each.revoked is not None and self.now >= each.revoked:
                if not self.is_taken_over:
                    raise LedgerError(
                        f"{what} is signed by {each.name}, whose key {is_valid(each, self.now)}: whoever holds it could "
                        "have put the ledger back to an older state and signed that",
                        where=where,
                        hint=f"a promoter whose key counts looks at it and takes it over: {command}",
                    )
            elif each.valid_until is not None and self.now >= each.valid_until:
                notes.append(
                    f"{what} is signed by {each.name}, whose key {is_valid(each, self.now)}; the next entry, or "
                    f"{command}, signs the head anew"
                )
        return notes


def _content(raw: _Raw, head: bytes | None) -> str:
    return sha256_hex(f"{raw.digest} {'none' if head is None else sha256_hex(head)}".encode())


def _entry_of(line: bytes, policy: PolicyFile, where: str) -> tuple[LedgerEntry, TrustedKey]:
    """The entry of a line, and the key that signed it.

    Raises:
        LedgerError: It is not exactly what a promoter signed.
    """
    envelope = _envelope_of(line, LEDGER_ENTRY, where)
    entry = _decoded(envelope.payload, LedgerEntry, where, "its entry")
    key = _signer_of(envelope, policy, where)
    if (why := is_valid(key, entry.time)) is not None:
        raise LedgerError(
            f"is signed by {key.name}, and at the entry's time, {entry.time}, that key {why}", where=where
        )
    return entry, key


def _head_of(data: bytes, policy: PolicyFile, path: Path) -> tuple[LedgerHead, TrustedKey]:
    where = str(head_path(path))
    envelope = _envelope_of(data, LEDGER_HEAD, where)
    return _decoded(envelope.payload, LedgerHead, where, "its content"), _signer_of(envelope, policy, where)


class _Written(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"payload_type": "payloadType"}):
    """An envelope as it stands in a file."""

    payload: str
    payload_type: str
    signatures: tuple[Signed, ...]


_DECODERS: dict[type[msgspec.Struct], msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(kind) for kind in (_Written, LedgerEntry, LedgerHead)
}
_ENCODER = msgspec.json.Encoder(order="sorted")


def _decoded(data: bytes, kind: type[_Struct], where: str, what: str) -> _Struct:
    """Read canonical JSON of one kind: whatever else would mean the same is refused by writing it again.

    Raises:
        LedgerError: It is not that.
    """
    try:
        found: _Struct = _DECODERS[kind].decode(data)
        is_canonical = _ENCODER.encode(found) + b"\n" == data or canonical_json(msgspec.to_builtins(found)) == data
    except (msgspec.DecodeError, UnicodeError, RecursionError, BundleError) as err:
        raise LedgerError(f"{what} is not what a ledger holds: {err}", where=where) from err
    if not is_canonical:
        raise LedgerError(f"{what} is not written as this package writes it: it was edited", where=where)
    return found


def _envelope_of(data: bytes, payload_type: str, where: str) -> Envelope:
    written = _decoded(data, _Written, where, "its envelope")
    if written.payload_type != payload_type:
        raise LedgerError(f"its payload is {written.payload_type!r:.80}, not {payload_type!r}", where=where)
    try:
        payload = base64.b64decode(written.payload, validate=True)
        for each in written.signatures:
            base64.b64decode(each.sig, validate=True)
    except (binascii.Error, ValueError) as err:
        raise LedgerError(f"is not base64: {err}", where=where) from err
    if base64.b64encode(payload).decode() != written.payload:
        raise LedgerError("its payload is not written as this package writes it: it was edited", where=where)
    return Envelope(payload, written.payload_type, written.signatures)


def _signer_of(envelope: Envelope, policy: PolicyFile, where: str) -> TrustedKey:
    """The one promoter whose signature the envelope has, and holds.

    Raises:
        LedgerError: It has none or several, or one of somebody else.
    """
    if len(envelope.signatures) != 1:
        raise LedgerError(f"has {len(envelope.signatures)} signatures, has to have 1", where=where)
    keyid = envelope.signatures[0].keyid
    trusted = policy.keys.get(keyid)
    if trusted is None:
        raise LedgerError(
            f"is signed by the key {keyid[:16]}, which the policy {policy.path} does not have",
            where=where,
            hint="a key that is no longer used stays in the policy, with valid_until or revoked",
        )
    if PROMOTER not in trusted.entry.roles:
        raise LedgerError(
            f"is signed by {trusted.entry.name}, who is {', '.join(trusted.entry.roles)}, not {PROMOTER}", where=where
        )
    try:
        signed = verified(envelope, (trusted.public,), where=where)
    except GateError as err:
        raise LedgerError(f"the signature does not hold: {err.message}", where=where) from err
    if signed != (trusted.public.keyid,):
        raise LedgerError(f"the signature by {trusted.entry.name} does not hold", where=where)
    return trusted.entry


def _can_follow(key: TrustedKey, time: str) -> bool:
    """Whether a key was valid at some time from `time` on: a head is signed then, not before."""
    start = max(time, key.valid_from or time)
    return all(end is None or start < end for end in (key.valid_until, key.revoked))


def _require_may_sign(policy: PolicyFile, signer: Signs, time: str) -> str:
    """The name of the signer in the policy.

    Raises:
        PromotionRefused: It is not there, no promoter, or not valid.
    """
    trusted = policy.keys.get(signer.public.keyid)
    if trusted is None:
        raise PromotionRefused(
            f"does not have the key {signer.public.keyid[:16]}, so it cannot sign the ledger",
            where=str(policy.path),
            hint=f'sign with a key whose roles have "{PROMOTER}"',
        )
    key = trusted.entry
    if PROMOTER not in key.roles:
        raise PromotionRefused(
            f"{key.name} is {', '.join(key.roles)}; the ledger is signed by {PROMOTER}", where=str(policy.path)
        )
    if (why := is_valid(key, time)) is not None:
        raise PromotionRefused(f"the key {key.name} {why}; now is {time}", where=str(policy.path))
    return key.name


def _again(path: Path, policy: PolicyFile, expected: Ledger, *, now: str | None) -> Ledger:
    """The ledger as it is now; what is byte for byte as it was is not verified a second time."""
    is_same = (
        expected.path == path
        and expected.content != ""
        and _content(_scan(path, lambda *_: None), _read_head(path)) == expected.content
    )
    return expected if is_same else read_ledger(path, policy, now=now)


def _require_unmoved(fresh: Ledger, expected: Ledger) -> None:
    seen = len(expected.lines)
    if fresh.lines == expected.lines:
        return
    if fresh.lines[:seen] != expected.lines:
        raise LedgerError("was replaced by another ledger while it was read", where=str(fresh.path))
    first = fresh.history.entries[seen]
    to = f" {first.stage} of {first.model} / {first.slot}" if first.slot else f" of {first.model}"
    raise PromotionRefused(
        f"somebody else was first: {fresh.signers[seen]} wrote entry {first.index} at {first.time}: "
        f"{first.action} serial {first.serial}{to}",
        where=str(fresh.path),
        hint="look at it (gate ledger show), then run again",
    )


def _signed_head(signer: Signs, lines: tuple[str, ...]) -> bytes:
    return signer.sign(
        payload_of(LedgerHead(entries=len(lines), last=lines[-1] if lines else FIRST_PREVIOUS)), LEDGER_HEAD
    ).to_bytes()


def _write(fresh: Ledger, line: bytes, head: bytes, signer: Signs) -> None:
    path = fresh.path
    try:
        file = os.open(
            path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666
        )
    except OSError as err:
        raise LedgerError(f"cannot be written: {err.strerror}", where=str(path)) from err
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise LedgerError("is not a regular file with one name", where=str(path))
        if fresh.is_behind:
            atomic.write_bytes(head_path(path), _signed_head(signer, fresh.lines))
        os.ftruncate(file, fresh.size_bytes)
        if not fresh.lines:
            os.fsync(file)
            atomic.write_bytes(head_path(path), _signed_head(signer, ()))
        _append(file, line, fresh.size_bytes)
    except LedgerError:
        raise
    except GateError as err:
        raise LedgerError(err.message, where=str(head_path(path)), hint=err.hint) from err
    except OSError as err:
        raise LedgerError(f"cannot be written: {err.strerror}; nothing was added", where=str(path)) from err
    finally:
        os.close(file)
    try:
        atomic.write_bytes(head_path(path), head)
    except GateError as err:
        raise LedgerError(
            f"the entry is in the ledger, and its head cannot be written: {err.message}",
            where=str(head_path(path)),
            hint="mend that; the entry counts, and the next one mends the head",
        ) from err


def _lock(stack: ExitStack, path: Path) -> None:
    where = lock_path(path)
    try:
        stack.enter_context(atomic.locked(where))
    except GateError as err:
        raise LedgerError(err.message, where=str(where), hint=err.hint) from err
    except OSError as err:
        raise LedgerError(f"cannot be locked: {err.strerror}", where=str(where)) from err


def _append(file: int, line: bytes, size_bytes: int) -> None:
    """Write a line and flush it; where the disk is full, what was written of it is cut off again."""
    try:
        view = memoryview(line)
        while view:
            view = view[os.write(file, view) :]
        os.fsync(file)
    except OSError:
        os.ftruncate(file, size_bytes)
        raise


def require_digest(text: str) -> str:
    """A SHA-256 as somebody typed it.

    Raises:
        SpecError: It is not 64 hex digits.
    """
    digest = text.strip().lower()
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise SpecError(f"{text!r:.80} is no SHA-256", hint="give all 64 hex digits, as gate promote prints them")
    return digest
