"""The trust policy: whose signatures count, for what, and what a bundle needs to enter a stage of a slot. Pure.

schema = 1
ledger = "ledger.jsonl"                     # beside this file

[[key]]
name   = "gate-ci"
owner  = "CI of the detector team"
roles  = ["gate"]                           # issues verdicts, and nothing else
public = "ed25519:9f2c..."                  # as `gate key show` prints it
valid_until = 2027-01-01

[model.detector]
spec     = ["../gate.toml"]                 # a file beside this one, or its SHA-256; or "any"
data     = "any"
baseline = ["../baselines/detector/trt-fp16/h200.json"]

[slot.production]
evidence     = "device"
findings     = ["parity", "latency.p99_ms"]
approvals    = { release = 2 }
max_age_days = 30
  [[slot.production.stage]]
  name      = "shadow"
  min_hours = 24
  [[slot.production.stage]]
  name            = "canary-5"
  traffic_percent = 5
  min_requests    = 100000
  [[slot.production.stage]]
  name      = "full"
"""

from __future__ import annotations

import datetime as dt
import inspect
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import msgspec

from gate.errors import SpecError
from gate.manifest import Timestamp
from gate.release.statements import SlotName, statement_schema
from gate.toml_errors import KeyPath, conversion_error, did_you_mean, line_of, shown, tables_from_text

GATE = "gate"
"""The role that issues verdicts. A key that has it has no other."""
PROMOTER = "promoter"
"""The role that signs the ledger."""

ModelName = Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._-]*(?!\\n)$", max_length=100)]
"""As [model] id in a spec."""
Moment = Timestamp
"""A TOML date (midnight, UTC) or a date and time with its offset, in UTC once it is read: `2026-11-21T10:00:00Z`."""
Days = Annotated[float, msgspec.Meta(gt=0, le=36500)]
Hours = Annotated[float, msgspec.Meta(gt=0, le=876000)]
Requests = Annotated[int, msgspec.Meta(ge=1, le=2**53 - 1)]
Share = Annotated[float, msgspec.Meta(gt=0, le=100)]
Threshold = Annotated[int, msgspec.Meta(ge=1, le=100)]
Pins = Literal["any"] | tuple[Annotated[str, msgspec.Meta(min_length=1, max_length=1000)], ...]
SCHEMA_ID = "urn:trt-gate:schema:trust:1"
_MOMENTS = ("valid_from", "valid_until", "revoked")
EvidenceName = Literal["preflight", "host", "device"]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the policy."""


class TrustedKey(_Table, frozen=True):
    """A public key and what it may sign.

    Args:
        name: By which the ledger and messages call it.
        owner: Who holds the private key.
        roles: `gate` issues verdicts and cannot be joined with another; `promoter` signs the ledger; any other name is a
            role of approvers.
        public: `ed25519:` and 64 hex digits, or a PEM public key (ECDSA P-256 or P-384, RSA) for a key in a token or a
            cloud KMS.
        valid_from, valid_until: When its signatures count, as a date (its midnight, UTC) or a date and time with its
            offset. `valid_until` itself is out.
        revoked: From when on nobody believes it; what it signed then counts for nothing, whenever it says it was signed,
            but for entries that the ledger had before.
        reason: Of the revocation.
    """

    name: SlotName
    owner: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    roles: Annotated[tuple[SlotName, ...], msgspec.Meta(min_length=1)]
    public: str
    valid_from: Moment | None = None
    valid_until: Moment | None = None
    revoked: Moment | None = None
    reason: str = ""


class ModelPins(_Table, frozen=True):
    """What a verdict on a model must rest on: SHA-256 digests, or files beside the policy (spec and baseline alone).

    `"any"` where anything will do: it has to be said.

    Args:
        spec: The `gate.toml` that it was judged by.
        data: The data set's digest, as `gate inspect BUNDLE` prints it.
        baseline: The baseline that it was judged by. An empty list: none.
    """

    spec: Pins
    data: Pins
    baseline: Pins


class StagePolicy(_Table, frozen=True):
    """One stage of a slot, in the order in which they are passed; the last one is all of the traffic.

    What is left out is the slot's.

    Args:
        name: Such as `shadow`, `canary-5`, `full`.
        traffic_percent: Of the requests that it serves, for those who read the ledger.
        evidence, findings, approvals, max_age_days: What it takes to enter, as of the slot, in place of the slot's.
        min_hours: How long it has to be here before it may go on.
        min_requests: How many requests it has to serve here before it may go on, as the promoter says.
    """

    name: SlotName
    traffic_percent: Share | None = None
    evidence: EvidenceName | None = None
    findings: tuple[str, ...] | None = None
    approvals: dict[SlotName, Threshold] | None = None
    max_age_days: Days | None = None
    min_hours: Hours | None = None
    min_requests: Requests | None = None


class SlotPolicy(_Table, frozen=True):
    """What a bundle needs to be deployed as this.

    Args:
        evidence: The least evidence that its verdict rests on.
        findings: Checks that it must have passed: a check, or a group such as `parity`.
        approvals: How many different keys of each role must approve its verdict.
        max_age_days: How old its check may be.
        stage: In order; left out: `full` alone.
        load: What `gate.load` takes: what the ledger says is in the slot (`promoted`), or all that would be let in
            (`approved`).
        fallback: What may be loaded where the engine does not fit this machine, in this order.
    """

    evidence: EvidenceName = "device"
    findings: tuple[str, ...] = ()
    approvals: dict[SlotName, Threshold] = {}
    max_age_days: Days | None = None
    stage: tuple[StagePolicy, ...] = (StagePolicy(name="full"),)
    load: Literal["promoted", "approved"] = "promoted"
    fallback: tuple[Literal["onnx", "pytorch"], ...] = ()


class TrustPolicy(_Table, frozen=True):
    """A whole trust policy.

    Args:
        schema: Of this format: 1.
        ledger: Its file, beside the policy; left out: none is kept, and nothing can be promoted.
        key: Whose signatures count.
        model: What a verdict on each model must rest on; a model that is not here is refused.
        slot: What can be deployed.
    """

    schema: Literal[1]
    key: Annotated[tuple[TrustedKey, ...], msgspec.Meta(min_length=1)]
    model: Annotated[dict[ModelName, ModelPins], msgspec.Meta(min_length=1)]
    slot: Annotated[dict[SlotName, SlotPolicy], msgspec.Meta(min_length=1)]
    ledger: str | None = None


class Requirements(msgspec.Struct, frozen=True, kw_only=True):
    """What it takes to enter one stage of a slot, once the stage's own values stand in place of the slot's.

    Args:
        slot, stage: Which.
        evidence: The least evidence that the verdict rests on.
        findings: Checks, or groups of them, that it must have passed.
        approvals: How many different keys of each role must approve the verdict.
        max_age_days: How old its check may be; None: until the verdict says that it ends.
        previous: The stage that it must have been in before; None: this is the first.
        min_hours, min_requests: How long it has to have been in `previous`, and with how many requests; None: no matter.
    """

    slot: str
    stage: str
    evidence: EvidenceName
    findings: tuple[str, ...]
    approvals: dict[str, int]
    max_age_days: float | None
    previous: str | None
    min_hours: float | None
    min_requests: int | None


def policy_from_text(text: str, *, path: Path) -> TrustPolicy:
    """Read a trust policy and check that it can be meant.

    Args:
        text: Of the file.
        path: Of the file, which names it in errors; nothing is opened.

    Raises:
        SpecError: It is not TOML, has an unknown or missing key or a value of the wrong type, or contradicts itself;
            with file and line.
    """
    raw = tables_from_text(text, path=path)
    if not raw:
        raise SpecError("is empty: a trust policy begins with schema = 1", where=str(path))
    raw = _with_moments(raw, text=text, path=path)
    try:
        policy = msgspec.convert(raw, TrustPolicy)
    except msgspec.ValidationError as err:
        raise conversion_error(err, kind=TrustPolicy, raw=raw, text=text, path=path, whole="the policy") from err
    for key, message in _contradictions(policy, path.name):
        raise SpecError(message, where=f"{path}:{line_of(text, key)}")
    return policy


def requirements(policy: TrustPolicy, slot: str, stage: str) -> Requirements:
    """What it takes to enter a stage of a slot: what the stage says, else what the slot says.

    Raises:
        SpecError: The policy has no such slot, or the slot no such stage; names those there are.
    """
    if slot not in policy.slot:
        raise SpecError(_there_is_no("slot", slot, list(policy.slot)))
    asked = policy.slot[slot]
    names = [each.name for each in asked.stage]
    if stage not in names:
        raise SpecError(f"slot {slot!r}: {_there_is_no('stage', stage, names)}")
    index = names.index(stage)
    own = asked.stage[index]
    previous = asked.stage[index - 1] if index > 0 else None
    return Requirements(
        slot=slot,
        stage=stage,
        evidence=asked.evidence if own.evidence is None else own.evidence,
        findings=asked.findings if own.findings is None else own.findings,
        approvals=dict(asked.approvals if own.approvals is None else own.approvals),
        max_age_days=asked.max_age_days if own.max_age_days is None else own.max_age_days,
        previous=None if previous is None else previous.name,
        min_hours=None if previous is None else previous.min_hours,
        min_requests=None if previous is None else previous.min_requests,
    )


def is_valid(entry: TrustedKey, at: str) -> str | None:
    """None if a key counts at a time, else why it does not, such as `expired on 2026-10-01`.

    From its revocation on it counts for nothing. So whoever judges a statement asks twice: for now, and for when the
    statement says that it was made.

    Args:
        entry: The key.
        at: A Timestamp; a key does not count at what is none.
    """
    if moment_from_text(at) is None:
        return f"cannot be judged at {shown(at)}, which is no time such as 2026-11-21T10:00:00Z"
    if entry.revoked is not None and at >= entry.revoked:
        return f"was revoked on {_day(entry.revoked)}" + (f": {entry.reason}" if entry.reason else "")
    if entry.valid_from is not None and at < entry.valid_from:
        return f"is valid from {_day(entry.valid_from)} on"
    if entry.valid_until is not None and at >= entry.valid_until:
        return f"expired on {_day(entry.valid_until)}"
    return None


def moment_from_text(at: str) -> dt.datetime | None:
    """The time of a Timestamp, in UTC; None where the text is none, such as one of the 31st of February."""
    if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", at) is None:
        return None
    try:
        return dt.datetime.fromisoformat(f"{at[:-1]}+00:00")
    except ValueError:
        return None


def is_digest(pin: str) -> bool:
    """Whether a pin is a digest itself; else it is the path of a file."""
    return re.fullmatch(r"[0-9a-f]{64}", pin) is not None


def policy_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a trust policy, for editors and for people who look up a key."""
    found: dict[str, Any] = _without_null(statement_schema(TrustPolicy, "trust.toml", SCHEMA_ID))
    structs = {each.__name__: each for each in (TrustPolicy, TrustedKey, ModelPins, SlotPolicy, StagePolicy)}
    for name, struct in structs.items():
        properties = (found if name == "TrustPolicy" else found["$defs"][name])["properties"]
        for key, description in _documented(struct).items():
            properties[key]["description"] = description
    for key in _MOMENTS:
        properties = found["$defs"]["TrustedKey"]["properties"]
        described = {"description": text} if (text := properties[key].get("description")) else {}
        properties[key] = {"type": "string", "anyOf": [{"format": "date"}, {"format": "date-time"}], **described}
    found["$defs"]["SlotPolicy"]["properties"]["stage"]["minItems"] = 1
    return found


def _there_is_no(what: str, name: str, names: list[str]) -> str:
    near = did_you_mean(name, names)
    return f"there is no {what} {shown(name)}{near}" + ("" if "it takes" in near else f" (it has {', '.join(names)})")


def _day(at: str) -> str:
    """A Timestamp in a message: the day alone where it is its midnight."""
    return at.removesuffix("T00:00:00Z")


def _with_moments(raw: dict[str, Any], *, text: str, path: Path) -> dict[str, Any]:
    """The raw tables with each date of a key as a Timestamp.

    Raises:
        SpecError: One is text, has no offset, or is no moment that can be written in UTC.
    """
    keys = raw.get("key")
    if not isinstance(keys, list):
        return raw
    changed: list[Any] = []
    for index, each in enumerate(keys):
        if not isinstance(each, dict):
            changed.append(each)
            continue
        moments: dict[str, str] = {}
        for name in _MOMENTS:
            if name in each:
                try:
                    moments[name] = _moment(each[name])
                except ValueError as err:
                    where = f"{path}:{line_of(text, ('key', index, name))}"
                    raise SpecError(f"[[key]] {name}: {err}", where=where) from None
        changed.append({**each, **moments})
    return {**raw, "key": changed}


def _moment(value: object) -> str:
    """A TOML date or date and time as a Timestamp.

    Raises:
        ValueError: With what is wrong.
    """
    if isinstance(value, dt.datetime):
        if value.tzinfo is None:
            raise ValueError(f"{value.isoformat()} has no offset from UTC; write {value.isoformat()}Z if it is in UTC")
        if value.microsecond:
            raise ValueError(f"takes whole seconds, got {value.isoformat()}")
        try:
            value = value.astimezone(dt.timezone.utc)
        except OverflowError:
            raise ValueError(f"{value.isoformat()} is not between the years 1 and 9999 in UTC") from None
        return f"{value.replace(tzinfo=None).isoformat(timespec='seconds')}Z"
    if isinstance(value, dt.date):
        return f"{value.isoformat()}T00:00:00Z"
    got = shown(value) if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"
    quotes = ", without quotes" if isinstance(value, str) else ""
    raise ValueError(f"takes a date such as 2027-01-01 or 2027-01-01T12:00:00Z{quotes}, got {got}")


def _contradictions(policy: TrustPolicy, file: str) -> Iterator[tuple[KeyPath, str]]:
    """What is well-formed but cannot be meant: the key, and what is wrong with it."""
    yield from _name_contradictions(policy)
    yield from _key_contradictions(policy)
    if policy.ledger is not None:
        path = PurePosixPath(policy.ledger)
        if not policy.ledger.isprintable() or not path.parts or path.is_absolute() or ".." in path.parts:
            yield ("ledger",), f"ledger = {shown(policy.ledger)}: takes a file beside the policy, such as ledger.jsonl"
        elif path == PurePosixPath(file):
            yield ("ledger",), f"ledger = {shown(policy.ledger)} is this policy itself"
    for name, pins in policy.model.items():
        yield from _pin_contradictions(("model", name), f"[model.{name}]", pins)
    for name, slot in policy.slot.items():
        yield from _slot_contradictions(policy, ("slot", name), f"slot {name!r}", slot)


def _name_contradictions(policy: TrustPolicy) -> Iterator[tuple[KeyPath, str]]:
    """Texts that a terminal would obey, and checks without a name."""
    texts: list[tuple[KeyPath, str]] = []
    for index, key in enumerate(policy.key):
        texts.append((("key", index, "owner"), key.owner))
        texts.append((("key", index, "reason"), key.reason))
    for name, slot in policy.slot.items():
        tables: list[tuple[KeyPath, SlotPolicy | StagePolicy]] = [(("slot", name), slot)]
        tables.extend((("slot", name, "stage", index), stage) for index, stage in enumerate(slot.stage))
        for at, each in tables:
            for check in each.findings or ():
                if not check or check != check.strip():
                    yield (*at, "findings"), f"findings has {shown(check)}, which names no check"
                texts.append(((*at, "findings"), check))
    for at, text in texts:
        if not text.isprintable():
            yield at, f"{at[-1]} holds a character that cannot be printed: {shown(text)}"


def _key_contradictions(policy: TrustPolicy) -> Iterator[tuple[KeyPath, str]]:
    """Keys of one name, roles that do not go together, times that leave nothing."""
    names: set[str] = set()
    for index, key in enumerate(policy.key):
        at = ("key", index)
        if key.name in names:
            yield (*at, "name"), f"two keys are named {key.name!r}"
        names.add(key.name)
        for role in key.roles:
            for reserved in (GATE, PROMOTER):
                if role != reserved and role.casefold() == reserved:
                    yield (*at, "roles"), f"key {key.name!r} has role {role!r}; did you mean {reserved!r}?"
        if len(set(key.roles)) != len(key.roles):
            yield (*at, "roles"), f"key {key.name!r} has a role twice: {', '.join(key.roles)}"
        if GATE in key.roles and len(key.roles) > 1:
            others = ", ".join(role for role in key.roles if role != GATE)
            yield (
                (*at, "roles"),
                f"key {key.name!r} issues verdicts (role {GATE!r}), so it cannot be {others} too: "
                "who made a verdict does not approve it. Make another key: gate key new",
            )
        if key.valid_from is not None and key.valid_until is not None and key.valid_until <= key.valid_from:
            yield (
                (*at, "valid_until"),
                f"key {key.name!r} is never valid: valid_until {_day(key.valid_until)} is not after "
                f"valid_from {_day(key.valid_from)}",
            )
        if key.reason and key.revoked is None:
            yield (
                (*at, "reason"),
                f"key {key.name!r} has the reason of a revocation and is not revoked: add revoked, its date",
            )
    if not any(GATE in key.roles for key in policy.key):
        yield ("key",), f"no key has role {GATE!r}, so no verdict could ever count"


def _pin_contradictions(at: KeyPath, table: str, pins: ModelPins) -> Iterator[tuple[KeyPath, str]]:
    """Pins that nothing can satisfy, or that look like something else than they are."""
    for name in ("spec", "data", "baseline"):
        given = getattr(pins, name)
        if given == "any":
            continue
        if not given and name != "baseline":
            yield (*at, name), f'{table} {name} is an empty list, which no verdict fits; write "any" if any will do'
        for each in given:
            if is_digest(each):
                continue
            if each == "any":
                yield (*at, name), f'{table} {name}: "any" stands alone, not in a list: {name} = "any"'
            elif name == "data" or re.fullmatch(r"(sha256:)?[0-9A-Fa-f]{32,}", each):
                yield (
                    (*at, name),
                    f"{table} {name}: takes SHA-256 digests of 64 lower-case hex digits, got {shown(each)}",
                )
            elif not each.isprintable() or each != each.strip():
                yield (*at, name), f"{table} {name}: takes a file's path or its SHA-256 digest, got {shown(each)}"


def _slot_contradictions(
    policy: TrustPolicy, at: KeyPath, what: str, slot: SlotPolicy
) -> Iterator[tuple[KeyPath, str]]:
    """Approvals that cannot be had, and stages that cannot be passed in their order."""
    yield from _approval_contradictions(policy, at, what, slot.approvals)
    if slot.load == "promoted" and policy.ledger is None:
        yield (
            (*at, "load"),
            f'{what} loads what was promoted (load = "promoted"), and the policy keeps no ledger: '
            'name one (ledger = "ledger.jsonl"), or set load = "approved"',
        )
    if not slot.stage:
        yield (*at, "stage"), f"{what} has no stage: name one, or leave stage out for full alone"
        return
    names: set[str] = set()
    share, share_of = 0.0, ""
    for index, stage in enumerate(slot.stage):
        here = (*at, "stage", index)
        if stage.name in names:
            yield (*here, "name"), f"{what} has two stages named {stage.name!r}"
        names.add(stage.name)
        yield from _approval_contradictions(policy, here, f"{what}, stage {stage.name!r}", stage.approvals or {})
        if stage.traffic_percent is not None:
            if stage.traffic_percent < share:
                yield (
                    (*here, "traffic_percent"),
                    f"{what}: traffic_percent falls from {share:g} in stage {share_of!r} "
                    f"to {stage.traffic_percent:g} in {stage.name!r}",
                )
            share, share_of = stage.traffic_percent, stage.name
    last, here = slot.stage[-1], (*at, "stage", len(slot.stage) - 1)
    for name in ("min_hours", "min_requests"):
        if getattr(last, name) is not None:
            yield (*here, name), f"{what}: {name} in the last stage, {last.name!r}, does nothing: no stage follows it"
    if last.traffic_percent not in (None, 100):
        yield (
            (*here, "traffic_percent"),
            f"{what}: the last stage, {last.name!r}, is all of the traffic: "
            f"traffic_percent = {last.traffic_percent:g} leaves some out; add a stage after it",
        )


def _approval_contradictions(
    policy: TrustPolicy, at: KeyPath, what: str, approvals: dict[str, int]
) -> Iterator[tuple[KeyPath, str]]:
    """Approvals by a role that does not approve, or that too few owners have a key of.

    A key that is revoked counts among them: revoking one must not make the policy unreadable.
    """
    for role, count in approvals.items():
        key = (*at, "approvals", role)
        if role in (GATE, PROMOTER):
            yield key, f"{what} asks for approvals by role {role!r}, which approves nothing"
            continue
        holders = [each.name for each in policy.key if role in each.roles]
        owners = {" ".join(each.owner.casefold().split()) for each in policy.key if role in each.roles}
        if len(owners) < count:
            roles = sorted({role for each in policy.key for role in each.roles} - {GATE, PROMOTER})
            have = f"{len(holders)} ({', '.join(holders)})" if holders else f"none{did_you_mean(role, roles)}"
            one = " of one owner, who counts once" if len(owners) < len(holders) == count else ""
            yield key, f"{what} asks for {count} approvals by role {role!r}; keys that have it: {have}{one}"


def _documented(struct: type[msgspec.Struct]) -> dict[str, str]:
    """What the `Args:` of a struct says of each key."""
    _, _, args = inspect.cleandoc(struct.__doc__ or "").partition("Args:\n")
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \S)", args):
        if match := re.match(r"\s*([a-z_, ]+): (.*)", entry, re.DOTALL):
            found.update(dict.fromkeys(match[1].split(", "), " ".join(match[2].split())))
    return found


def _without_null(node: Any) -> Any:
    """The same schema for TOML, which has no null: a key that has no value is left out."""
    if isinstance(node, list):
        return [_without_null(each) for each in node if each != {"type": "null"}]
    if not isinstance(node, dict):
        return node
    changed = {key: _without_null(value) for key, value in node.items() if value is not None}
    if "enum" in changed:
        changed["enum"] = [each for each in changed["enum"] if each is not None]
    if len(changed.get("anyOf", ())) == 1:
        (only,) = changed.pop("anyOf")
        return {**only, **changed}
    return changed
