"""What is signed: the verdict over a bundle, an approval of it, an entry of the ledger, and the envelope around each. Pure.

The JSON Schemas `schemas/verdict.schema.json`, `approval.schema.json` and `ledger.schema.json` are made from the structs
here.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from gate.errors import VerificationError
from gate.manifest import Digests, Number, RelativePath, Sha256, Timestamp, canonical_json, strict_json

IN_TOTO = "application/vnd.in-toto+json"
"""Payload type of verdicts and approvals. Source: in-toto Attestation Framework, spec/v1/envelope.md."""
LEDGER_ENTRY = "application/vnd.trt-gate.ledger-entry+json"
LEDGER_HEAD = "application/vnd.trt-gate.ledger-head+json"
FIRST_PREVIOUS = "0" * 64
"""What the first entry of a ledger names as the one before it."""

SlotName = Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9][A-Za-z0-9_.-]*(?!\\n)$", max_length=60)]
"""Of a slot, a stage, a role or a key in a policy."""
KeyId = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$", max_length=64)]
"""SHA-256 of a public key's bytes: 32 of Ed25519, else DER SubjectPublicKeyInfo."""
Serial = Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)]
Text = Annotated[str, msgspec.Meta(max_length=2000)]
_Struct = TypeVar("_Struct", bound=msgspec.Struct)


class SubjectDigest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The digests of a subject; SHA-256 alone."""

    sha256: Sha256


class Size(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file's length."""

    size_bytes: Annotated[int, msgspec.Meta(ge=0)]


class Subject(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a bundle: its path in it, its digest, its length."""

    name: RelativePath
    digest: SubjectDigest
    annotations: Size


class StatedFinding(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A finding as the statement repeats it; `artifacts/metadata.json` holds it whole.

    Args:
        check: Its dotted name.
        estimate, lower, upper: The number and its interval.
        kind, limit: What is allowed.
        n: Samples.
        outcome: That follows.
        evidence: How it was obtained.
    """

    check: str
    estimate: Number
    lower: Number
    upper: Number
    kind: Literal["at_most", "at_least"]
    limit: float
    n: Annotated[int, msgspec.Meta(ge=1)]
    outcome: Literal["PASSED", "FAILED", "INCONCLUSIVE"]
    evidence: Literal["preflight", "host", "device"]


class StatedDevice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where it was checked: the fingerprint's name, GPU architecture and driver."""

    name: str
    compute_capability: str | None
    driver: str | None


class VerdictPredicate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The predicate of a verdict.

    Args:
        status: The verdict's. Only PASSED is sealed, and only PASSED verifies.
        evidence: The strongest evidence that it rests on.
        model_id, engine: What was judged; `model_id` as in the metadata, `detector@3a1f9c2`.
        slots: What it may be deployed as; none for a bundle that was sealed without a key.
        serial: Higher than that of each verdict before it, of the same model and slot.
        created: When the check ran.
        not_after: From when on it is worth nothing.
        metadata_sha256: Digest of `artifacts/metadata.json`, which holds the findings whole.
        engine_sha256: Digest of the engine's file.
        digests: What it rests on: reference, data set, spec, baseline.
        device: Where it was checked.
        findings: What was found.
        gate_version: Of this package.
    """

    status: Literal["PASSED", "FAILED", "INCONCLUSIVE"]
    evidence: Literal["preflight", "host", "device"]
    model_id: Annotated[str, msgspec.Meta(min_length=1, max_length=120)]
    engine: str
    slots: tuple[SlotName, ...]
    serial: Serial
    created: Timestamp
    not_after: Timestamp
    metadata_sha256: Sha256
    engine_sha256: Sha256
    digests: Digests
    device: StatedDevice
    findings: tuple[StatedFinding, ...]
    gate_version: str


class VerdictStatement(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    rename={"type": "_type", "predicate_type": "predicateType"},
):
    """An in-toto Statement v1 over every file of a bundle but the seals themselves.

    Source: in-toto Attestation Framework, spec/v1/statement.md.
    """

    type: Literal["https://in-toto.io/Statement/v1"] = "https://in-toto.io/Statement/v1"
    subject: Annotated[tuple[Subject, ...], msgspec.Meta(min_length=1)]
    predicate_type: Literal["urn:trt-gate:verdict:v1"] = "urn:trt-gate:verdict:v1"
    predicate: VerdictPredicate


class ApprovedVerdict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The subject of an approval: the payload of the verdict's envelope."""

    digest: SubjectDigest
    name: Literal["verdict"] = "verdict"


class ApprovalPredicate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The predicate of an approval.

    Args:
        role: As which the approver approves; the policy says which keys may.
        slot: For what.
        model_id, serial: Of the verdict, for those who read it.
        created: When.
        comment: Why, in the approver's words.
    """

    role: SlotName
    slot: SlotName
    model_id: str
    serial: Serial
    created: Timestamp
    comment: Text = ""


class ApprovalStatement(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    rename={"type": "_type", "predicate_type": "predicateType"},
):
    """An in-toto Statement v1 over one verdict."""

    type: Literal["https://in-toto.io/Statement/v1"] = "https://in-toto.io/Statement/v1"
    subject: Annotated[tuple[ApprovedVerdict, ...], msgspec.Meta(min_length=1, max_length=1)]
    predicate_type: Literal["urn:trt-gate:approval:v1"] = "urn:trt-gate:approval:v1"
    predicate: ApprovalPredicate


class CountedApproval(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An approval that counted: the key's name in the policy, and the role."""

    key: SlotName
    role: SlotName


class LedgerEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One line of the ledger.

    Args:
        index: From 0.
        previous: SHA-256 of the line before, its newline included; 64 zeros for the first.
        time: When; never before the entry before it.
        action: `promote` into a stage of a slot, `rollback` to an earlier verdict, or `revoke` of a verdict for good.
        model: Its name, without the digits of its weights.
        slot, stage: Where to, or for a rollback that drops a candidate, where it is taken from; empty for a revocation,
            which holds everywhere.
        full: Whether the stage was the last one of its slot then, which has all of the traffic. A promotion into it
            makes the verdict the current one; into another, the candidate beside the current one. A rollback with it
            makes an earlier verdict the current one again; without it, it drops the candidate. False for a revocation.
        verdict: SHA-256 of the payload of the verdict's envelope.
        serial, engine, engine_sha256: Of that verdict.
        bundle: Where it lay then.
        policy_sha256: Of the trust policy's file.
        approvals: Those that counted.
        requests: Served in the stage that it leaves, as the promoter says; None where nothing was said.
        reason: Why, in the promoter's words.
    """

    schema_version: Literal[1] = 1
    index: Annotated[int, msgspec.Meta(ge=0)]
    previous: Sha256
    time: Timestamp
    action: Literal["promote", "rollback", "revoke"]
    model: str
    slot: str
    stage: str
    full: bool
    verdict: Sha256
    serial: Serial
    engine: str
    engine_sha256: Sha256
    bundle: str
    policy_sha256: Sha256
    approvals: tuple[CountedApproval, ...]
    requests: Annotated[int, msgspec.Meta(ge=0)] | None
    reason: Text


class LedgerHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The last line of a ledger, signed beside it, so that lines cannot be cut off unseen.

    Args:
        entries: How many there are; 0 before the first is written.
        last: SHA-256 of the last line, its newline included; 64 zeros where there is none.
    """

    schema_version: Literal[1] = 1
    entries: Annotated[int, msgspec.Meta(ge=0)]
    last: Sha256


class Signed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One signature of an envelope; base64 in JSON."""

    keyid: KeyId
    sig: Annotated[str, msgspec.Meta(max_length=2000)]


class _Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"payload_type": "payloadType"}):
    payload: str
    payload_type: str
    signatures: tuple[Signed, ...]


class Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A DSSE envelope: bytes, what they are, and who signed them.

    Source: Dead Simple Signing Envelope, envelope.md and protocol.md (v1.0.2).

    Args:
        payload: What is signed.
        payload_type: What it is.
        signatures: By different keys; none for a bundle that was sealed without a key.
    """

    payload: bytes
    payload_type: str
    signatures: tuple[Signed, ...]

    def to_bytes(self) -> bytes:
        """Canonical JSON, which `envelope_from_bytes` reads and no other writing of it."""
        payload = base64.b64encode(self.payload).decode()
        return canonical_json(msgspec.to_builtins(_Envelope(payload, self.payload_type, self.signatures)))


def envelope_from_bytes(data: bytes, *, payload_type: str, where: str) -> Envelope:
    """Read an envelope: strict, canonical JSON, with a payload of one type.

    Raises:
        BundleError: It is not strict JSON.
        VerificationError: It is no envelope, its payload is of another type, a key signed twice, or it is not written
            as this package writes it.
    """
    raw = strict_json(data, where=where)
    try:
        read = msgspec.convert(raw, _Envelope)
        payload = base64.b64decode(read.payload, validate=True)
        for each in read.signatures:
            base64.b64decode(each.sig, validate=True)
    except (msgspec.ValidationError, binascii.Error, ValueError) as err:
        raise VerificationError(f"is no DSSE envelope: {err}", where=where) from err
    if read.payload_type != payload_type:
        raise VerificationError(f"its payload is {read.payload_type!r:.80}, not {payload_type!r}", where=where)
    if len({each.keyid for each in read.signatures}) != len(read.signatures):
        raise VerificationError("one key signed it twice", where=where)
    envelope = Envelope(payload, read.payload_type, read.signatures)
    if envelope.to_bytes() != data:
        raise VerificationError("is not written as sealing writes it", where=where)
    return envelope


def statement_from_payload(payload: bytes, kind: type[_Struct], *, where: str) -> _Struct:
    """Read a payload: strict, canonical JSON of one kind of statement, or of a ledger's entry or head.

    Raises:
        BundleError: It is not strict JSON.
        VerificationError: It is of another kind (`_type` and `predicateType` must be exact), or not canonical.
    """
    raw = strict_json(payload, where=where)
    try:
        found = msgspec.convert(raw, kind)
    except msgspec.ValidationError as err:
        raise VerificationError(f"does not hold a {_name(kind)}: {err}", where=where) from err
    if canonical_json(raw) != payload:
        raise VerificationError(f"its {_name(kind)} is not written as sealing writes it", where=where)
    return found


def payload_of(statement: msgspec.Struct) -> bytes:
    """The bytes of a statement that are signed."""
    return canonical_json(msgspec.to_builtins(statement))


def statement_schema(kind: type[msgspec.Struct], title: str, identifier: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) of a payload."""
    (_,), definitions = msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")
    definitions = {
        name: {**each, "description": each["description"].split("\n", 1)[0]} if "description" in each else each
        for name, each in definitions.items()
    }
    root = definitions.pop(kind.__name__)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": identifier,
        **root,
        "title": title,
        "$defs": definitions,
    }


def is_name(text: str) -> bool:
    """Whether it can be the name of a slot, a stage, a role or a key."""
    try:
        msgspec.convert(text, SlotName)
    except msgspec.ValidationError:
        return False
    return True


def model_name(model_id: str) -> str:
    """The model's name without the digits of its weights: `detector` of `detector@3a1f9c2`."""
    return model_id.rpartition("@")[0] or model_id


def _name(kind: type[msgspec.Struct]) -> str:
    return {
        "VerdictStatement": "verdict",
        "ApprovalStatement": "approval",
        "LedgerEntry": "ledger entry",
        "LedgerHead": "ledger head",
    }.get(kind.__name__, kind.__name__)
