"""Sealed bundles: written whole, checked before anything in them is opened.

    bundle/artifacts/model.plan (or model.onnx, model.pt2), metadata.json, calibration.cache, fallback.onnx
    bundle/baseline/baseline.json       where the engine was judged by one
    bundle/evidence/metrics.json, environment.json, scores.json, latency.json
    bundle/policy/gate.toml
    bundle/seals/verdict.dsse.json      in-toto Statement v1 over every file above, in a DSSE envelope
    bundle/seals/approval-*.dsse.json   approvals of that verdict

What is here looks at a bundle alone: that it is whole, and follows from its own numbers. Whoever can rewrite every file of
a bundle can make one of which that holds; whose signature is on it, and what it may be deployed as, `gate.verification`
asks a trust policy.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import io
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

import msgspec

from gate import atomic
from gate.baseline import baseline_from_bytes
from gate.errors import BaselineError, BundleError, DigestMismatch, GateError, SpecError, VerificationError
from gate.latency.config import latency_limits
from gate.manifest import (
    MAX_JSON_BYTES,
    FileDigest,
    RelativePath,
    canonical_json,
    pretty_json,
    sha256_hex,
    strict_json,
)
from gate.metadata import (
    LATENCY_PATH,
    METADATA_PATH,
    LatencyEvidence,
    Metadata,
    asked_otherwise,
    contradictions,
    latency_evidence,
    latency_from_bytes,
    metadata_bytes,
    metadata_from_bytes,
    metadata_of,
    sealed_scores,
)
from gate.release.statements import (
    IN_TOTO,
    Envelope,
    Size,
    StatedDevice,
    StatedFinding,
    Subject,
    SubjectDigest,
    VerdictPredicate,
    VerdictStatement,
    envelope_from_bytes,
    payload_of,
    statement_from_payload,
)
from gate.results import CheckRun, EngineResult, builtins_from
from gate.spec import JudgedEngine, judged_engine_of
from gate.tolerances import findings_again
from gate.verdict import Evidence, Finding, PassedVerdict

VERDICT_PATH = "seals/verdict.dsse.json"
BASELINE_PATH = "baseline/baseline.json"
METRICS_PATH = "evidence/metrics.json"
SCORES_PATH = "evidence/scores.json"
"""What each sample contributes to the task's values."""
ENVIRONMENT_PATH = "evidence/environment.json"
SPEC_PATH = "policy/gate.toml"
CALIBRATION_PATH = "artifacts/calibration.cache"
ENGINE_PATHS = ("artifacts/model.onnx", "artifacts/model.plan", "artifacts/model.pt2")
MAX_FILES = 1000
VALID_DAYS = 90
"""How long a verdict holds where nobody says how long."""
_APPROVAL = re.compile(r"seals/approval-[0-9a-f]{16}-[A-Za-z0-9][A-Za-z0-9_.-]{0,59}\.dsse\.json")
_NAME = re.compile(r"[A-Za-z0-9_.+-]+")
"""Of a file or folder in a bundle; any other could make a terminal show what is not so."""
_READ = (
    METADATA_PATH,
    METRICS_PATH,
    SCORES_PATH,
    ENVIRONMENT_PATH,
    LATENCY_PATH,
    BASELINE_PATH,
    SPEC_PATH,
    CALIBRATION_PATH,
)


class Signs(Protocol):
    """What signs the verdict, such as gate.signing.KeySigner."""

    def sign(self, payload: bytes, payload_type: str) -> Envelope:
        """An envelope with one signature over the payload."""
        ...


@dataclass(frozen=True)
class Release:
    """What the verdict of a bundle is signed for.

    Args:
        slots: What it may be deployed as.
        serial: Higher than that of each verdict before it, of the same model and slots; None: the time of the check, in
            seconds since 1970.
        valid_days: How long it holds, from the check on.
        signer: Signs it; None: nobody does.
    """

    slots: tuple[str, ...] = ()
    serial: int | None = None
    valid_days: float = VALID_DAYS
    signer: Signs | None = None


@dataclass(frozen=True)
class Step:
    """One step of a verification.

    Args:
        name: `tree`, `policy`, `signature`, `schema`, `digests`, `subject`, `verdict`, `freshness`, `approvals`.
        ok: Whether it holds.
        detail: What was looked at, or what is wrong.
    """

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class SealedBundle:
    """A bundle whose every file is what was sealed, at the moment it was read. Nothing says who sealed it.

    Args:
        folder: Where it lies.
        metadata: Of its engine.
        statement: That lists its files.
        verdict_sha256: Of the statement's bytes, which a signature is over.
        signed_by: Ids of the keys that are said to have signed; nobody looked whether they did.
        files: Every file but the seals, by its path in the bundle.
        engine: The engine's file.
        steps: What was looked at, in order.
    """

    folder: Path
    metadata: Metadata
    statement: VerdictStatement
    verdict_sha256: str
    signed_by: tuple[str, ...]
    files: Mapping[str, FileDigest]
    engine: Path
    steps: tuple[Step, ...]


def approval_path(keyid: str, slot: str) -> str:
    """Where the approval by a key, for a slot, lies in a bundle."""
    return f"seals/approval-{keyid[:16]}-{slot}.dsse.json"


def seal(
    passed: PassedVerdict,
    *,
    run: CheckRun,
    result: EngineResult,
    engine_file: Path,
    extra: Mapping[str, bytes | Path],
    out: Path,
    replace: bool = False,
    release: Release | None = None,
) -> SealedBundle:
    """Write a bundle of an engine that passed. It appears whole, in one rename, and has been checked by then.

    Sealing the same run again gives the same statement, and finds the bundle there.

    Args:
        passed: The engine's verdict.
        run: What it was made from.
        result: One of the run's engines, with its raw latencies.
        engine_file: The engine; copied, and hashed while it is.
        extra: More files by their path in the bundle: `policy/gate.toml`, the spec's bytes, always;
            `baseline/baseline.json` where the engine was judged by one; `artifacts/calibration.cache` where TensorRT
            calibrated it; `artifacts/fallback.onnx`, the graph it was compiled from.
        out: The bundle's folder.
        replace: Take the place of another bundle that is there. What is no bundle is never replaced.
        release: What the verdict is signed for, and who signs it.

    Raises:
        BundleError: The verdict is not this engine's, a file is missing, reserved or ill-named, the spec or the baseline
            is not the one it was judged by, or `out` is taken.
        DigestMismatch: The engine's file is not the one that was checked.
        SigningError: The signer cannot sign.
        GateError: The disk is full or may not be written to.
    """
    release = release or Release()
    _require_one_story(passed, run, result)
    _require_extra(extra, result)
    with_evidence: dict[str, bytes | Path] = {**extra, **_evidence(run, result)}
    taken = _is_taken(out)
    if taken and replace and not _is_bundle(out):
        raise BundleError("is there already and is no bundle, so it is not replaced", where=str(out))
    with atomic.folder(out, existing="replace" if replace else "keep") as temporary:
        made = temporary.stat()
        files = {engine_path_of(result.backend): _copy_engine(engine_file, temporary, result)}
        for name, content in sorted(with_evidence.items()):
            files[name] = _write(temporary / name, content)
        metadata = metadata_of(run, result, dict(sorted(files.items())))
        data = metadata_bytes(metadata)
        files[METADATA_PATH] = _write(temporary / METADATA_PATH, data)
        payload = payload_of(_statement(metadata, files, release_of(release, metadata.created)))
        envelope = Envelope(payload, IN_TOTO, ()) if release.signer is None else release.signer.sign(payload, IN_TOTO)
        _write(temporary / VERDICT_PATH, envelope.to_bytes())
        try:
            sealed = verify_seal(temporary, known=files)
        except GateError as err:
            raise BundleError(
                f"engine {result.name!r} cannot be sealed: {_inside(err, temporary)}", where=str(out)
            ) from err
    there = out.stat()
    if (there.st_dev, there.st_ino) == (made.st_dev, made.st_ino):
        return _moved(sealed, out)
    try:
        kept = verify_seal(out)
    except BundleError as err:
        raise BundleError(
            "is there already and does not verify, so it was kept", where=str(out), hint=str(err)
        ) from err
    if kept.verdict_sha256 != sha256_hex(payload) or kept.signed_by != tuple(
        each.keyid for each in envelope.signatures
    ):
        other = (
            "another bundle" if kept.verdict_sha256 != sha256_hex(payload) else "the same one, not signed by this key"
        )
        raise BundleError(
            f"is there already and holds {other}",
            where=str(out),
            hint="Seal into another folder, or replace it.",
        )
    return kept


def release_of(release: Release, created: str) -> _Stated:
    """What the statement says of a release: slots in order, serial, and its end.

    Raises:
        BundleError: It would end before it began, or beyond the calendar.
    """
    began = dt.datetime.fromisoformat(created.replace("Z", "+00:00"))
    if not (math.isfinite(release.valid_days) and release.valid_days > 0):
        raise BundleError(f"a verdict cannot hold for {release.valid_days:g} days")
    try:
        ends = began + dt.timedelta(days=release.valid_days)
    except OverflowError:
        raise BundleError(f"a verdict cannot hold for {release.valid_days:g} days") from None
    serial = int(began.timestamp()) if release.serial is None else release.serial
    return _Stated(tuple(sorted(set(release.slots))), serial, ends.strftime("%Y-%m-%dT%H:%M:%SZ"))


@dataclass(frozen=True)
class _Stated:
    """What a statement says that does not follow from the metadata."""

    slots: tuple[str, ...]
    serial: int
    not_after: str


def _moved(sealed: SealedBundle, out: Path) -> SealedBundle:
    engine = out / sealed.engine.relative_to(sealed.folder)
    return dataclasses.replace(sealed, folder=out, engine=engine)


def engine_path_of(backend: str) -> str:
    """The engine's path in a bundle: `artifacts/model.onnx`, for PyTorch `artifacts/model.pt2`, else `artifacts/model.plan`."""
    return {"onnxruntime": ENGINE_PATHS[0], "torch": ENGINE_PATHS[2]}.get(backend, ENGINE_PATHS[1])


def _require_one_story(passed: PassedVerdict, run: CheckRun, result: EngineResult) -> None:
    if result.verdict is None or passed.verdict != result.verdict:
        raise BundleError(f"the verdict is not that of engine {result.name!r}")
    if not any(each is result or each == result for each in run.engines):
        raise BundleError(f"engine {result.name!r} is not one of this run's")
    if result.engine_sha256 is None:
        raise BundleError(f"engine {result.name!r} has no file that was checked")
    for latency in result.latencies:
        if len(latency.durations_ns) != latency.n or any(
            len(each.pairs) != each.sessions for each in latency.comparisons
        ):
            raise BundleError(
                f"engine {result.name!r} has {len(latency.durations_ns)} raw latencies of {latency.n}; "
                "seal from the run itself, not from its report"
            )


def _require_extra(extra: Mapping[str, bytes | Path], result: EngineResult) -> None:
    reserved = {METADATA_PATH, LATENCY_PATH, METRICS_PATH, SCORES_PATH, ENVIRONMENT_PATH, *ENGINE_PATHS}
    for name in extra:
        try:
            msgspec.convert(name, RelativePath)
        except msgspec.ValidationError as err:
            raise BundleError(f"{name!r} cannot be a file of a bundle") from err
        if name in reserved or name.startswith("seals/"):
            raise BundleError(f"{name!r} is written by sealing itself")
    if SPEC_PATH not in extra:
        raise BundleError(f"a bundle needs the spec it was judged by, as {SPEC_PATH}")
    if (BASELINE_PATH in extra) != (result.baseline_sha256 is not None):
        expected = "none" if result.baseline_sha256 is None else f"{result.baseline_sha256[:12]}…"
        raise BundleError(f"{BASELINE_PATH} does not fit: engine {result.name!r} was judged by baseline {expected}")
    if (CALIBRATION_PATH in extra) != (result.build is not None and "calibration_cache" in result.build.digests):
        raise BundleError(f"{CALIBRATION_PATH} goes with an engine that TensorRT calibrated, and with no other")


def _evidence(run: CheckRun, result: EngineResult) -> dict[str, bytes]:
    environment = {
        "device": builtins_from(run.device),
        "created": run.created,
        "gate_version": run.gate_version,
        "reference": run.provenance.reference,
        "seconds": dict(run.seconds),
        "notes": list(result.notes),
        "data": run.data,
    }
    files = {
        METRICS_PATH: pretty_json(
            {
                "outputs": builtins_from(result.outputs),
                "task": builtins_from(result.task),
                "scores": builtins_from(sealed_scores(result.scores)),
            }
        ),
        ENVIRONMENT_PATH: pretty_json(environment),
    }
    if result.scores is not None:
        files[SCORES_PATH] = pretty_json({"kind": result.scores.kind, "statistics": result.scores.statistics})
    if (latency := latency_evidence(result)) is not None:
        files[LATENCY_PATH] = canonical_json(msgspec.to_builtins(latency))
    return files


def _copy_engine(engine_file: Path, folder: Path, result: EngineResult) -> FileDigest:
    target = folder / engine_path_of(result.backend)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic.open_regular(engine_file) as source, target.open("xb") as copy:
        digest = atomic.copy_hashed(source, copy)
    if digest.sha256 != result.engine_sha256:
        raise DigestMismatch(
            f"is not the engine that was checked: its sha256 is {digest.sha256[:12]}…, "
            f"checked was {str(result.engine_sha256)[:12]}…",
            where=str(engine_file),
            hint="It was changed after the check; run the check again.",
        )
    return digest


def _write(path: Path, content: bytes | Path) -> FileDigest:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        with path.open("xb") as file:
            file.write(content)
        return FileDigest(sha256=sha256_hex(content), size_bytes=len(content))
    with atomic.open_regular(content) as source, path.open("xb") as copy:
        return atomic.copy_hashed(source, copy)


def _statement(metadata: Metadata, files: Mapping[str, FileDigest], stated: _Stated) -> VerdictStatement:
    return VerdictStatement(
        subject=tuple(
            Subject(name, SubjectDigest(files[name].sha256), Size(files[name].size_bytes)) for name in sorted(files)
        ),
        predicate=VerdictPredicate(
            status=metadata.verdict.status,
            evidence=metadata.verdict.evidence.value,
            model_id=metadata.model_id,
            engine=metadata.engine,
            slots=stated.slots,
            serial=stated.serial,
            created=metadata.created,
            not_after=stated.not_after,
            metadata_sha256=files[METADATA_PATH].sha256,
            engine_sha256=files[engine_path_of(metadata.backend)].sha256,
            digests=metadata.digests,
            device=StatedDevice(
                name=metadata.device.name,
                compute_capability=metadata.device.compute_capability,
                driver=metadata.device.driver,
            ),
            findings=tuple(
                StatedFinding(
                    check=each.check,
                    estimate=each.estimate,
                    lower=each.interval.lower,
                    upper=each.interval.upper,
                    kind=each.limit.kind,
                    limit=each.limit.value,
                    n=each.n,
                    outcome=each.finding().status.value,
                    evidence=each.evidence.value,
                )
                for each in metadata.verdict.findings
            ),
            gate_version=metadata.gate_version,
        ),
    )


def _is_taken(out: Path) -> bool:
    """Whether something is there that a rename does not simply replace: anything but an empty folder."""
    try:
        return not stat.S_ISDIR(out.lstat().st_mode) or any(out.iterdir())
    except FileNotFoundError:
        return False


def _is_bundle(out: Path) -> bool:
    return stat.S_ISDIR(out.lstat().st_mode) and (out / VERDICT_PATH).is_file()


def _inside(err: GateError, folder: Path) -> str:
    where = str(err.where or "").removeprefix(f"{folder}{os.sep}")
    return f"{where}: {err.message}" if where else err.message


def verify_seal(
    bundle: Path,
    *,
    require_evidence: Evidence | None = None,
    on_step: Callable[[Step], None] | None = None,
    known: Mapping[str, FileDigest] | None = None,
) -> SealedBundle:
    """Check a bundle by itself: nothing in it is loaded, each file is opened once, the first thing that is wrong ends it.

    Args:
        bundle: Its folder.
        require_evidence: The least evidence that its verdict may rest on.
        on_step: Told each step when it is done, the one that fails included.
        known: Digests of files that this process wrote there and hashed as it did; they are not hashed again.

    Raises:
        BundleError: It is not there, or a file is missing, a link, or not strict JSON.
        DigestMismatch: A file's bytes are not the bytes that were sealed.
        VerificationError: Files were added or removed, or the metadata contradicts its schema or its own numbers.
    """
    check = SealCheck(bundle, known=known or {})
    steps = Steps(bundle, on_step)
    with check:
        steps.take("tree", check.tree)
        steps.take("signature", check.said_signed)
        steps.take("schema", check.schema)
        steps.take("digests", check.digests)
        steps.take("verdict", lambda: check.verdict(require_evidence))
    return SealedBundle(
        folder=bundle,
        metadata=check.metadata,
        statement=check.statement,
        verdict_sha256=check.verdict_sha256,
        signed_by=tuple(each.keyid for each in check.envelope.signatures),
        files=dict(check.files),
        engine=bundle / check.engine,
        steps=tuple(steps.taken),
    )


class Steps:
    """The steps of a verification as they are taken; the first that fails ends it."""

    def __init__(self, bundle: Path, on_step: Callable[[Step], None] | None) -> None:
        self.bundle = bundle
        self.on_step = on_step
        self.taken: list[Step] = []

    def take(self, name: str, step: Callable[[], str]) -> None:
        """Take one step and tell how it went.

        Raises:
            GateError: As the step.
        """
        try:
            done = Step(name, ok=True, detail=step())
        except GateError as err:
            self._tell(Step(name, ok=False, detail=_inside(err, self.bundle)))
            raise
        self._tell(done)

    def _tell(self, step: Step) -> None:
        self.taken.append(step)
        if self.on_step is not None:
            self.on_step(step)


@dataclass
class SealCheck:
    """The state of one look at a bundle: what each step leaves to the next. The steps are called in their order here.

    Closing it closes the files that it kept open.

    Args:
        bundle: The folder.
        known: As for `verify_seal`.
        keep_open: Keep a descriptor of each file below `artifacts/` and `policy/`: the one that was hashed.
    """

    bundle: Path
    known: Mapping[str, FileDigest] = field(default_factory=dict)
    keep_open: bool = False
    names: tuple[str, ...] = ()
    approvals: tuple[str, ...] = ()
    envelope: Envelope = field(init=False)
    verdict_sha256: str = ""
    statement: VerdictStatement = field(init=False)
    metadata: Metadata = field(init=False)
    engine: str = ""
    files: dict[str, FileDigest] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    opened: dict[str, BinaryIO] = field(default_factory=dict)

    def __enter__(self) -> SealCheck:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every file that was kept open."""
        while self.opened:
            self.opened.popitem()[1].close()

    def where(self, name: str) -> str:
        """A file of the bundle, for errors."""
        return str(self.bundle / name)

    def tree(self) -> str:
        """Regular files only, one link each; no links, no dot-files, no empty folders, no pipes."""
        found = tuple(sorted(_names(self.bundle, "")))
        for name in (VERDICT_PATH, METADATA_PATH):
            if name not in found:
                raise VerificationError("is missing", where=self.where(name))
        seals = [name for name in found if name.startswith("seals/")]
        self.approvals = tuple(name for name in seals if _APPROVAL.fullmatch(name))
        if added := sorted({*seals} - {*self.approvals, VERDICT_PATH}):
            raise VerificationError("was not sealed: it was added", where=self.where(added[0]))
        self.names = tuple(name for name in found if name not in seals)
        return f"{len(self.names)} files, regular, no links"

    def read_envelope(self) -> Envelope:
        """The envelope of the verdict, whose payload is not looked at yet."""
        where = self.where(VERDICT_PATH)
        data = atomic.read_regular(self.bundle / VERDICT_PATH, limit_bytes=MAX_JSON_BYTES, single_link=True)
        self.envelope = envelope_from_bytes(data, payload_type=IN_TOTO, where=where)
        self.verdict_sha256 = sha256_hex(self.envelope.payload)
        return self.envelope

    def said_signed(self) -> str:
        """What the envelope says of its signatures, which nobody looks at without a policy."""
        signatures = self.read_envelope().signatures
        if not signatures:
            return "not signed"
        said = ", ".join(f"key {each.keyid[:12]}…" for each in signatures)
        return f"by {said}; not checked without --policy"

    def schema(self) -> str:
        """Statement and metadata are what their schemas allow; the statement lists exactly the files that are there."""
        where = self.where(VERDICT_PATH)
        self.statement = statement_from_payload(self.envelope.payload, VerdictStatement, where=where)
        status = self.statement.predicate.status
        if status != "PASSED":
            raise VerificationError(f"its verdict is {status}: only what PASSED is released", where=where)
        listed = [subject.name for subject in self.statement.subject]
        if len(set(listed)) != len(listed):
            raise VerificationError("lists a file twice", where=where)
        added = sorted(set(self.names) - set(listed))
        if missing := sorted(set(listed) - set(self.names)):
            hint = f"Not sealed, and there: {added[0]}" if added else None
            raise VerificationError("was sealed and is missing", where=self.where(missing[0]), hint=hint)
        if added:
            raise VerificationError("was not sealed: it was added", where=self.where(added[0]))
        engines = [name for name in listed if name in ENGINE_PATHS]
        if METADATA_PATH not in listed or len(engines) != 1:
            raise VerificationError("does not list one engine and its metadata", where=where)
        self.engine = engines[0]
        self._hash(next(each for each in self.statement.subject if each.name == METADATA_PATH))
        where = self.where(METADATA_PATH)
        self.metadata = metadata_from_bytes(self.contents[METADATA_PATH], where=where)
        return "metadata.json, verdict statement"

    def digests(self) -> str:
        """Every file hashed, from one opening of it; what later steps read is what was hashed."""
        for subject in self.statement.subject:
            if subject.name not in self.files:
                self._hash(subject)
        where = self.where(METADATA_PATH)
        others = {name: digest for name, digest in self.files.items() if name != METADATA_PATH}
        for name in sorted({*others, *self.metadata.files}):
            if others.get(name) != self.metadata.files.get(name):
                raise DigestMismatch(f"files[{name!r}] is not what the statement lists", where=where)
        if engine_path_of(self.metadata.backend) not in others:
            raise VerificationError(
                f"backend {self.metadata.backend!r} has its engine in {engine_path_of(self.metadata.backend)}",
                where=where,
            )
        count = len(self.files)
        return f"{count} of {count}"

    def _hash(self, subject: Subject) -> None:
        """Hash one file as it is read; what is read again later is kept in memory, or open."""
        name, path = subject.name, self.bundle / subject.name
        kept = io.BytesIO() if name in _READ else None
        stream = atomic.open_regular(path, single_link=True)
        try:
            if kept is not None and os.fstat(stream.fileno()).st_size > MAX_JSON_BYTES:
                raise VerificationError(f"is too long: the limit is {MAX_JSON_BYTES} bytes", where=str(path))
            size_bytes = os.fstat(stream.fileno()).st_size
            if size_bytes != subject.annotations.size_bytes:
                raise DigestMismatch(
                    f"its sha256 is another: it has {size_bytes} bytes, sealed were {subject.annotations.size_bytes}",
                    where=str(path),
                )
            hashed = self.known.get(name) if kept is None else None
            got = atomic.digest_of_stream(stream, copy_to=kept) if hashed is None else hashed
            if got.sha256 != subject.digest.sha256:
                raise DigestMismatch(
                    f"its sha256 is {got.sha256[:12]}…, sealed was {subject.digest.sha256[:12]}…", where=str(path)
                )
            self.files[name] = got
            if kept is not None:
                self.contents[name] = kept.getvalue()
            if self.keep_open and name.startswith(("artifacts/", "policy/")):
                self.opened[name] = stream
        finally:
            if name not in self.opened:
                stream.close()

    def verdict(self, require_evidence: Evidence | None) -> str:
        """Every status computed again from its numbers, and the numbers from the files beside them."""
        where = self.where(METADATA_PATH)
        for message in contradictions(self.metadata, self.latency()):
            raise VerificationError(message, where=where)
        self._same_story()
        self.evidence()
        verdict = self.metadata.verdict
        if require_evidence is not None and verdict.evidence.rank < require_evidence.rank:
            raise VerificationError(
                f"its evidence is {verdict.evidence.value!r}, asked for is {require_evidence.value!r}", where=where
            )
        count = len(verdict.findings)
        return f"{verdict.status}, {count} findings recomputed, evidence: {verdict.evidence.value}"

    def _same_story(self) -> None:
        """The statement says what the metadata says."""
        said = self.statement.predicate
        if self.statement != _statement(
            self.metadata, self.files, _Stated(tuple(sorted(set(said.slots))), said.serial, said.not_after)
        ):
            raise VerificationError(
                "its predicate or order is not that of the metadata", where=self.where(VERDICT_PATH)
            )

    def latency(self) -> LatencyEvidence | None:
        """Every raw latency; None where the engine was not timed."""
        data = self.contents.get(LATENCY_PATH)
        return None if data is None else latency_from_bytes(data, where=self.where(LATENCY_PATH))

    def evidence(self) -> None:
        """The files beside the engine say what the metadata says."""
        digests = self.metadata.digests
        raw = strict_json(self.contents[METADATA_PATH])
        for name, key in ((METRICS_PATH, "metrics"), (ENVIRONMENT_PATH, "device")):
            content = strict_json(self.require(name), where=self.where(name))
            value = content if key == "metrics" else content.get("device") if isinstance(content, dict) else None
            if value != raw[key]:
                raise VerificationError(f"differs from {key} in the metadata", where=self.where(name))
        if sha256_hex(self.require(SPEC_PATH)) != digests.spec:
            raise DigestMismatch("is not the spec that the engine was judged by", where=self.where(SPEC_PATH))
        engine = self.judged_engine()
        self.parity(engine)
        self.latency_limits(engine)
        where = self.where(BASELINE_PATH)
        if (BASELINE_PATH in self.contents) != (digests.baseline is not None):
            raise VerificationError("the metadata and the bundle do not agree on a baseline", where=where)
        if BASELINE_PATH in self.contents:
            try:
                baseline = baseline_from_bytes(self.contents[BASELINE_PATH], where=where)
            except BaselineError as err:
                raise VerificationError(err.message, where=where) from err
            if baseline.digest != digests.baseline:
                raise DigestMismatch("is not the baseline that the engine was judged by", where=where)
            self.accepted_engine(baseline.engine_sha256)
        self.scores()
        self.calibration()

    def judged_engine(self) -> JudgedEngine:
        """What the sealed spec asks of the engine."""
        where = self.where(SPEC_PATH)
        try:
            engine = judged_engine_of(self.contents[SPEC_PATH], self.metadata.engine)
        except SpecError as err:
            raise VerificationError(err.message, where=where) from err
        if engine.precision != self.metadata.precision:
            raise VerificationError(
                f"asks for precision {engine.precision}, the metadata has {self.metadata.precision}", where=where
            )
        return engine

    def parity(self, engine: JudgedEngine) -> None:
        """The findings on parity are those that the spec asks for, with its limits, and the numbers of the metrics.

        What never ran has none.
        """
        where = self.where(SPEC_PATH)
        said = {
            each.check: each.finding() for each in self.metadata.verdict.findings if each.check.startswith("parity.")
        }
        outputs, evidence = self.metadata.metrics.outputs, self.metadata.verdict.evidence
        asked: dict[str, Finding] = {}
        if engine.parity is not None and not (evidence is Evidence.PREFLIGHT and not outputs):
            if not outputs:
                raise VerificationError("asks for parity, the metadata has no output that was compared", where=where)
            try:
                again = findings_again(outputs, engine=engine, evidence=evidence)
            except SpecError as err:
                raise VerificationError(err.message, where=where) from err
            asked = {each.check: each for each in again}
        for check in dict.fromkeys([*asked, *said]):
            expected, got = asked.get(check), said.get(check)
            if expected is None or got is None:
                there = "and the metadata has it not" if got is None else "which is in the metadata"
                raise VerificationError(f"asks {'' if got is None else 'not '}for {check}, {there}", where=where)
            if (got.limit.kind, got.limit.value) != (expected.limit.kind, expected.limit.value):
                raise VerificationError(
                    f"asks for {check} with a limit of {expected.limit.value:.6g}, the metadata has "
                    f"{got.limit.value:.6g}",
                    where=where,
                )
            _require_same_numbers(got, expected, rebuilt=engine.rebuilds > 1, where=self.where(METADATA_PATH))

    def latency_limits(self, engine: JudgedEngine) -> None:
        """The latency findings are those that the spec asks for, with its limits, of what it says is timed.

        What never ran has none.
        """
        if self.metadata.verdict.evidence is Evidence.PREFLIGHT and not self.metadata.latency:
            return
        where = self.where(SPEC_PATH)
        try:
            tables = engine.latency
            asked = latency_limits(tables)
            for message in asked_otherwise(self.metadata.latency, tables):
                raise VerificationError(message, where=where)
        except SpecError as err:
            raise VerificationError(err.message, where=where) from err
        said = {
            each.check: each.limit.value for each in self.metadata.verdict.findings if each.check.startswith("latency.")
        }
        for check in dict.fromkeys([*asked, *said]):
            if asked.get(check) != said.get(check):
                raise VerificationError(
                    f"asks for {check} with a limit of {asked.get(check, 'none')}, the metadata has "
                    f"{said.get(check, 'none')}",
                    where=where,
                )

    def accepted_engine(self, sha256: str | None) -> None:
        """What was called the baseline's engine is that engine."""
        for latency in self.metadata.latency:
            for each in latency.comparisons:
                if each.against == "baseline" and each.sha256 != sha256:
                    raise VerificationError(
                        f"was accepted with engine {str(sha256)[:12]}…, the latency was compared with "
                        f"{str(each.sha256)[:12]}…",
                        where=self.where(BASELINE_PATH),
                    )

    def scores(self) -> None:
        """The task's values, where there is such a task, are those that the samples' contributions give."""
        where = self.where(SCORES_PATH)
        said = self.metadata.metrics.scores
        if (said is None) != (SCORES_PATH not in self.contents):
            raise VerificationError("the metadata and the bundle do not agree on the task's scores", where=where)
        if said is None:
            return
        from gate.metrics.findings import TILED, unpacked
        from gate.metrics.kinds import kind_named

        content = strict_json(self.contents[SCORES_PATH], where=where)
        if not isinstance(content, dict) or content.get("kind") != said.kind:
            raise VerificationError(f"is not of {said.kind}", where=where)
        try:
            found = kind_named(said.kind).read(unpacked(str(content.get("statistics"))))
            again = found.values()
        except GateError as err:
            raise VerificationError(err.message, where=where, hint=err.hint) from err
        if found.samples != said.samples:
            raise VerificationError(f"holds {found.samples} samples, the metadata says {said.samples}", where=where)
        for name, value in said.values.items():
            # What was found over tiles has no statistics of its own in the bundle.
            if not name.startswith(TILED) and not math.isclose(
                again.get(name, math.nan), value, rel_tol=1e-9, abs_tol=1e-12
            ):
                raise VerificationError(
                    f"gives {name} = {again.get(name, math.nan):.6g}, the metadata says {value:.6g}", where=where
                )

    def calibration(self) -> None:
        """The ranges that TensorRT calibrated are those that the engine was built with."""
        where = self.where(CALIBRATION_PATH)
        expected = self.metadata.build.digests.get("calibration_cache")
        if (expected is None) != (CALIBRATION_PATH not in self.contents):
            raise VerificationError("the metadata and the bundle do not agree on a calibration cache", where=where)
        if expected is not None:
            _, _, ranges = self.contents[CALIBRATION_PATH].partition(b"\n")
            if sha256_hex(ranges) != expected:
                raise DigestMismatch("holds other ranges than the engine was built with", where=where)

    def require(self, name: str) -> bytes:
        """The bytes of a file that each bundle has."""
        if name not in self.contents:
            raise VerificationError("is missing", where=self.where(name))
        return self.contents[name]


def _require_same_numbers(got: Finding, expected: Finding, *, rebuilt: bool, where: str) -> None:
    """A finding has the numbers of the metrics; of several builds the interval covers them all."""
    bounds = (got.interval.lower, expected.interval.lower), (got.interval.upper, expected.interval.upper)
    same = math.isclose(got.estimate, expected.estimate, rel_tol=1e-9, abs_tol=1e-12) and got.n == expected.n
    if rebuilt:
        same = same and bounds[0][0] <= bounds[0][1] and bounds[1][0] >= bounds[1][1]
    else:
        same = same and all(math.isclose(*each, rel_tol=1e-9, abs_tol=1e-12) for each in bounds)
    if not same:
        raise VerificationError(
            f"{got.check} is {got.estimate:.6g} on {got.n}, its metrics give {expected.estimate:.6g} on {expected.n}",
            where=where,
        )


def _names(folder: Path, prefix: str, depth: int = 0) -> Iterator[str]:
    """Paths of the files of a bundle, relative to it.

    Raises:
        BundleError: The folder is not there.
        VerificationError: It holds a link, a dot-file, an empty folder or something that is no file.
    """
    try:
        mode = folder.lstat().st_mode
        if stat.S_ISLNK(mode):
            leads = f"Give what it leads to: {folder.resolve()}"
            raise VerificationError("is a symbolic link, not a bundle", where=str(folder), hint=leads)
        if not stat.S_ISDIR(mode):
            raise VerificationError("is not a folder", where=str(folder))
        with os.scandir(folder) as listing:
            items = sorted(listing, key=lambda each: each.name)
    except OSError as err:
        missing = isinstance(err, FileNotFoundError)
        raise BundleError("there is no bundle" if missing else f"cannot be read: {err}", where=str(folder)) from err
    if not items:
        raise VerificationError("is an empty folder", where=str(folder))
    if len(items) > MAX_FILES or depth > 8:
        raise VerificationError("holds more files or deeper folders than a bundle has", where=str(folder))
    for item in items:
        status = item.stat(follow_symlinks=False)
        if not _NAME.fullmatch(item.name):
            raise VerificationError(f"holds {item.name!r:.200}, which no file of a bundle is called", where=str(folder))
        if item.name.startswith("."):
            raise VerificationError("is a dot-file", where=item.path)
        if stat.S_ISDIR(status.st_mode):
            yield from _names(Path(item.path), f"{prefix}{item.name}/", depth + 1)
        elif stat.S_ISLNK(status.st_mode):
            raise VerificationError("is a symbolic link", where=item.path)
        elif not stat.S_ISREG(status.st_mode):
            raise VerificationError("is not a regular file", where=item.path)
        elif status.st_nlink != 1:
            raise VerificationError(f"has {status.st_nlink} hard links, may have 1", where=item.path)
        else:
            yield f"{prefix}{item.name}"
