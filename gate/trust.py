"""The trust policy's file, with its keys parsed and its pins resolved. It is the verifier's own, never a bundle's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from gate import atomic
from gate.errors import BaselineError, BundleError, IdentityMismatch, SpecError, VerificationError
from gate.manifest import MAX_JSON_BYTES, sha256_hex
from gate.release.policy import Pins, TrustedKey, TrustPolicy, is_digest, policy_from_text
from gate.signing import PublicKey, public_key
from gate.toml_errors import KeyPath, did_you_mean, line_of

MAX_POLICY_BYTES = 1024 * 1024
_SEAL = Path("seals", "verdict.dsse.json")
"""What tells a folder as a bundle."""


@dataclass(frozen=True)
class Trusted:
    """A key of a policy: what the policy says of it, and the key itself."""

    entry: TrustedKey
    public: PublicKey


@dataclass(frozen=True)
class PolicyFile:
    """A trust policy and the file it was read from.

    Args:
        path: As given by the user.
        sha256: Of the file's bytes.
        policy: What it says.
        keys: By key id; each key's bytes stand under one name.
        text: The file's content, for the lines in messages.
    """

    path: Path
    sha256: str
    policy: TrustPolicy
    keys: Mapping[str, Trusted]
    text: str = field(default="", repr=False)

    def location(self, *key: str | int) -> str:
        """`trust.toml:12` for a key such as `"slot", "production", "approvals"`; the nearest parent's if absent."""
        return f"{self.path}:{line_of(self.text, key)}"


@dataclass(frozen=True)
class Pinned:
    """What a verdict on a model must rest on, as SHA-256 digests; None where anything will do.

    Args:
        spec: Of the spec's bytes.
        data: Of the data set.
        baseline: Of the baseline, as the baseline states it; an empty set where there must be none.
    """

    spec: frozenset[str] | None
    data: frozenset[str] | None
    baseline: frozenset[str] | None


def read_policy(path: Path) -> PolicyFile:
    """Read and check a trust policy.

    Raises:
        SpecError: It is missing, no regular file, longer than 1 MiB, malformed, contradicts itself, or has a key that is
            none; with file and line.
        VerificationError: It would let in what nobody meant: it lies inside a bundle, or has one key under two names.
    """
    inside = _bundle_around(path)
    if inside is not None:
        raise VerificationError(
            f"lies inside the bundle {inside}: whoever hands over a bundle would say whom to trust",
            where=str(path),
            hint="keep the trust policy where only its owners can write, and give that: --policy release/trust.toml",
        )
    data = _bytes_of(path, limit_bytes=MAX_POLICY_BYTES, where=str(path))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as err:
        raise SpecError(f"is not a text file in UTF-8 (byte {err.start})", where=str(path)) from err
    policy = policy_from_text(text, path=path)
    keys: dict[str, Trusted] = {}
    for index, entry in enumerate(policy.key):
        try:
            public = public_key(entry.public, where=str(path))
        except SpecError as err:
            where = f"{path}:{line_of(text, ('key', index, 'public'))}"
            raise SpecError(f"key {entry.name!r}: {err.message}", where=where, hint=err.hint) from err
        if public.keyid in keys:
            raise VerificationError(
                f"key {entry.name!r}: is the key of {keys[public.keyid].entry.name!r} too, so one key would count as two",
                where=f"{path}:{line_of(text, ('key', index, 'public'))}",
                hint="let each person make a key of their own: gate key new",
            )
        keys[public.keyid] = Trusted(entry=entry, public=public)
    return PolicyFile(path=path, sha256=sha256_hex(data), policy=policy, keys=MappingProxyType(keys), text=text)


def pinned(file: PolicyFile, model: str) -> Pinned:
    """The digests that a verdict on a model must rest on; files that are named are read now.

    Raises:
        IdentityMismatch: The policy has no such model.
        SpecError: A file that it names is missing, unreadable, no baseline, or inside a bundle; with file and line.
    """
    if model not in file.policy.model:
        names = list(file.policy.model)
        near = did_you_mean(model, names)
        has = "" if "it takes" in near else f" (it has {', '.join(names)})"
        raise IdentityMismatch(f"the policy has no model {model!r}{near}{has}", where=str(file.path))
    pins = file.policy.model[model]
    return Pinned(
        spec=_resolved(file, model, "spec", pins.spec),
        data=_resolved(file, model, "data", pins.data),
        baseline=_resolved(file, model, "baseline", pins.baseline),
    )


def ledger_path(file: PolicyFile) -> Path | None:
    """Where the policy keeps its ledger; None where it keeps none."""
    return None if file.policy.ledger is None else file.path.parent / file.policy.ledger


def _resolved(file: PolicyFile, model: str, name: str, pins: Pins) -> frozenset[str] | None:
    """Digests of pins.

    Raises:
        SpecError: As `pinned`.
    """
    if pins == "any":
        return None
    return frozenset(
        each if is_digest(each) else _digest_of_pin(file, ("model", model, name, index), each)
        for index, each in enumerate(pins)
    )


def _digest_of_pin(file: PolicyFile, key: KeyPath, pin: str) -> str:
    """Digest of a spec's file, or the one that a baseline's file states.

    Raises:
        SpecError: As `pinned`.
    """
    from gate.baseline import baseline_from_bytes

    where = file.location(*key)
    path = file.path.parent / pin
    _, model, name, _ = key
    inside = _bundle_around(path)
    if inside is not None:
        raise SpecError(
            f"[model.{model}] {name}: {pin} lies inside the bundle {inside}, which would be judged by itself",
            where=where,
        )
    try:
        data = _bytes_of(path, limit_bytes=MAX_JSON_BYTES, where=str(path))
        return sha256_hex(data) if name == "spec" else baseline_from_bytes(data, where=str(path)).digest
    except (SpecError, BaselineError) as err:
        hint = f"a path starts from the policy's folder; write the SHA-256 digest where the {name} is not kept here"
        raise SpecError(f"[model.{model}] {name}: {pin} {err.message}", where=where, hint=hint) from err


def _bytes_of(path: Path, *, limit_bytes: int, where: str) -> bytes:
    """All bytes of a regular file.

    Raises:
        SpecError: It is missing, a link, a folder, a pipe or a device, too long, or cannot be read.
    """
    try:
        return atomic.read_regular(path, limit_bytes=limit_bytes)
    except BundleError as err:
        raise SpecError(err.message, where=where) from err
    except (OSError, ValueError) as err:
        raise SpecError(f"cannot be read: {err}", where=where) from err


def _bundle_around(path: Path) -> Path | None:
    """The bundle that a file lies in, by the path as it is written or by the one that its links lead to."""
    try:
        places = (Path(os.path.abspath(path)), Path(os.path.realpath(path)))  # noqa: PTH100 - `..` is taken literally too
    except (OSError, ValueError):
        return None
    for place in places:
        for folder in place.parents:
            if os.path.lexists(folder / _SEAL):
                return folder
    return None
