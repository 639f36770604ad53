"""A small signed bundle, the same with one thing wrong each, and how they are read: `tests/data/release/`.

    keys/       private keys of the tests, of which each byte is public; trusted by nobody
    good/       a bundle that verifies, with its approvals, a trust policy and a ledger
    broken/X/   about.toml says what is wrong and what the command has to answer; beside it the files that differ

After a change of a format, `python -m tests.withstand.release_artefacts` makes all of it anew, the same bytes each time.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from gate.baseline import baseline_from_result
from gate.ledger import append, head_path, read_ledger
from gate.manifest import canonical_json, pretty_json, sha256_hex
from gate.release.statements import (
    IN_TOTO,
    LEDGER_ENTRY,
    LEDGER_HEAD,
    ApprovalPredicate,
    ApprovalStatement,
    ApprovedVerdict,
    CountedApproval,
    Envelope,
    LedgerEntry,
    LedgerHead,
    Signed,
    SubjectDigest,
    payload_of,
)
from gate.results import run_from_builtins
from gate.signing import KeySigner, open_signer
from gate.store import BASELINE_PATH, SPEC_PATH, VERDICT_PATH, Release, approval_path, seal
from gate.trust import read_policy

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DATA = Path(__file__).parents[1] / "data"
FOLDER = DATA / "release"
MODEL, SLOT = "digits-cnn", "production"
CREATED, APPROVED = "2026-01-05T10:00:00Z", "2026-01-06T10:00:00Z"
SERIAL = 30
METADATA = "artifacts/metadata.json"
ENGINE = "artifacts/model.onnx"
LEDGER = "release/ledger.jsonl"
TRUST = "release/trust.toml"
WHERE = ("--policy", TRUST, "--model", MODEL, "--slot", SLOT)
VERIFY = ("verify", "bundle", *WHERE)
LEDGER_VERIFY = ("ledger", "verify", "--policy", TRUST)
KEYS = (
    "gate-ci",
    "gate-revoked",
    "gate-expired",
    "ada",
    "ada-second",
    "grace",
    "kay-revoked",
    "promoter",
    "promoter-second",
    "nobody",
)
UNPRINTABLE = "x\nVERIFIED  bundle\x1b[2J"
README = """# Keys of the tests: TEST ONLY

Every private key here is public: it lies in a repository, and anybody can make it again from its name. They sign what
lies beside this folder and nothing else. Never put one of them into a trust policy.
"""

Files = dict[str, bytes]
"""Content by path below one case's folder: `bundle/...`, `release/...`."""


@dataclass(frozen=True)
class Artefact:
    """One thing that is wrong.

    Args:
        name: Its folder below `broken/`.
        claim: What is wrong, in one sentence.
        says: What the refusal has to say.
        files: Those that differ from the good ones.
        do: What is done to the copy, in order, that a repository cannot hold.
        command: The arguments.
        exit: The exit code.
    """

    name: str
    claim: str
    says: tuple[str, ...]
    files: Mapping[str, bytes] = field(default_factory=dict)
    do: tuple[Mapping[str, Any], ...] = ()
    command: tuple[str, ...] = VERIFY
    exit: int = 4

    def about(self) -> bytes:
        """The text of `about.toml`."""
        lines = [f"claim   = {_toml(self.claim)}", f"says    = {_toml(self.says)}"]
        if self.command != VERIFY:
            lines.append(f"command = {_toml(self.command)}")
        if self.exit != 4:
            lines.append(f"exit    = {self.exit}")
        for each in self.do:
            lines += ["[[do]]", *(f"{key} = {_toml(value)}" for key, value in each.items())]
        return ("\n".join(lines) + "\n").encode()


def read_artefacts() -> tuple[Artefact, ...]:
    """The committed artefacts, without the content of their files."""
    found = []
    for folder in sorted((FOLDER / "broken").iterdir()):
        about = tomllib.loads((folder / "about.toml").read_text(encoding="utf-8"))
        found.append(
            Artefact(
                name=folder.name,
                claim=about["claim"],
                says=tuple(about["says"]),
                do=tuple(about.get("do", ())),
                command=tuple(about.get("command", VERIFY)),
                exit=about.get("exit", 4),
            )
        )
    return tuple(found)


def lay_out(root: Path, artefact: Artefact | None = None) -> None:
    """Put the good files into a folder, or those of an artefact, with the keys as only their owner may read them."""
    shutil.copytree(FOLDER / "good", root, dirs_exist_ok=True)
    lay_out_keys(root / "keys")
    if artefact is None:
        return
    shutil.copytree(
        FOLDER / "broken" / artefact.name, root, dirs_exist_ok=True, ignore=lambda _, names: {"about.toml"} & {*names}
    )
    for each in artefact.do:
        _do(root, each)


def lay_out_keys(folder: Path) -> None:
    """Copy the keys; a repository does not keep the mode that a private key needs."""
    folder.mkdir(parents=True)
    for source in (FOLDER / "keys").glob("*.pem"):
        target = folder / source.name
        target.touch(mode=0o600)
        target.write_bytes(source.read_bytes())


def key_file(name: str) -> str:
    """Of a private key, from the folder of a case."""
    return f"keys/test-only-{name}.pem"


def bundle_files() -> tuple[str, ...]:
    """Every file of the good bundle, seals included."""
    root = FOLDER / "good" / "bundle"
    return tuple(sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()))


def bomb(size_bytes: int) -> bytes:
    """A raw deflate stream of at least 4129 zeros, the same with every zlib: one block, nearly all of it longest matches.

    Eight matches of 13 bits are 13 bytes, so whole loops of them go in at any byte.

    Source: RFC 1951, section 3.2.6: 285 (258 bytes) is 11000101, distance 0 is 00000, literal 0 is 00110000.
    """
    match, loop = "1100010100000", 8 * 258
    count, rest = divmod(size_bytes - 1, loop)
    least = _bits("110" + "00110000" + match * 16 + "00110000" * rest + "0000000")
    return least[:2] + least[2:15] * (count - 2) + least[2:]


def _bits(text: str) -> bytes:
    """Bits in the order in which they are read, as bytes."""
    padded = text + "0" * (-len(text) % 8)
    return bytes(int(padded[at : at + 8][::-1], 2) for at in range(0, len(padded), 8))


def bomb_package(size_bytes: int) -> bytes:
    """An AOTInductor package, by its names, of which one member unpacks to more than anybody has."""
    zeros, crc = memoryview(bytes(2**20)), 0
    for _ in range(size_bytes // len(zeros)):
        crc = zlib.crc32(zeros, crc)
    return _zip(
        {
            "model/archive_format": (b"pt2", 3, zlib.crc32(b"pt2"), 0),
            "model/data/aotinductor/model/kernels.so": (b"\x7fELF", 4, zlib.crc32(b"\x7fELF"), 0),
            "model/data/aotinductor/model/constants.bin": (bomb(size_bytes), size_bytes, crc, 8),
        }
    )


def _zip(members: Mapping[str, tuple[bytes, int, int, int]]) -> bytes:
    """A zip file of packed bytes, unpacked size, CRC-32 and method by name."""
    body, directory = b"", b""
    for name, (packed, size, crc, method) in members.items():
        fields = struct.pack("<5H3I2H", 20, 0, method, 0, 33, crc, len(packed), size, len(name), 0)
        directory += struct.pack("<4sH", b"PK\1\2", 20) + fields + struct.pack("<3H2I", 0, 0, 0, 0, len(body))
        directory += name.encode()
        body += b"PK\3\4" + fields + name.encode() + packed
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, len(members), len(members), len(directory), len(body), 0)
    return body + directory + end


def _do(root: Path, what: Mapping[str, Any]) -> None:
    """Do to a copy what a repository cannot hold."""
    path = root / what["path"]
    outside = root / "outside"
    kind = what["op"]
    if kind == "remove":
        path.unlink()
        if not any(path.parent.iterdir()):
            path.parent.rmdir()
    elif kind == "rename":
        path.rename(root / what["to"])
    elif kind == "swap":
        other = root / what["with"]
        content = path.read_bytes()
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind in ("create", "empty"):
        path.write_bytes(b"")
    elif kind == "truncate":
        path.write_bytes(path.read_bytes()[: what["bytes"]])
    elif kind == "flip":
        data = bytearray(path.read_bytes())
        data[what["at"]] ^= 1
        path.write_bytes(data)
    elif kind == "symlink":
        path.rename(outside)
        path.symlink_to(outside)
    elif kind == "hardlink":
        outside.hardlink_to(path)
    elif kind == "fifo":
        path.unlink()
        os.mkfifo(path)
    elif kind == "directory":
        path.unlink()
        path.mkdir()
        (path / "file").write_bytes(b"x")
    elif kind == "nest":
        path.write_bytes(b"[" * what["depth"] + b"]" * what["depth"])
    elif kind == "whitespace":
        chunk = b" " * 2**20
        with path.open("wb") as stream:
            for _ in range(what["mib"]):
                stream.write(chunk)
    elif kind == "bomb":
        path.write_bytes(bomb_package(what["mib"] * 2**20))
    else:
        raise ValueError(kind)


def good_files() -> Files:
    """Bundle, approvals, policy and ledger, made by the package itself."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        run, result, extra = _checked(root)
        release = Release(slots=("production", "staging"), serial=SERIAL, valid_days=36_500, signer=signer("gate-ci"))
        out = root / "bundle"
        seal(
            result.verdict.require_passed(),
            run=run,
            result=result,
            engine_file=root / "model.onnx",
            extra=extra,
            out=out,
            release=release,
        )
        files = {
            f"bundle/{each.relative_to(out).as_posix()}": each.read_bytes() for each in out.rglob("*") if each.is_file()
        }
        files[TRUST] = _trust(json.loads(files[f"bundle/{METADATA}"])["digests"])
        _approve(files)
        files |= _ledger(root, files[TRUST], _earlier())
        return files


def _checked(root: Path, *, why: str = "first release") -> tuple[Any, Any, dict[str, bytes]]:
    """A run with one engine, its files, and the engine's own file in `root`."""
    spec = (DATA / "sealed.toml").read_bytes()
    run = run_from_builtins(json.loads((DATA / "run.json").read_bytes()))
    first = run.engines[0]
    engine = onnx_model()
    (root / "model.onnx").write_bytes(engine)
    baseline = baseline_from_result(run, first, who="ada", when="2026-01-02T10:00:00Z", why=why)
    durations = tuple(200_000 + (i * 7919) % 50_000 for i in range(500))
    result = msgspec.structs.replace(
        first,
        engine_sha256=sha256_hex(engine),
        size_bytes=len(engine),
        baseline_sha256=baseline.digest,
        latencies=(msgspec.structs.replace(first.latencies[0], durations_ns=durations),),
    )
    run = msgspec.structs.replace(run, created=CREATED, engines=(result, *run.engines[1:]))
    return run, result, {SPEC_PATH: spec, BASELINE_PATH: pretty_json(msgspec.to_builtins(baseline))}


def onnx_model(location: str | None = None) -> bytes:
    """A real ONNX model: ten classes from 64 pixels; with its weights in another file, where one is named."""
    from onnx import TensorProto, helper

    weights = helper.make_tensor("weights", TensorProto.FLOAT, [64, 10], [(i % 7 - 3) / 8 for i in range(640)])
    if location is not None:
        weights.ClearField("float_data")
        weights.data_location = TensorProto.EXTERNAL
        weights.external_data.add(key="location", value=location)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["input"], ["flat"], name="flatten"),
            helper.make_node("MatMul", ["flat", "weights"], ["logits"], name="head"),
        ],
        "digits",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        [weights],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9, producer_name="trt-gate"
    )
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def signer(name: str) -> KeySigner:
    """One of the test keys, which opens without a file."""
    variable = "GATE_TEST_ONLY_KEY"
    os.environ[variable] = _pem(name).decode()
    try:
        return open_signer(f"env:{variable}")
    finally:
        del os.environ[variable]


def _pem(name: str) -> bytes:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    seed = hashlib.sha256(f"trt-gate, key of the tests only: {name}".encode()).digest()
    pem: bytes = Ed25519PrivateKey.from_private_bytes(seed).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return pem


def _entry(name: str, owner: str, role: str, *more: str) -> str:
    lines = [
        "[[key]]",
        f'name        = "{name}"',
        f'owner       = "{owner}"',
        f'roles       = ["{role}"]',
        f'public      = "{signer(name).public.text}"',
        "valid_from  = 2025-01-01",
        *(more or ("valid_until = 2126-01-01",)),
    ]
    return "\n".join(lines) + "\n\n"


def _trust(digests: Mapping[str, str]) -> bytes:
    keys = (
        _entry("gate-ci", "CI of the digits team", "gate"),
        _entry(
            "gate-revoked",
            "an earlier CI",
            "gate",
            "revoked     = 2026-02-01",
            'reason      = "the runner was broken into"',
        ),
        _entry("gate-expired", "CI of 2025", "gate", "valid_until = 2026-03-01"),
        _entry("ada", "Ada", "release"),
        _entry("grace", "Grace", "release"),
        _entry("kay-revoked", "Kay", "release", "revoked     = 2026-02-01", 'reason      = "left"'),
        _entry("promoter", "release desk", "promoter"),
        _entry("promoter-second", "night shift", "promoter"),
    )
    return f"""# Test only: the private halves of these keys lie in this repository.
schema = 1
ledger = "ledger.jsonl"

{"".join(keys)}[model.{MODEL}]
spec     = ["{digests["spec"]}"]
data     = ["{digests["data"]}"]
baseline = ["{digests["baseline"]}"]

[slot.{SLOT}]
evidence  = "host"
findings  = ["parity", "latency.p99_ms"]
approvals = {{ release = 2 }}

[slot.staging]
evidence  = "host"
approvals = {{ release = 1 }}
""".encode()


def _earlier() -> tuple[dict[str, Any], ...]:
    """What was promoted before, oldest first: three verdicts, the second of which was revoked."""
    first, second, third = (hashlib.sha256(f"verdict {serial}".encode()).hexdigest() for serial in (10, 15, 20))
    return (
        {"time": "2026-01-01T10:00:00Z", "verdict": first, "serial": 10},
        {"time": "2026-01-02T10:00:00Z", "verdict": second, "serial": 15},
        {
            "time": "2026-01-02T12:00:00Z",
            "verdict": second,
            "serial": 15,
            "action": "revoke",
            "slot": "",
            "stage": "",
            "full": False,
            "reason": "p99 doubled",
        },
        {"time": "2026-01-03T10:00:00Z", "verdict": third, "serial": 20},
    )


def _ledger(root: Path, trust: bytes, entries: tuple[dict[str, Any], ...], *, key: str = "promoter") -> Files:
    """Ledger and head with these entries, written by the package."""
    folder = root / f"ledger-{len(list(root.iterdir()))}"
    folder.mkdir()
    (folder / "trust.toml").write_bytes(trust)
    policy = read_policy(folder / "trust.toml")
    path = folder / "ledger.jsonl"
    for values in entries:
        usual: dict[str, Any] = {
            "action": "promote",
            "model": MODEL,
            "slot": SLOT,
            "stage": "full",
            "full": True,
            "engine": "ort-fp16",
            "engine_sha256": hashlib.sha256(f"engine {values['serial']}".encode()).hexdigest(),
            "bundle": f"/releases/{values['serial']}",
            "policy_sha256": policy.sha256,
            "approvals": (CountedApproval("ada", "release"), CountedApproval("grace", "release")),
            "requests": None,
            "reason": "",
        }
        usual |= values
        if usual["action"] == "revoke":
            usual["approvals"] = ()

        def make(index: int, previous: str, usual: dict[str, Any] = usual) -> LedgerEntry:
            return LedgerEntry(index=index, previous=previous, **usual)

        append(path, policy, read_ledger(path, policy), make, signer(key))
    return {LEDGER: path.read_bytes(), f"{LEDGER}.head": head_path(path).read_bytes()}


def statement_of(files: Mapping[str, bytes], name: str = f"bundle/{VERDICT_PATH}") -> dict[str, Any]:
    """The statement in an envelope."""
    found: dict[str, Any] = json.loads(base64.b64decode(json.loads(files[name])["payload"]))
    return found


def verdict_of(files: Mapping[str, bytes]) -> str:
    """The digest of the verdict's payload, which approvals name."""
    return sha256_hex(base64.b64decode(json.loads(files[f"bundle/{VERDICT_PATH}"])["payload"]))


def _restated(
    good: Files,
    *,
    changed: Mapping[str, bytes | None] | None = None,
    metadata: Callable[[dict[str, Any]], object] | None = None,
    raw_metadata: Callable[[bytes], bytes] | None = None,
    predicate: Mapping[str, Any] | None = None,
    statement: Callable[[dict[str, Any]], object] | None = None,
    payload: Callable[[bytes], bytes] | None = None,
    payload_type: str = IN_TOTO,
    key: str = "gate-ci",
    approve: bool = True,
) -> Files:
    """The bundle with something changed, and everything that follows from it made anew, signatures and approvals too.

    So the one thing that is wrong is all that is wrong, as somebody would make it who has the key.

    Args:
        good: The good files.
        changed: Files of the bundle, by their path in it; None removes one.
        metadata: Edits the metadata.
        raw_metadata: Edits its bytes, after that.
        predicate: Values of the statement's predicate.
        statement: Edits the statement, after that.
        payload: Edits its bytes, after that.
        payload_type: Of the envelope.
        key: Signs it.
        approve: Sign the approvals anew.
    """
    files = {name: data for name, data in good.items() if not name.startswith("bundle/seals/approval-")}
    for name, data in (changed or {}).items():
        if data is None:
            del files[f"bundle/{name}"]
        else:
            files[f"bundle/{name}"] = data
    inside = sorted(
        name.removeprefix("bundle/")
        for name in files
        if name.startswith("bundle/") and not name.startswith("bundle/seals/")
    )
    said = json.loads(files[f"bundle/{METADATA}"])
    if metadata is not None:
        metadata(said)
    said["files"] = {
        name: {"sha256": sha256_hex(files[f"bundle/{name}"]), "size_bytes": len(files[f"bundle/{name}"])}
        for name in inside
        if name != METADATA
    }
    data = pretty_json(said)
    files[f"bundle/{METADATA}"] = data if raw_metadata is None else raw_metadata(data)
    stated = statement_of(good)
    stated["subject"] = [
        {
            "name": name,
            "digest": {"sha256": sha256_hex(files[f"bundle/{name}"])},
            "annotations": {"size_bytes": len(files[f"bundle/{name}"])},
        }
        for name in inside
    ]
    engine = next(name for name in inside if name.startswith("artifacts/model."))
    stated["predicate"] |= {
        "created": said["created"],
        "digests": said["digests"],
        "engine_sha256": sha256_hex(files[f"bundle/{engine}"]),
        "metadata_sha256": sha256_hex(files[f"bundle/{METADATA}"]),
        "model_id": said["model_id"],
        "evidence": said["verdict"]["evidence"],
        "findings": [
            {
                "check": each["check"],
                "estimate": each["estimate"],
                **each["interval"],
                "kind": each["limit"]["kind"],
                "limit": each["limit"]["value"],
                "n": each["n"],
                "outcome": each["status"],
                "evidence": each["evidence"],
            }
            for each in said["verdict"]["findings"]
        ],
        **(predicate or {}),
    }
    if statement is not None:
        statement(stated)
    signed = canonical_json(stated)
    files[f"bundle/{VERDICT_PATH}"] = (
        signer(key).sign(signed if payload is None else payload(signed), payload_type).to_bytes()
    )
    if approve:
        _approve(files)
    return files


def _approve(files: Files, *keys: str, **changes: Any) -> None:
    """Add approvals of the verdict that is there, by ada and grace where nobody is named."""
    for name in keys or ("ada", "grace"):
        path, data = _approval(files, name, **changes)
        files[f"bundle/{path}"] = data


def _approval(
    files: Files, key: str, *, verdict: str | None = None, path: str | None = None, **changes: Any
) -> tuple[str, bytes]:
    """An approval, and where it lies in a bundle."""
    values: dict[str, Any] = {
        "role": "release",
        "slot": SLOT,
        "model_id": f"{MODEL}@9c2b9c2",
        "serial": SERIAL,
        "created": APPROVED,
        "comment": "",
        **changes,
    }
    statement = ApprovalStatement(
        subject=(ApprovedVerdict(SubjectDigest(verdict or verdict_of(files))),),
        predicate=ApprovalPredicate(**values),
    )
    opened = signer(key)
    return path or approval_path(opened.public.keyid, values["slot"]), opened.sign(
        payload_of(statement), IN_TOTO
    ).to_bytes()


def _approval_file(key: str, slot: str = SLOT) -> str:
    return f"bundle/{approval_path(signer(key).public.keyid, slot)}"


def _toml(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def artefacts(good: Files) -> tuple[Artefact, ...]:
    """Everything that is broken on purpose, in the order of the threat model."""
    groups = (_tree, _edited, _numbers, _json, _signatures, _approvals, _fresh, _identity, _ledgers, _contents)
    found = [each for group in groups for each in group(good)]
    names = [each.name for each in found]
    if len(set(names)) != len(names):
        raise ValueError("two artefacts have one name")
    return tuple(found)


def _op(op: str, path: str, **more: Any) -> Mapping[str, Any]:
    return {"op": op, "path": path, **more}


def _made(name: str, claim: str, says: str | Sequence[str], good: Files, files: Files, **more: Any) -> Artefact:
    """An artefact from all of its files: those that differ are kept, those that are gone are removed."""
    gone = tuple(_op("remove", each) for each in sorted({*good} - {*files}))
    differ = {each: data for each, data in files.items() if good.get(each) != data}
    told = (says,) if isinstance(says, str) else tuple(says)
    return Artefact(name, claim, told, differ, (*gone, *more.pop("do", ())), **more)


def _tree(good: Files) -> list[Artefact]:
    engine, metrics = f"bundle/{ENGINE}", "bundle/evidence/metrics.json"

    def done(name: str, claim: str, says: str, *do: Mapping[str, Any], **more: Any) -> Artefact:
        return Artefact(name, claim, (says,), do=do, **more)

    return [
        done(
            "flipped-byte",
            "A bit of the engine is not what was sealed.",
            "model.onnx: its sha256 is",
            _op("flip", engine, at=100),
        ),
        done(
            "file-removed",
            "A file of evidence is gone.",
            "metrics.json: was sealed and is missing",
            _op("remove", metrics),
        ),
        Artefact(
            "file-added",
            "A second engine lies beside the one that was checked.",
            ("model.plan: was not sealed: it was added",),
            {"bundle/artifacts/model.plan": b"ftrt"},
        ),
        Artefact(
            "file-added-to-seals",
            "Among the seals lies something that is no approval.",
            ("notes.json: was not sealed: it was added",),
            {"bundle/seals/notes.json": b"{}\n"},
        ),
        Artefact(
            "dot-file", "The bundle holds a dot-file.", (".hidden: is a dot-file",), {"bundle/artifacts/.hidden": b"x"}
        ),
        done(
            "file-name-of-two-lines",
            "A file has a name that a terminal shows as a line of its own, and one that clears it.",
            r"artifacts: holds 'x\nVERIFIED  bundle\x1b[2J', which no file of a bundle is called",
            _op("create", f"bundle/artifacts/{UNPRINTABLE}"),
        ),
        done(
            "file-renamed",
            "A file has another name.",
            "metrics.json: was sealed and is missing",
            _op("rename", metrics, to="bundle/evidence/other.json"),
        ),
        done(
            "files-swapped",
            "Two files have changed places.",
            "environment.json: its sha256 is",
            _op("swap", metrics, **{"with": "bundle/evidence/environment.json"}),
        ),
        done("file-emptied", "The engine is empty.", "model.onnx: its sha256 is", _op("empty", engine)),
        done(
            "envelope-emptied",
            "The verdict's envelope is empty.",
            "verdict.dsse.json: is not JSON",
            _op("empty", f"bundle/{VERDICT_PATH}"),
        ),
        done(
            "envelope-removed",
            "There is no verdict.",
            "verdict.dsse.json: is missing",
            _op("remove", f"bundle/{VERDICT_PATH}"),
        ),
        done(
            "symlink",
            "The engine is a symbolic link to the same bytes elsewhere.",
            "model.onnx: is a symbolic link",
            _op("symlink", engine),
        ),
        done(
            "hard-link",
            "The engine has a second name outside.",
            "model.onnx: has 2 hard links",
            _op("hardlink", engine),
        ),
        done("fifo", "The engine is a named pipe.", "model.onnx: is not a regular file", _op("fifo", engine)),
        Artefact(
            "directory",
            "In place of the engine lies a folder.",
            ("model.onnx: was sealed and is missing", "model.onnx/file"),
            do=(_op("directory", engine),),
        ),
    ]


def _edited(good: Files) -> list[Artefact]:
    def named(name: str) -> Callable[[dict[str, Any]], object]:
        return lambda said: said["subject"][0].update(name=name)

    def text(old: bytes, new: bytes, path: str = METADATA) -> Files:
        return {**good, f"bundle/{path}": _swapped(good[f"bundle/{path}"], old, new)}

    def forged(old: bytes, new: bytes) -> Files:
        """The payload edited, with the signature that it had."""
        envelope = json.loads(good[f"bundle/{VERDICT_PATH}"])
        payload = _swapped(base64.b64decode(envelope["payload"]), old, new)
        signed = tuple(Signed(**each) for each in envelope["signatures"])
        return {**good, f"bundle/{VERDICT_PATH}": Envelope(payload, IN_TOTO, signed).to_bytes()}

    return [
        _made(
            "path-traversal",
            "The signed statement names a file above the bundle.",
            ("verdict.dsse.json", "does not hold a verdict", "subject[0].name"),
            good,
            _restated(good, statement=named("../outside")),
        ),
        _made(
            "absolute-name",
            "The signed statement names a file by an absolute path.",
            ("verdict.dsse.json", "does not hold a verdict", "subject[0].name"),
            good,
            _restated(good, statement=named("/etc/passwd")),
        ),
        _made(
            "file-listed-twice",
            "The signed statement lists a file twice.",
            "lists a file twice",
            good,
            _restated(good, statement=lambda said: said["subject"].append(said["subject"][0])),
        ),
        _made(
            "metadata-edited",
            "The metadata says that the model is faster.",
            "metadata.json: its sha256 is",
            good,
            text(b'"p99_ms": 0.249358', b'"p99_ms": 0.149358'),
        ),
        _made(
            "verdict-edited",
            "The statement has a higher serial than was signed.",
            "does not hold: what was signed was changed",
            good,
            forged(b'"serial":30', b'"serial":99'),
        ),
        _made(
            "verdict-edited-to-passed",
            "A verdict that was signed as FAILED says PASSED.",
            "does not hold: what was signed was changed",
            good,
            _unsigned_again(
                _restated(good, predicate={"status": "FAILED"}), b'"status":"FAILED"', b'"status":"PASSED"'
            ),
        ),
    ]


def _unsigned_again(files: Files, old: bytes, new: bytes) -> Files:
    """A payload edited after it was signed, approvals for the edited one."""
    envelope = json.loads(files[f"bundle/{VERDICT_PATH}"])
    payload = _swapped(base64.b64decode(envelope["payload"]), old, new)
    signed = tuple(Signed(**each) for each in envelope["signatures"])
    changed = {**files, f"bundle/{VERDICT_PATH}": Envelope(payload, IN_TOTO, signed).to_bytes()}
    _approve(changed)
    return changed


def _swapped(data: bytes, old: bytes, new: bytes) -> bytes:
    if data.count(old) < 1:
        raise ValueError(f"{old!r} is not there")
    return data.replace(old, new, 1)


def _numbers(good: Files) -> list[Artefact]:
    def finding(index: int, **changes: Any) -> Callable[[dict[str, Any]], object]:
        return lambda said: said["verdict"]["findings"][index].update(changes)

    def faster(said: dict[str, Any]) -> None:
        said["verdict"]["findings"][2].update(estimate=0.1, interval={"lower": 0.1, "upper": 0.1})
        said["latency"][0].update(p99_ms=0.1)

    def without_budget(said: dict[str, Any]) -> None:
        del said["verdict"]["findings"][2]

    def failed(said: dict[str, Any]) -> None:
        said["verdict"]["status"] = "FAILED"
        said["verdict"]["findings"][0].update(status="FAILED", estimate=0.5, interval={"lower": 0.5, "upper": 0.5})

    return [
        _made(
            "failed-verdict-signed",
            "A verdict FAILED, signed by a real key.",
            "its verdict is FAILED: only what PASSED is released",
            good,
            _restated(good, predicate={"status": "FAILED"}),
        ),
        _made(
            "inconclusive-verdict-signed",
            "A verdict INCONCLUSIVE, signed by a real key.",
            "its verdict is INCONCLUSIVE: only what PASSED is released",
            good,
            _restated(good, predicate={"status": "INCONCLUSIVE"}),
        ),
        _made(
            "failed-metadata-signed",
            "Metadata that say FAILED below a statement that says PASSED, signed by a real key.",
            ("metadata.json", "FAILED"),
            good,
            _restated(good, metadata=failed),
        ),
        _made(
            "outcome-changed",
            "A check is PASSED with numbers that say otherwise, signed by a real key.",
            "parity.rel_rmse is FAILED by its own numbers",
            good,
            _restated(good, metadata=finding(0, estimate=0.5, interval={"lower": 0.5, "upper": 0.5})),
        ),
        _made(
            "outcome-of-nan",
            "A check is PASSED with an estimate that is no number, signed by a real key.",
            "parity.rel_rmse is FAILED by its own numbers",
            good,
            _restated(good, metadata=finding(0, estimate="NaN")),
        ),
        _made(
            "numbers-not-measured",
            "The p99 in the metadata is not that of the raw latencies, signed by a real key.",
            "latency.p99_ms is 0.1",
            good,
            _restated(good, metadata=faster),
        ),
        _made(
            "budget-left-out",
            "A check that the spec asks for is not there, signed by a real key.",
            "asks for latency.p99_ms with a limit of 10.0, the metadata has none",
            good,
            _restated(good, metadata=without_budget),
        ),
        _made(
            "statement-says-more",
            "The statement has a stronger evidence than the metadata, signed by a real key.",
            "its predicate or order is not that of the metadata",
            good,
            _restated(good, predicate={"evidence": "device"}),
        ),
    ]


def _json(good: Files) -> list[Artefact]:
    envelope = f"bundle/{VERDICT_PATH}"
    texts = {
        "duplicate-key": (
            b'"schema_version":1,',
            b'"schema_version":1,"schema_version":1,',
            "stands twice in one object",
        ),
        "nan": (b'"schema_version":1,', b'"schema_version":NaN,', "the number NaN is not finite"),
        "huge-number": (b'"schema_version":1,', b'"schema_version":1e999,', "the number 1e999 is not finite"),
        "huge-integer": (
            b'"schema_version":1,',
            b'"schema_version":1' + b"0" * 5000 + b",",
            "is not JSON: Exceeds the limit",
        ),
        "deep-nesting": (
            b'"schema_version":1,',
            b'"schema_version":' + b"[" * 300 + b"]" * 300 + b",",
            "nests deeper than 64",
        ),
    }
    found = []
    for name, (_, new, says) in texts.items():
        value = new.partition(b":")[2].rstrip(b",") if name != "duplicate-key" else None
        wrong = b'"engine":1,' if value is None else b'"engine":' + value + b","

        def put(payload: bytes, wrong: bytes = wrong) -> bytes:
            return _swapped(
                payload,
                b'"engine":"ort-fp16",',
                wrong + (b'"engine":2,' if b":1," in wrong[:12] and len(wrong) < 12 else b""),
            )

        def put_metadata(data: bytes, wrong: bytes = wrong) -> bytes:
            twice = len(wrong) < 12
            return _swapped(data, b'"engine": "ort-fp16",', wrong + (b'"engine":2,' if twice else b""))

        outer = _swapped(
            good[envelope],
            b'{"payload":',
            b"{" + (b'"payload":1,' if value is None else b'"a":' + value + b",") + b'"payload":',
        )
        found += [
            _made(
                f"envelope-{name}",
                f"The verdict's envelope is JSON with a {name.replace('-', ' ')}.",
                ("verdict.dsse.json", says),
                good,
                {**good, envelope: outer},
            ),
            _made(
                f"statement-{name}",
                f"The verdict is JSON with a {name.replace('-', ' ')}, signed by a real key.",
                ("verdict.dsse.json", says),
                good,
                _restated(good, payload=put),
            ),
            _made(
                f"metadata-{name}",
                f"The metadata are JSON with a {name.replace('-', ' ')}, signed by a real key.",
                ("metadata.json", says),
                good,
                _restated(good, raw_metadata=put_metadata),
            ),
        ]
    return [
        *found,
        Artefact(
            "envelope-nested-without-end",
            "The verdict's envelope nests a million deep.",
            ("verdict.dsse.json", "nests deeper than 64"),
            do=(_op("nest", envelope, depth=1_000_000),),
        ),
        Artefact(
            "envelope-not-utf8",
            "The verdict's envelope is not text.",
            ("verdict.dsse.json", "is not UTF-8"),
            {envelope: b"\xff" + good[envelope]},
        ),
        Artefact(
            "envelope-written-otherwise",
            "The verdict's envelope has the same content with spaces in it.",
            ("verdict.dsse.json", "is not written as sealing writes it"),
            {envelope: good[envelope].replace(b'","', b'", "')},
        ),
        *(
            Artefact(
                f"whitespace-{name}",
                f"{what} is 1 GiB of spaces.",
                (path.rpartition("/")[2], says),
                do=(_op("whitespace", path, mib=1024),),
                command=command,
            )
            for name, what, path, says, command in (
                ("envelope", "The verdict's envelope", envelope, "is too long: the limit is 16777216 bytes", VERIFY),
                ("metadata", "The metadata", f"bundle/{METADATA}", "is too long: the limit is 16777216 bytes", VERIFY),
                ("ledger", "The ledger", LEDGER, "is too long: the limits are 65536 bytes a line", LEDGER_VERIFY),
            )
        ),
        Artefact(
            "whitespace-policy",
            "The trust policy is 1 GiB of spaces.",
            ("trust.toml", "is too long: the limit is 1048576 bytes"),
            do=(_op("whitespace", TRUST, mib=1024),),
            exit=2,
        ),
    ]


def _signatures(good: Files) -> list[Artefact]:
    def envelope(change: Callable[[dict[str, Any]], object]) -> Files:
        raw = json.loads(good[f"bundle/{VERDICT_PATH}"])
        change(raw)
        return {**good, f"bundle/{VERDICT_PATH}": canonical_json(raw)}

    payload = base64.b64decode(json.loads(good[f"bundle/{VERDICT_PATH}"])["payload"])
    by_nobody = json.loads(signer("nobody").sign(payload, IN_TOTO).to_bytes())["signatures"]
    by_ci = json.loads(good[f"bundle/{VERDICT_PATH}"])["signatures"]
    known = by_ci[0]["keyid"]

    def both(raw: dict[str, Any]) -> None:
        raw["signatures"] = [*by_ci, *by_nobody]

    return [
        _made(
            "wrong-payload-type",
            "The verdict is signed as another type of payload.",
            ("its payload is 'application/json', not 'application/vnd.in-toto+json'",),
            good,
            _restated(good, payload_type="application/json"),
        ),
        _made(
            "type-of-a-ledger-entry",
            "The verdict is signed as an entry of a ledger.",
            "not 'application/vnd.in-toto+json'",
            good,
            _restated(good, payload_type=LEDGER_ENTRY),
        ),
        _made(
            "type-edited",
            "The envelope says another type of payload than was signed.",
            "its payload is 'text/plain'",
            good,
            envelope(lambda raw: raw.update(payloadType="text/plain")),
        ),
        _made(
            "approval-in-place-of-verdict",
            "In place of the verdict lies an approval, signed by a key of the gate.",
            ("verdict.dsse.json", "does not hold a verdict"),
            good,
            {**good, f"bundle/{VERDICT_PATH}": _approval(good, "gate-ci")[1]},
        ),
        _made(
            "not-signed",
            "Nobody signed the verdict.",
            "nobody signed the verdict",
            good,
            envelope(lambda raw: raw.update(signatures=[])),
        ),
        _made(
            "unknown-key",
            "A key signed that the policy does not have.",
            (f"key {signer('nobody').public.keyid[:8]}", "is not in the policy"),
            good,
            _restated(good, key="nobody"),
        ),
        _made(
            "revoked-key",
            "A key signed that was revoked since.",
            "key gate-revoked was revoked on 2026-02-01: the runner was broken into",
            good,
            _restated(good, key="gate-revoked"),
        ),
        _made(
            "expired-key",
            "A key signed that has expired since.",
            "key gate-expired expired on 2026-03-01",
            good,
            _restated(good, key="gate-expired"),
        ),
        _made(
            "approvers-key",
            "An approver signed the verdict.",
            "key ada is of role release, not gate",
            good,
            _restated(good, key="ada"),
        ),
        _made(
            "promoters-key",
            "A promoter signed the verdict.",
            "key promoter is of role promoter, not gate",
            good,
            _restated(good, key="promoter"),
        ),
        _made(
            "signature-under-a-known-id",
            "A key that nobody knows signed, under the id of one that is trusted.",
            "does not hold: what was signed was changed, or something else was",
            good,
            envelope(lambda raw: raw["signatures"][0].update(sig=by_nobody[0]["sig"], keyid=known)),
        ),
        _made(
            "signature-empty",
            "The signature has no bytes.",
            "does not hold",
            good,
            envelope(lambda raw: raw["signatures"][0].update(sig="")),
        ),
        _made(
            "second-signature",
            "A second key signed beside the first.",
            "2 keys signed the verdict, one does",
            good,
            envelope(both),
        ),
        _made(
            "signed-twice",
            "One key signed twice.",
            "one key signed it twice",
            good,
            envelope(lambda raw: raw.update(signatures=[*by_ci, *by_ci])),
        ),
        _made(
            "key-of-small-order",
            "The policy holds a key under which anybody can sign.",
            ("trust.toml", "is an Ed25519 point of small order: anybody can sign under it"),
            good,
            {**good, TRUST: _swapped(good[TRUST], signer("gate-ci").public.text.encode(), b"ed25519:01" + b"0" * 62)},
            exit=2,
        ),
    ]


def _approvals(good: Files) -> list[Artefact]:
    ada, grace = _approval_file("ada"), _approval_file("grace")
    missing = "needs 1 more approval by role release: 1 of 2 release (ada)"
    only_ada = {name: data for name, data in good.items() if name != grace}
    second = _entry("ada-again", "Ada at home", "release").encode()

    def instead(says: str | tuple[str, ...], key: str = "grace", **changes: Any) -> tuple[tuple[str, ...], Files]:
        """In place of grace's approval another one."""
        files = dict(only_ada)
        _approve(files, key, **changes)
        return (missing, *((says,) if isinstance(says, str) else says)), files

    def trust(more: str) -> bytes:
        return _swapped(good[TRUST], f"[model.{MODEL}]".encode(), more.encode() + f"[model.{MODEL}]".encode())

    def under(key: str, keyid: str) -> bytes:
        raw = json.loads(_approval(good, key)[1])
        raw["signatures"][0]["keyid"] = keyid
        return canonical_json(raw)

    found = {
        "approval-missing": ("One approval is not there.", missing, only_ada),
        "approval-twice": (
            "One approval lies there twice, the second time under another key's name.",
            (missing, "it was renamed"),
            {**only_ada, grace: good[ada]},
        ),
        "approval-under-another-id": (
            "Ada approved a second time, under the id of grace's key.",
            (missing, "does not hold"),
            {**only_ada, grace: under("ada", signer("grace").public.keyid)},
        ),
        "approval-by-an-unknown-key": (
            "A key approved that the policy does not have.",
            *instead("is not in the policy", "nobody"),
        ),
        "approval-by-a-revoked-key": (
            "A key approved that was revoked since.",
            *instead("key kay-revoked was revoked on 2026-02-01: left", "kay-revoked"),
        ),
        "approval-by-the-gate": (
            "The key that issued the verdict approved it.",
            *instead("key gate-ci issues verdicts and cannot approve them", "gate-ci"),
        ),
        "approval-by-a-promoter": (
            "A promoter approved.",
            *instead("key promoter is not of role release", "promoter"),
        ),
        "approval-of-another-verdict": (
            "An approval is of another verdict.",
            *instead("it is of another verdict", verdict=hashlib.sha256(b"another verdict").hexdigest()),
        ),
        "approval-for-another-slot": (
            "An approval is for another slot.",
            *instead("it is for slot staging", slot="staging"),
        ),
        "approval-from-the-future": (
            "An approval says that it was made in a hundred years.",
            *instead("it says it was made on 2120-01-01T00:00:00Z", created="2120-01-01T00:00:00Z"),
        ),
        "approval-of-no-day": (
            "An approval says that it was made on a day that there is not.",
            *instead("cannot be judged at '2026-02-31T10:00:00Z'", created="2026-02-31T10:00:00Z"),
        ),
        "approval-edited": (
            "The comment of an approval was edited.",
            (missing, "does not hold"),
            {
                **good,
                grace: _unsigned_text(good[grace], b'"comment":""', b'"comment":"yes"'),
            },
        ),
        "approval-with-nan": (
            "An approval is signed JSON with a NaN.",
            (missing, "NaN is not finite"),
            {**only_ada, grace: _signed_text(good[grace], "grace", b'"serial":30', b'"serial":NaN')},
        ),
        "verdict-in-place-of-approval": (
            "In place of an approval lies the verdict.",
            (missing, "issues verdicts and cannot approve them"),
            {**only_ada, grace: good[f"bundle/{VERDICT_PATH}"]},
        ),
        "approval-of-the-verdict-before": (
            "The approvals are of a verdict with another serial; the engine is the same.",
            ("needs 2 more approvals by role release", "it is of another verdict"),
            {**_restated(good, predicate={"serial": 31}, approve=False), ada: good[ada], grace: good[grace]},
        ),
    }
    twice = dict(only_ada)
    twice[TRUST] = trust(_entry("ada-second", "Ada", "release"))
    _approve(twice, "ada-second")
    one_key = dict(only_ada)
    one_key[TRUST] = _swapped(
        trust(second.decode()), signer("ada-again").public.text.encode(), signer("ada").public.text.encode()
    )
    pem_text = _spki("ada")
    as_pem = trust(_entry("ada-pem", "Ada at home", "release")).replace(
        f'"{signer("ada-pem").public.text}"'.encode(), f'"""\n{pem_text}"""'.encode()
    )
    return [
        *(_made(name, claim, says, good, files) for name, (claim, says, files) in found.items()),
        _made(
            "two-keys-of-one-owner",
            "One owner approved with two keys.",
            (missing, "Ada has approved with key ada already"),
            good,
            twice,
        ),
        _made(
            "one-key-under-two-names",
            "One key is registered under two names, to reach a threshold of two.",
            ("trust.toml", "key 'ada-again': is the key of 'ada' too, so one key would count as two"),
            good,
            one_key,
        ),
        _made(
            "one-key-in-two-writings",
            "One key is registered as hex digits and as PEM, to reach a threshold of two.",
            ("trust.toml", "key 'ada-pem': is the key of 'ada' too, so one key would count as two"),
            good,
            {**only_ada, TRUST: as_pem},
        ),
    ]


def _spki(name: str) -> str:
    from cryptography.hazmat.primitives import serialization

    key: Any = serialization.load_pem_private_key(_pem(name), None)
    pem: bytes = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return pem.decode()


def _unsigned_text(data: bytes, old: bytes, new: bytes) -> bytes:
    """An envelope whose payload was edited, with the signature that it had."""
    raw = json.loads(data)
    raw["payload"] = base64.b64encode(_swapped(base64.b64decode(raw["payload"]), old, new)).decode()
    return canonical_json(raw)


def _signed_text(data: bytes, key: str, old: bytes, new: bytes) -> bytes:
    payload = _swapped(base64.b64decode(json.loads(data)["payload"]), old, new)
    return signer(key).sign(payload, IN_TOTO).to_bytes()


def _fresh(good: Files) -> list[Artefact]:
    promoted = {"time": "2026-01-06T12:00:00Z", "verdict": verdict_of(good), "serial": SERIAL}
    revocation = {
        **promoted,
        "time": "2026-01-07T10:00:00Z",
        "action": "revoke",
        "slot": "",
        "stage": "",
        "full": False,
        "reason": "wrong on night images",
    }
    with tempfile.TemporaryDirectory() as name:
        revoked = _ledger(Path(name), good[TRUST], (*_earlier(), revocation))
        in_slot = _ledger(Path(name), good[TRUST], (*_earlier(), promoted, revocation))
    why = ("revoked", "2026-01-07T10:00:00Z: wrong on night images")
    return [
        _made(
            "older-serial",
            "A verdict that is older than the one in the slot is shown again.",
            "its serial is 15, 20 was accepted before: an older verdict is not let in again",
            good,
            _restated(good, predicate={"serial": 15}),
        ),
        _made(
            "same-serial",
            "Another verdict has the serial of the one in the slot.",
            "serial 20 is that of another verdict on ort-fp16, which is in the slot",
            good,
            _restated(good, predicate={"serial": 20}),
        ),
        _made(
            "expired-verdict",
            "The verdict has expired.",
            "it expired on 2026-02-01T00:00:00Z",
            good,
            _restated(good, predicate={"not_after": "2026-02-01T00:00:00Z"}),
        ),
        _made(
            "verdict-from-the-future",
            "The verdict says that it was made in a hundred years.",
            "it says it was made on 2125-01-01T00:00:00Z",
            good,
            _restated(good, metadata=lambda said: said.update(created="2125-01-01T00:00:00Z")),
        ),
        _made(
            "revoked-verdict",
            "The ledger says that the verdict was revoked.",
            why,
            good,
            {**good, **revoked},
        ),
        _made(
            "revoked-in-the-slot",
            "The verdict was promoted, and revoked since.",
            why,
            good,
            {**good, **in_slot},
        ),
    ]


def _identity(good: Files) -> list[Artefact]:
    digests = json.loads(good[f"bundle/{METADATA}"])["digests"]

    def digest(**changes: Any) -> Callable[[dict[str, Any]], object]:
        return lambda said: said["digests"].update(changes)

    with tempfile.TemporaryDirectory() as name:
        baseline = _checked(Path(name), why="another release")[2][BASELINE_PATH]
        from gate.baseline import baseline_from_bytes

        other = baseline_from_bytes(baseline, where="baseline").digest
    spec = good[f"bundle/{SPEC_PATH}"] + b"# and something that nobody reviewed\n"

    def held(name: str) -> str:
        return f"the policy takes {digests[name][:8]}"

    return [
        _made(
            "another-model",
            "The bundle is of another model.",
            "it is of model 'letters-cnn@9c2b9c2', asked for is 'digits-cnn'",
            good,
            _restated(good, metadata=lambda said: said.update(model_id="letters-cnn@9c2b9c2")),
        ),
        _made(
            "another-slot",
            "The bundle was sealed for another slot.",
            "it was sealed for staging, asked for is 'production'",
            good,
            _restated(good, predicate={"slots": ["staging"]}),
        ),
        _made(
            "no-slot",
            "The bundle was sealed for no slot.",
            "it was sealed for no slot, asked for is 'production'",
            good,
            _restated(good, predicate={"slots": []}),
        ),
        _made(
            "another-baseline",
            "The bundle was judged by another baseline.",
            (f"its baseline is {other[:8]}", held("baseline")),
            good,
            _restated(good, changed={BASELINE_PATH: baseline}, metadata=digest(baseline=other)),
        ),
        _made(
            "no-baseline",
            "The bundle was judged by no baseline.",
            ("its baseline is none", held("baseline")),
            good,
            _restated(good, changed={BASELINE_PATH: None}, metadata=digest(baseline=None)),
        ),
        _made(
            "another-data-set",
            "The bundle was judged on other data.",
            ("its data is eeeeeeee", held("data")),
            good,
            _restated(good, metadata=digest(data="e" * 64)),
        ),
        _made(
            "another-spec",
            "The bundle was judged by another spec.",
            (f"its spec is {sha256_hex(spec)[:8]}", held("spec")),
            good,
            _restated(good, changed={SPEC_PATH: spec}, metadata=digest(spec=sha256_hex(spec))),
        ),
        Artefact(
            "model-not-in-the-policy",
            "A model is asked for that the policy does not have.",
            ("the policy has no model 'letters-cnn'",),
            command=("verify", "bundle", "--policy", TRUST, "--model", "letters-cnn", "--slot", SLOT),
        ),
        _made(
            "policy-of-its-own",
            "The bundle brings the policy that trusts it.",
            ("lies inside the bundle", "whoever hands over a bundle would say whom to trust"),
            good,
            {**good, "bundle/policy/trust.toml": good[TRUST]},
            command=("verify", "bundle", "--policy", "bundle/policy/trust.toml", "--model", MODEL, "--slot", SLOT),
        ),
    ]


def _ledgers(good: Files) -> list[Artefact]:
    lines = good[LEDGER].splitlines(keepends=True)
    head = f"{LEDGER}.head"

    def made(name: str, claim: str, says: str | tuple[str, ...], data: bytes | None, **more: Any) -> Artefact:
        files = {**good}
        if data is None:
            del files[LEDGER]
        else:
            files[LEDGER] = data
        return _made(f"ledger-{name}", claim, says, good, files, command=LEDGER_VERIFY, **more)

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        older = _ledger(root, good[TRUST], _earlier()[:2])
        other = _ledger(root, good[TRUST], ({**_earlier()[0], "reason": "something else"}, *_earlier()[1:]))
        one = _ledger(root, good[TRUST], _earlier()[:1])
    last = sha256_hex(lines[2])
    taken_over = signer("promoter-second").sign(payload_of(LedgerHead(entries=3, last=last)), LEDGER_HEAD).to_bytes()
    gone = good[TRUST].replace(
        b'name        = "promoter"\n', b'name        = "promoter"\nrevoked     = 2026-01-04\nreason      = "stolen"\n'
    )
    raw = json.loads(lines[1])
    payload = base64.b64decode(raw["payload"])
    by_ada = signer("ada").sign(payload, LEDGER_ENTRY).to_bytes()
    by_nobody = signer("nobody").sign(payload, LEDGER_ENTRY).to_bytes()
    as_statement = signer("promoter").sign(payload, IN_TOTO).to_bytes()
    edited = _unsigned_text(lines[1], b'"serial":15', b'"serial":99')

    def second(line: bytes) -> bytes:
        return b"".join([lines[0], line, *lines[2:]])

    return [
        made("line-edited", "An entry was edited.", ("ledger.jsonl:2", "the signature does not hold"), second(edited)),
        made(
            "line-removed",
            "An entry was taken out.",
            ("ledger.jsonl:3", "a line was added, removed or moved"),
            b"".join([*lines[:2], lines[3]]),
        ),
        made(
            "first-line-removed",
            "The first entry was taken out.",
            ("ledger.jsonl:1", "a line was added, removed or moved"),
            b"".join(lines[1:]),
        ),
        made(
            "reordered",
            "Two entries have changed places.",
            ("ledger.jsonl:2", "a line was added, removed or moved"),
            b"".join([lines[0], lines[2], lines[1], lines[3]]),
        ),
        made(
            "line-doubled",
            "An entry stands there twice.",
            ("ledger.jsonl:5", "a line was added, removed or moved"),
            good[LEDGER] + lines[3],
        ),
        made("truncated", "The last entry was cut off.", "lines were cut off at the end", b"".join(lines[:3])),
        made(
            "truncated-within-a-line",
            "The last entry was cut off in its middle.",
            "lines were cut off at the end",
            good[LEDGER][:-100],
        ),
        made("emptied", "The ledger is empty.", "lines were cut off at the end", b""),
        _made(
            "ledger-of-one-line-emptied",
            "The only entry was cut off.",
            "has 0 whole lines, and its head says 1: lines were cut off at the end",
            good,
            {**good, **one, LEDGER: b""},
            command=LEDGER_VERIFY,
        ),
        _made(
            "ledger-head-by-a-revoked-key",
            "The key that signed the head was revoked since.",
            (
                "its head is signed by promoter, whose key was revoked on 2026-01-04: stolen",
                "gate ledger sign --policy",
            ),
            good,
            {**good, TRUST: gone},
            command=LEDGER_VERIFY,
        ),
        _made(
            "ledger-line-added-by-a-revoked-key",
            "Another promoter took the ledger over, and with the revoked key a line of before was added.",
            (
                "ledger.jsonl:4",
                "line 4, which the head does not know yet, is signed by promoter, whose key was revoked",
            ),
            good,
            {**good, TRUST: gone, head: taken_over},
            command=LEDGER_VERIFY,
        ),
        made(
            "removed",
            "The ledger is gone, its head is there.",
            "is missing, and ledger.jsonl.head says that it has 4 lines",
            None,
        ),
        _made(
            "ledger-head-removed",
            "The ledger's head is gone.",
            ("ledger.jsonl.head", "is missing"),
            good,
            {name: data for name, data in good.items() if name != head},
            command=LEDGER_VERIFY,
        ),
        _made(
            "ledger-head-older",
            "The head is of an older state of the ledger.",
            ("ledger.jsonl.head", "says 2 lines, and there are 4"),
            good,
            {**good, head: older[head]},
            command=LEDGER_VERIFY,
        ),
        _made(
            "ledger-another",
            "The lines are of another ledger by the same promoter.",
            ("ledger.jsonl.head", "says that line 4 is"),
            good,
            {**good, LEDGER: other[LEDGER]},
            command=LEDGER_VERIFY,
        ),
        _made(
            "ledger-put-back",
            "Ledger and head were put back to an older state, and a later line was kept elsewhere.",
            "it was put back to an older state, or is another ledger",
            good,
            {**good, **older},
            command=(*LEDGER_VERIFY, "--expect", sha256_hex(lines[3])),
        ),
        made(
            "entry-by-an-approver",
            "An approver signed an entry.",
            ("ledger.jsonl:2", "is signed by ada, who is release, not promoter"),
            second(by_ada),
        ),
        made(
            "entry-by-an-unknown-key",
            "A key signed an entry that the policy does not have.",
            ("ledger.jsonl:2", "does not have"),
            second(by_nobody),
        ),
        made(
            "entry-of-another-type",
            "An entry is signed as another type of payload.",
            ("ledger.jsonl:2", "its payload is 'application/vnd.in-toto+json'"),
            second(as_statement),
        ),
        made(
            "line-with-nan",
            "An entry holds a NaN.",
            ("ledger.jsonl:2", "is not what a ledger holds"),
            second(_unsigned_text(lines[1], b'"serial":15', b'"serial":NaN')),
        ),
        made(
            "line-is-no-json",
            "A line is no JSON.",
            ("ledger.jsonl:2", "is not what a ledger holds"),
            second(b"promoted 15\n"),
        ),
        Artefact(
            "ledger-symlink",
            "The ledger is a symbolic link.",
            ("ledger.jsonl", "is a symbolic link"),
            do=(_op("symlink", LEDGER),),
            command=LEDGER_VERIFY,
        ),
        _made(
            "ledger-broken-for-a-bundle",
            "The bundle is good, and the ledger was edited.",
            ("ledger.jsonl:2", "the signature does not hold"),
            good,
            {**good, LEDGER: second(edited)},
        ),
    ]


def _contents(good: Files) -> list[Artefact]:
    def torch(said: dict[str, Any]) -> None:
        said["backend"] = "torch"
        said["build"]["backend"] = "torch"

    def package(data: bytes) -> Files:
        return _restated(good, changed={ENGINE: None, "artifacts/model.pt2": data}, metadata=torch)

    def stored(members: Mapping[str, bytes]) -> bytes:
        return _zip({name: (data, len(data), zlib.crc32(data), 0) for name, data in members.items()})

    pickled = b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R."
    mib = 256
    bombed = package(bomb_package(mib * 2**20))
    del bombed["bundle/artifacts/model.pt2"]
    return [
        _made(
            "external-data",
            "The graph's weights lie outside the bundle.",
            ("model.onnx", "its weights lie outside the bundle: '../../../../etc/passwd'", "weights"),
            good,
            _restated(good, changed={ENGINE: onnx_model("../../../../etc/passwd")}),
        ),
        _made(
            "external-data-beside",
            "The graph's weights lie in a file beside it.",
            ("model.onnx", "its weights lie outside the bundle: 'weights.bin'"),
            good,
            _restated(good, changed={ENGINE: onnx_model("weights.bin"), "artifacts/weights.bin": bytes(2560)}),
        ),
        _made(
            "pickle",
            "In place of the engine lies a pickle that runs a command.",
            ("model.onnx", "pickle"),
            good,
            _restated(good, changed={ENGINE: pickled}),
        ),
        _made(
            "pickle-in-a-package",
            "In place of an AOTInductor package lies what torch.save wrote.",
            ("model.pt2", "pickle"),
            good,
            package(stored({"model/data.pkl": pickled, "model/version": b"3\n"})),
        ),
        _made(
            "package-path-traversal",
            "A package holds a file that would be written outside its folder.",
            ("model.pt2", "which would be written outside the package's folder"),
            good,
            package(stored({"model/archive_format": b"pt2", "model/../../outside.so": b"\x7fELF"})),
        ),
        _made(
            "zip-bomb",
            f"A package of 1.6 MiB would unpack to {mib} MiB.",
            ("model.pt2", f"would unpack to {mib * 2**20}: more than 100 times"),
            good,
            bombed,
            do=(_op("bomb", "bundle/artifacts/model.pt2", mib=mib),),
        ),
    ]


def write(folder: Path) -> None:
    """Write everything into an empty folder."""
    good = good_files()
    content: Files = {f"good/{name}": data for name, data in good.items()}
    content |= {f"keys/test-only-{name}.pem": _pem(name) for name in KEYS}
    content["keys/README.md"] = README.encode()
    for artefact in artefacts(good):
        content[f"broken/{artefact.name}/about.toml"] = artefact.about()
        content |= {f"broken/{artefact.name}/{name}": data for name, data in artefact.files.items()}
    for name, data in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


if __name__ == "__main__":
    if FOLDER.exists():
        shutil.rmtree(FOLDER)
    write(FOLDER)
