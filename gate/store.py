"""Sealed bundles: written whole, verified before anything in them is opened.

    bundle/artifacts/model.plan (or model.onnx, model.pt2), metadata.json, calibration.cache
    bundle/baseline/baseline.json       where the engine was judged by one
    bundle/evidence/metrics.json, environment.json, scores.json, latency.json
    bundle/policy/gate.toml
    bundle/seals/manifest.json          in-toto Statement v1 over every file above

The statement is not signed: `verify` finds what was damaged, added, removed or edited in part. Whoever can rewrite every
file of a bundle can make one that verifies, so a bundle is as trustworthy as the place it was taken from.
"""

from __future__ import annotations

import io
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from gate import atomic
from gate.baseline import baseline_from_bytes
from gate.errors import BaselineError, BundleError, DigestMismatch, GateError, SpecError, VerificationError
from gate.latency.config import latency_limits
from gate.manifest import (
    MAX_JSON_BYTES,
    FileDigest,
    Predicate,
    RelativePath,
    Statement,
    Subject,
    SubjectDigest,
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
from gate.metrics.findings import TILED, unpacked
from gate.metrics.kinds import kind_named
from gate.results import CheckRun, EngineResult, builtins_from
from gate.spec import latency_tables_of
from gate.verdict import Evidence, PassedVerdict

MANIFEST_PATH = "seals/manifest.json"
BASELINE_PATH = "baseline/baseline.json"
METRICS_PATH = "evidence/metrics.json"
SCORES_PATH = "evidence/scores.json"
"""What each sample contributes to the task's values."""
ENVIRONMENT_PATH = "evidence/environment.json"
SPEC_PATH = "policy/gate.toml"
CALIBRATION_PATH = "artifacts/calibration.cache"
ENGINE_PATHS = ("artifacts/model.onnx", "artifacts/model.plan", "artifacts/model.pt2")
MAX_FILES = 1000
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


@dataclass(frozen=True)
class Step:
    """One step of a verification.

    Args:
        name: `tree`, `statement`, `digests`, `schema`, `verdict`, `evidence`.
        ok: Whether it holds.
        detail: What was looked at, or what is wrong.
    """

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class VerifiedBundle:
    """A bundle whose every file is what was sealed, at the moment it was read.

    Args:
        folder: Where it lies.
        metadata: Of its engine.
        statement: That lists its files.
        files: Every file but the seals, by its path in the bundle.
        engine: The engine's file.
        steps: What was verified, in order.
    """

    folder: Path
    metadata: Metadata
    statement: Statement
    files: Mapping[str, FileDigest]
    engine: Path
    steps: tuple[Step, ...]


def seal(
    passed: PassedVerdict,
    *,
    run: CheckRun,
    result: EngineResult,
    engine_file: Path,
    extra: Mapping[str, bytes | Path],
    out: Path,
    replace: bool = False,
) -> VerifiedBundle:
    """Write a bundle of an engine that passed. It appears whole, in one rename, and has been verified by then.

    Sealing the same run again gives the same bytes, and finds the bundle there.

    Args:
        passed: The engine's verdict.
        run: What it was made from.
        result: One of the run's engines, with its raw latencies.
        engine_file: The engine; copied, and hashed while it is.
        extra: More files by their path in the bundle: `policy/gate.toml`, the spec's bytes, always;
            `baseline/baseline.json` where the engine was judged by one; `artifacts/calibration.cache` where TensorRT
            calibrated it.
        out: The bundle's folder.
        replace: Take the place of another bundle that is there. What is no bundle is never replaced.

    Raises:
        BundleError: The verdict is not this engine's, a file is missing, reserved or ill-named, the spec or the baseline
            is not the one it was judged by, or `out` is taken.
        DigestMismatch: The engine's file is not the one that was checked.
        GateError: The disk is full or may not be written to.
    """
    _require_one_story(passed, run, result)
    _require_extra(extra, result)
    with_evidence: dict[str, bytes | Path] = {**extra, **_evidence(run, result)}
    taken = _is_taken(out)
    if taken and replace and not _is_bundle(out):
        raise BundleError("is there already and is no bundle, so it is not replaced", where=str(out))
    with atomic.folder(out, existing="replace" if replace else "keep") as temporary:
        files = {engine_path_of(result.backend): _copy_engine(engine_file, temporary, result)}
        for name, content in sorted(with_evidence.items()):
            files[name] = _write(temporary / name, content)
        metadata = metadata_of(run, result, dict(sorted(files.items())))
        data = metadata_bytes(metadata)
        files[METADATA_PATH] = _write(temporary / METADATA_PATH, data)
        statement = pretty_json(msgspec.to_builtins(_statement(metadata, files)))
        _write(temporary / MANIFEST_PATH, statement)
        try:
            verify(temporary)
        except GateError as err:
            raise BundleError(
                f"engine {result.name!r} cannot be sealed: {_inside(err, temporary)}", where=str(out)
            ) from err
    try:
        sealed = verify(out)
    except BundleError as err:
        raise BundleError(
            "is there already and does not verify, so it was kept", where=str(out), hint=str(err)
        ) from err
    if sha256_hex(_read_manifest(out)) != sha256_hex(statement):
        raise BundleError(
            "is there already and holds another bundle",
            where=str(out),
            hint="Seal into another folder, or replace it.",
        )
    return sealed


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
        digest = atomic.digest_of_stream(source, copy_to=copy)
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
        return atomic.digest_of_stream(source, copy_to=copy)


def _statement(metadata: Metadata, files: Mapping[str, FileDigest]) -> Statement:
    return Statement(
        subject=tuple(Subject(name, SubjectDigest(files[name].sha256)) for name in sorted(files)),
        predicate=Predicate(
            status=metadata.verdict.status,
            evidence=metadata.verdict.evidence.value,
            model_id=metadata.model_id,
            engine=metadata.engine,
            metadata_sha256=files[METADATA_PATH].sha256,
            created=metadata.created,
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
    return stat.S_ISDIR(out.lstat().st_mode) and (out / MANIFEST_PATH).is_file()


def _inside(err: GateError, folder: Path) -> str:
    where = str(err.where or "").removeprefix(f"{folder}{os.sep}")
    return f"{where}: {err.message}" if where else err.message


def _read_manifest(bundle: Path) -> bytes:
    return atomic.read_regular(bundle / MANIFEST_PATH, limit_bytes=MAX_JSON_BYTES, single_link=True)


def verify(
    bundle: Path,
    *,
    require_evidence: Evidence | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> VerifiedBundle:
    """Verify a bundle: nothing in it is loaded, each file is opened once, and the first thing that is wrong ends it.

    Args:
        bundle: Its folder.
        require_evidence: The least evidence that its verdict may rest on.
        on_step: Told each step when it is done, the one that fails included.

    Raises:
        BundleError: It is not there, or a file is missing, a link, or not strict JSON.
        DigestMismatch: A file's bytes are not the bytes that were sealed.
        VerificationError: Files were added or removed, or the metadata contradicts its schema or its own numbers.
    """
    return _Verification(bundle, require_evidence, on_step).run()


class _Verification:
    """The state of one verification: what each step leaves to the next."""

    def __init__(self, bundle: Path, require_evidence: Evidence | None, on_step: Callable[[Step], None] | None) -> None:
        self.bundle = bundle
        self.require_evidence = require_evidence
        self.on_step = on_step
        self.steps: list[Step] = []
        self.names: tuple[str, ...] = ()
        self.statement: Statement
        self.metadata: Metadata
        self.files: dict[str, FileDigest] = {}
        self.contents: dict[str, bytes] = {}

    def run(self) -> VerifiedBundle:
        """All steps, in order."""
        for name, step in (
            ("tree", self.tree),
            ("statement", self.read_statement),
            ("digests", self.digests),
            ("schema", self.schema),
            ("verdict", self.verdict),
            ("evidence", self.evidence),
        ):
            try:
                done = Step(name, ok=True, detail=step())
            except GateError as err:
                self.tell(Step(name, ok=False, detail=_inside(err, self.bundle)))
                raise
            self.tell(done)
        engine = next(name for name in self.names if name in ENGINE_PATHS)
        return VerifiedBundle(
            folder=self.bundle,
            metadata=self.metadata,
            statement=self.statement,
            files=dict(self.files),
            engine=self.bundle / engine,
            steps=tuple(self.steps),
        )

    def tell(self, step: Step) -> None:
        """Keep a step and pass it on."""
        self.steps.append(step)
        if self.on_step is not None:
            self.on_step(step)

    def where(self, name: str) -> str:
        """A file of the bundle, for errors."""
        return str(self.bundle / name)

    def tree(self) -> str:
        """Regular files only, one link each; no links, no dot-files, no empty folders, no pipes."""
        self.names = tuple(sorted(_names(self.bundle, "")))
        for name in (MANIFEST_PATH, METADATA_PATH):
            if name not in self.names:
                raise VerificationError("is missing", where=self.where(name))
        return f"{len(self.names)} files, regular, no links"

    def read_statement(self) -> str:
        """The list of files, which is exactly the files that are there."""
        where = self.where(MANIFEST_PATH)
        data = _read_manifest(self.bundle)
        raw = strict_json(data, where=where)
        try:
            self.statement = msgspec.convert(raw, Statement)
        except msgspec.ValidationError as err:
            raise VerificationError(f"is not a statement over a bundle: {err}", where=where) from err
        if data != pretty_json(raw):
            raise VerificationError("is not written as sealing writes it", where=where)
        listed = [subject.name for subject in self.statement.subject]
        if len(set(listed)) != len(listed):
            raise VerificationError("lists a file twice", where=where)
        if missing := sorted(set(listed) - set(self.names)):
            raise VerificationError("was sealed and is missing", where=self.where(missing[0]))
        if added := sorted(set(self.names) - set(listed) - {MANIFEST_PATH}):
            raise VerificationError("was not sealed: it was added", where=self.where(added[0]))
        if METADATA_PATH not in listed or len([name for name in listed if name in ENGINE_PATHS]) != 1:
            raise VerificationError("does not list one engine and its metadata", where=where)
        return f"{len(listed)} subjects, not signed"

    def digests(self) -> str:
        """Every file hashed, from one opening of it; what later steps read is what was hashed."""
        for subject in self.statement.subject:
            path = self.bundle / subject.name
            kept = io.BytesIO() if subject.name in _READ else None
            with atomic.open_regular(path, single_link=True) as stream:
                limit = MAX_JSON_BYTES
                if kept is not None and os.fstat(stream.fileno()).st_size > limit:
                    raise VerificationError(f"is too long: the limit is {limit} bytes", where=str(path))
                got = atomic.digest_of_stream(stream, copy_to=kept)
            if got.sha256 != subject.digest.sha256:
                raise DigestMismatch(
                    f"its sha256 is {got.sha256[:12]}…, sealed was {subject.digest.sha256[:12]}…", where=str(path)
                )
            self.files[subject.name] = got
            if kept is not None:
                self.contents[subject.name] = kept.getvalue()
        count = len(self.files)
        return f"{count} of {count}"

    def schema(self) -> str:
        """The metadata is what its schema allows, and lists the same files as the statement."""
        where = self.where(METADATA_PATH)
        self.metadata = metadata_from_bytes(self.contents[METADATA_PATH], where=where)
        others = {name: digest for name, digest in self.files.items() if name != METADATA_PATH}
        for name in sorted({*others, *self.metadata.files}):
            if others.get(name) != self.metadata.files.get(name):
                raise DigestMismatch(f"files[{name!r}] is not what the statement lists", where=where)
        if engine_path_of(self.metadata.backend) not in others:
            raise VerificationError(
                f"backend {self.metadata.backend!r} has its engine in {engine_path_of(self.metadata.backend)}",
                where=where,
            )
        if self.statement != _statement(self.metadata, self.files):
            raise VerificationError(
                "its predicate or order is not that of the metadata", where=self.where(MANIFEST_PATH)
            )
        return "metadata.json, statement"

    def verdict(self) -> str:
        """Every status computed again from its numbers."""
        where = self.where(METADATA_PATH)
        for message in contradictions(self.metadata, self.latency()):
            raise VerificationError(message, where=where)
        verdict = self.metadata.verdict
        if self.require_evidence is not None and verdict.evidence.rank < self.require_evidence.rank:
            raise VerificationError(
                f"its evidence is {verdict.evidence.value!r}, asked for is {self.require_evidence.value!r}", where=where
            )
        count = len(verdict.findings)
        return f"{verdict.status}, {count} findings recomputed, evidence: {verdict.evidence.value}"

    def latency(self) -> LatencyEvidence | None:
        """Every raw latency; None where the engine was not timed."""
        data = self.contents.get(LATENCY_PATH)
        return None if data is None else latency_from_bytes(data, where=self.where(LATENCY_PATH))

    def evidence(self) -> str:
        """The files beside the engine say what the metadata says."""
        digests, looked = self.metadata.digests, []
        raw = strict_json(self.contents[METADATA_PATH])
        for name, key in ((METRICS_PATH, "metrics"), (ENVIRONMENT_PATH, "device")):
            content = strict_json(self.require(name), where=self.where(name))
            value = content if key == "metrics" else content.get("device") if isinstance(content, dict) else None
            if value != raw[key]:
                raise VerificationError(f"differs from {key} in the metadata", where=self.where(name))
            looked.append(key)
        if sha256_hex(self.require(SPEC_PATH)) != digests.spec:
            raise DigestMismatch("is not the spec that the engine was judged by", where=self.where(SPEC_PATH))
        self.latency_limits()
        looked.append("spec")
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
            looked.append("baseline")
        if self.scores():
            looked.append("scores")
        self.calibration()
        if CALIBRATION_PATH in self.contents:
            looked.append("calibration")
        if LATENCY_PATH in self.contents:
            looked.append("latency")
        return ", ".join(looked)

    def latency_limits(self) -> None:
        """The latency findings are those that the spec asks for, with its limits, of what it says is timed.

        What never ran has none.
        """
        if self.metadata.verdict.evidence is Evidence.PREFLIGHT and not self.metadata.latency:
            return
        where = self.where(SPEC_PATH)
        try:
            tables = latency_tables_of(self.contents[SPEC_PATH], self.metadata.engine)
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

    def scores(self) -> bool:
        """The task's values are those that the samples' contributions give; False where there is no such task."""
        where = self.where(SCORES_PATH)
        said = self.metadata.metrics.scores
        if (said is None) != (SCORES_PATH not in self.contents):
            raise VerificationError("the metadata and the bundle do not agree on the task's scores", where=where)
        if said is None:
            return False
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
        return True

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


def _names(folder: Path, prefix: str, depth: int = 0) -> Iterator[str]:
    """Paths of the files of a bundle, relative to it.

    Raises:
        BundleError: The folder is not there.
        VerificationError: It holds a link, a dot-file, an empty folder or something that is no file.
    """
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
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
