"""An engine of a bundle, loaded: verified first, held against this machine second, and deserialised last."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Literal

from gate import atomic
from gate.device import gpu
from gate.engines import backend as backend_named
from gate.engines.containers import FALLBACK_PATH, require_engine
from gate.errors import (
    BackendUnavailable,
    BundleError,
    DigestMismatch,
    GateError,
    IdentityMismatch,
    IncompatibleEngine,
    LedgerError,
    PromotionRefused,
    RunError,
    SpecError,
    VerificationError,
)
from gate.ledger import read_ledger
from gate.manifest import MAX_JSON_BYTES, FileDigest, sha256_hex
from gate.metadata import Metadata
from gate.release.history import History
from gate.release.policy import SlotPolicy, requirements
from gate.release.rules import require_unrevoked
from gate.release.statements import (
    IN_TOTO,
    LedgerEntry,
    VerdictStatement,
    envelope_from_bytes,
    statement_from_payload,
)
from gate.spec import EngineOptions, EngineSpec, GateSpec, spec_from_text
from gate.store import SPEC_PATH, VERDICT_PATH, engine_path_of
from gate.tensors import Array, NamedArrays, TensorMeta
from gate.trust import PolicyFile, ledger_path, read_policy
from gate.verification import VerifiedBundle, verify

if TYPE_CHECKING:
    import torch

    from gate.engines.interface import Runner

Fallback = Literal["onnx", "pytorch"]

_LOG = logging.getLogger(__name__)
_SEALS = ("F_SEAL_SEAL", "F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_WRITE")


class LoadedEngine:
    """An engine that a policy lets in, ready to run; a `gate.engines.interface.Runner`. Close it when done.

    Args:
        runner: What runs.
        verified: The bundle that it is of.
        fallback: What runs in the engine's place, where it does not fit this machine: `onnx` or `pytorch`; None: the
            engine itself.
        reason: Why the engine does not run here; None where it does.
        closing: What is closed with it.

    Its `warnings` are what one must know although it was let in: the gate's own, and what the policy asks for
    differently since then.
    """

    def __init__(
        self,
        runner: Runner,
        verified: VerifiedBundle,
        *,
        fallback: Fallback | None,
        reason: str | None,
        closing: ExitStack,
    ) -> None:
        self._runner = runner
        self._closing = closing
        self.verified = verified
        self.fallback = fallback
        self.reason = reason
        self.warnings: tuple[str, ...] = verified.warnings

    @property
    def metadata(self) -> Metadata:
        """What the engine is, how it was made, and what came of its check; of the engine in a fallback, too."""
        return self.verified.metadata

    @property
    def inputs(self) -> Mapping[str, TensorMeta]:
        """What it takes."""
        return self._runner.inputs

    @property
    def outputs(self) -> Mapping[str, TensorMeta]:
        """What it gives."""
        return self._runner.outputs

    def infer(self, feeds: NamedArrays) -> dict[str, Array]:
        """One inference: arrays in, arrays out, by name.

        Raises:
            RunError: An input is missing, unexpected, of another dtype or outside the profile, or the engine failed.
        """
        return self._runner.run(feeds)

    def run(self, feed_dict: NamedArrays) -> dict[str, Array]:
        """As `infer`.

        Raises:
            RunError: As `infer`.
        """
        return self._runner.run(feed_dict)

    def timed(self, feed_dict: NamedArrays) -> Callable[[], None]:
        """A call that runs one inference on inputs that are bound already.

        Raises:
            RunError: As `infer`.
        """
        return self._runner.timed(feed_dict)

    def close(self) -> None:
        """Free the engine and close the bundle's files. Calling it twice is harmless."""
        self._closing.close()

    def __enter__(self) -> LoadedEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load(
    bundle: Path | str,
    policy: Path | str | PolicyFile,
    *,
    model: str,
    slot: str,
    stage: str | None = None,
    expect: str | None = None,
    reference: Callable[[], torch.nn.Module] | None = None,
    now: str | None = None,
) -> LoadedEngine:
    """Verify a bundle, hold its engine against this machine, and load it.

    The engine's bytes are those that were hashed: they are copied out of the bundle, hashed once more on the way, and
    loaded from that copy, so that whoever can write to the bundle's folder changes nothing of what runs.

    Args:
        bundle: Its folder.
        policy: The trust policy, or its file. It comes from elsewhere than the bundle.
        model: Which model this has to be, without the digits of its weights.
        slot: What it is to be used as.
        stage: For a server that takes a stage's share of the traffic: that stage, such as `canary-5`. Of a slot that
            takes what was promoted, the candidate in it is loaded then. None: what has all of the traffic.
        expect: SHA-256 of a line of the ledger, kept elsewhere, that must be in it; as `gate promote` prints it.
        reference: Gives the PyTorch model, for a slot whose policy allows `fallback = ["pytorch"]`.
        now: The time, such as `2026-11-21T10:00:00Z`; None: the system's clock.

    Raises:
        SpecError: The policy cannot be read, or has no such slot or stage.
        LedgerError: The ledger is not what was signed, or has no line that is `expect`.
        VerificationError: The bundle is not what was sealed, or not what the policy asks for: DigestMismatch,
            SignatureMismatch, IdentityMismatch, StaleVerdict, ApprovalsMissing.
        PromotionRefused: The slot takes what was promoted alone, and this does not have all of its traffic, or is not
            in the stage that was asked for.
        IncompatibleEngine: The engine does not fit this machine, and nothing that the policy allows in its place does;
            says what was tried.
        RunError: It fits, and could not be loaded.
    """
    bundle = Path(bundle)
    file = policy if isinstance(policy, PolicyFile) else read_policy(Path(policy))
    with ExitStack() as stack:
        verified = stack.enter_context(
            _verified(bundle, file, model=model, slot=slot, stage=stage, expect=expect, now=now)
        )
        for warning in verified.warnings:
            _LOG.warning("%s of slot %s (%s): %s", model, slot, bundle, warning)
        spec, engine = _asked(verified)
        allowed = file.policy.slot[slot].fallback
        try:
            runner = _engine(verified, spec=spec, engine=engine, closing=stack)
            return LoadedEngine(runner, verified, fallback=None, reason=None, closing=stack.pop_all())
        except (IncompatibleEngine, BackendUnavailable) as err:
            if not allowed:
                raise
            reason = err.message
        tried: list[str] = []
        for kind in allowed:
            try:
                runner = _fallback(kind, verified, spec=spec, engine=engine, reference=reference, closing=stack)
            except VerificationError:
                raise
            except GateError as err:
                tried.append(f"{kind}: {err.message}")
                continue
            _LOG.warning(
                "%s of slot %s runs as %s and not as the engine that was checked (%s): %s",
                model,
                slot,
                {"onnx": "ONNX on the CPU", "pytorch": "PyTorch"}[kind],
                bundle,
                reason,
            )
            return LoadedEngine(runner, verified, fallback=kind, reason=reason, closing=stack.pop_all())
        raise IncompatibleEngine(
            f"the engine does not fit this machine, and nothing that slot {slot!r} allows in its place can be loaded: "
            f"engine: {reason}; {'; '.join(tried)}",
            where=str(bundle),
            hint="Build and check an engine on a machine of this kind, or add to [slot] fallback in the policy.",
        )


def _verified(
    bundle: Path,
    file: PolicyFile,
    *,
    model: str,
    slot: str,
    stage: str | None,
    expect: str | None,
    now: str | None,
) -> VerifiedBundle:
    """The bundle, held against the policy and, where the slot asks for it, against the ledger."""
    history = _history(file, expect, now)
    asked = file.policy.slot.get(slot)
    if asked is None:
        raise SpecError(
            f"the policy has no slot {slot!r}; it has {', '.join(file.policy.slot)}",
            where=str(file.path),
        )
    if asked.load == "approved":
        if stage is not None:
            requirements(file.policy, slot, stage)
        return verify(bundle, policy=file, model=model, slot=slot, stage=stage, history=history, now=now)
    if history is None:
        raise PromotionRefused(
            f"slot {slot!r} takes what was promoted alone, and the policy names no ledger that says what was",
            where=str(file.path),
            hint='Name one (ledger = "ledger.jsonl") and promote the bundle, or set load = "approved" for this slot.',
        )
    if model not in file.policy.model:
        raise IdentityMismatch(
            f"the policy has no model {model!r}; it has {', '.join(file.policy.model)}", where=str(file.path)
        )
    entry = _entry_in(history, file, asked, model=model, slot=slot, stage=stage)
    payload = _payload(bundle)
    if payload is not None:
        # Nothing is known of this verdict yet; that it cannot be the right one is enough to say no.
        try:
            require_unrevoked(sha256_hex(payload), history)
        except VerificationError as err:
            err.where = str(bundle / VERDICT_PATH)
            raise
        if entry is None or entry.verdict != sha256_hex(payload):
            raise _refused(bundle, payload, history, entry, file, model=model, slot=slot, stage=stage)
    verified = verify(
        bundle,
        policy=file,
        model=model,
        slot=slot,
        stage=None if entry is None else entry.stage,
        history=history,
        now=now,
        admission=False,
    )
    if entry is None or verified.verdict_sha256 != entry.verdict:
        verified.close()
        raise VerificationError("was exchanged while it was verified", where=str(bundle))
    return verified


def _history(file: PolicyFile, expect: str | None, now: str | None) -> History | None:
    """What the ledger says; None where the policy names none.

    Raises:
        LedgerError: It is not what was signed, or has not the line that is expected.
    """
    path = ledger_path(file)
    if path is None:
        if expect is not None:
            raise LedgerError(
                f"the policy names no ledger, and one with the line of SHA-256 {expect} is expected",
                where=str(file.path),
                hint='Name it in the policy: ledger = "ledger.jsonl".',
            )
        return None
    ledger = read_ledger(path, file, now=now)
    for note in ledger.notes:
        _LOG.warning("%s: %s", path, note)
    if expect is not None:
        ledger.require_line(expect)
    return ledger.history


def _entry_in(
    history: History, file: PolicyFile, asked: SlotPolicy, *, model: str, slot: str, stage: str | None
) -> LedgerEntry | None:
    """The entry of what may be loaded: the one that has all of the traffic, or the one in the stage that is asked for.

    Raises:
        SpecError: Neither the policy nor the slot has such a stage.
    """
    current, candidate = history.current(model, slot), history.candidate(model, slot)
    if stage is None or stage == asked.stage[-1].name:
        return current
    if candidate is not None and candidate.stage == stage:
        return candidate
    if stage in [each.name for each in asked.stage]:
        return None
    if current is not None and current.stage == stage:
        return current
    requirements(file.policy, slot, stage)
    return None


def _payload(bundle: Path) -> bytes | None:
    """The statement that a bundle brings, not verified; None where it cannot be read."""
    where = bundle / VERDICT_PATH
    try:
        data = atomic.read_regular(where, limit_bytes=MAX_JSON_BYTES, single_link=True)
        return envelope_from_bytes(data, payload_type=IN_TOTO, where=str(where)).payload
    except (GateError, OSError):
        return None


def _refused(
    bundle: Path,
    payload: bytes,
    history: History,
    entry: LedgerEntry | None,
    file: PolicyFile,
    *,
    model: str,
    slot: str,
    stage: str | None,
) -> PromotionRefused:
    """Why a bundle with this statement is not what is asked for: what it holds, what is there, and what to do."""
    current, candidate = history.current(model, slot), history.candidate(model, slot)
    named = sha256_hex(payload)
    try:
        serial = statement_from_payload(payload, VerdictStatement, where=str(bundle)).predicate.serial
    except GateError:
        serial = None
    holds = f"verdict {named[:12]}…" if serial is None else f"serial {serial}"
    if entry is not None and entry.serial == serial:
        holds = f"another verdict of serial {serial} ({named[:12]}…)"
    hint = f"gate promote {bundle} --policy {file.path} --model {model} --slot {slot} --key KEY"
    if candidate is not None and candidate.verdict == named:
        holds += f", a candidate in stage {candidate.stage} alone"
        hint = f"A server that takes this share of the traffic names it: gate.load(..., stage={candidate.stage!r})"
    elif current is not None and current.verdict == named:
        holds += ", which has all of the traffic"
        hint = "Name no stage: gate.load(..., stage=None)"
    place = "the slot" if stage is None else f"stage {stage!r} of the slot"
    if entry is None:
        others = [f"serial {each.serial} is in stage {each.stage}" for each in (current, candidate) if each is not None]
        none = "nothing has all of the traffic" if stage is None else "nothing is in that stage"
        there = f"{none}, {' and '.join(others)}" if others else "nothing was promoted into it"
        return PromotionRefused(f"holds {holds}; it is not in {place} {slot!r}: {there}", where=str(bundle), hint=hint)
    there = f"serial {entry.serial}"
    if serial is not None and serial <= entry.serial:
        hint = f"that one was promoted from {entry.bundle!r}; an older verdict comes back by gate rollback alone"
    if Path(entry.bundle) in (bundle.absolute(), Path(os.path.realpath(bundle))):
        there += ": keep each bundle in a folder of its own"
        hint = (
            f"serial {entry.serial} was promoted into {slot} from this folder, which was written over since; "
            "put it back, and seal or copy what is new into another folder"
        )
    return PromotionRefused(f"holds {holds}; in {place} is {there}", where=str(bundle), hint=hint)


def _asked(verified: VerifiedBundle) -> tuple[GateSpec, EngineSpec]:  # the pair never leaves this module
    """The spec in the bundle, and its engine.

    Raises:
        VerificationError: It is of another backend than the metadata say, or the engine's file is called otherwise.
    """
    where = verified.folder / SPEC_PATH
    digest = _digest_of(verified, SPEC_PATH)
    if digest.size_bytes > MAX_JSON_BYTES:
        raise VerificationError("is too long for a spec", where=str(where))
    with verified.open(SPEC_PATH) as stream:
        data = stream.read(digest.size_bytes + 1)
    if sha256_hex(data) != digest.sha256:
        raise _changed(verified, SPEC_PATH)
    try:
        file = spec_from_text(data.decode("utf-8"), path=where)
    except UnicodeDecodeError as err:
        raise VerificationError("is not a text file in UTF-8", where=str(where)) from err
    engine = file.engine(verified.metadata.engine)
    if engine.backend != verified.metadata.backend or engine_path_of(engine.backend) != verified.engine:
        raise VerificationError(
            f"its engine {engine.name!r} is of backend {engine.backend!r}, the bundle holds {verified.engine} of "
            f"{verified.metadata.backend!r}",
            where=str(where),
        )
    return file.spec, engine


def _engine(verified: VerifiedBundle, *, spec: GateSpec, engine: EngineSpec, closing: ExitStack) -> Runner:
    """The engine itself, held against this machine before any of it is deserialised.

    Raises:
        IncompatibleEngine, BackendUnavailable: It does not fit this machine.
        RunError: It does, and cannot be loaded.
    """
    backend = backend_named(engine.backend)
    backend.version()
    where = str(verified.folder / verified.engine)
    if engine.options.plugins:
        raise IncompatibleEngine(
            f"it needs plugin libraries ({', '.join(engine.options.plugins)}), which are code that a bundle does not hold",
            where=where,
            hint="Build the engine without plugins of its own.",
        )
    is_plan = engine.backend in ("tensorrt", "tensorrt_rtx")
    if not is_plan:
        # A plan's options are those of its build, which another version may not have and still run the plan.
        try:
            backend.require_supported(engine)
        except SpecError as err:
            raise IncompatibleEngine(f"what is installed lacks what it asks for: {err.message}", where=where) from err
    try:
        with ExitStack() as opened:
            own = opened.enter_context(_PrivateCopy(verified, verified.engine))
            if is_plan:
                _require_compatible(own.path, verified.metadata, engine)
            runner = opened.enter_context(backend.open(own.path, spec=spec, engine=engine))
            closing.push(opened.pop_all())
            return runner
    except (IncompatibleEngine, BackendUnavailable) as err:
        err.where = where
        raise
    except RunError as err:
        err.where = where
        if engine.backend == "onnxruntime":
            version = backend.version()
            raise IncompatibleEngine(
                f"it was checked with ONNX Runtime {verified.metadata.backend_version} (opset "
                f"{verified.metadata.onnx_opset}); {version} here refuses it: {err.message}",
                where=where,
                hint=f"pip install onnxruntime=={verified.metadata.backend_version}",
            ) from err
        raise


def _require_compatible(path: Path, metadata: Metadata, engine: EngineSpec) -> None:
    """Hold a plan's header, its build record and where it was checked against this machine.

    Raises:
        IncompatibleEngine, BackendUnavailable: It does not fit.
    """
    from gate.engines.tensorrt.backend import TensorRTBackend

    # The record of a plan that the team built says nothing of how it was built.
    record = None if "plan" in metadata.build.options else metadata.build
    TensorRTBackend(engine.backend).require_compatible(path, engine=engine, record=record, device=metadata.device)


def _fallback(
    kind: Fallback,
    verified: VerifiedBundle,
    *,
    spec: GateSpec,
    engine: EngineSpec,
    reference: Callable[[], torch.nn.Module] | None,
    closing: ExitStack,
) -> Runner:
    """What may run in the engine's place.

    Raises:
        GateError: It cannot; says why.
        VerificationError: A file of the bundle was changed since it was verified.
    """
    if kind == "onnx":
        return _graph_on_cpu(verified, spec=spec, engine=engine, closing=closing)
    return closing.enter_context(_reference(verified, spec=spec, reference=reference))


def _graph_on_cpu(verified: VerifiedBundle, *, spec: GateSpec, engine: EngineSpec, closing: ExitStack) -> Runner:
    from gate.engines.onnxruntime.runner import OnnxRuntimeRunner

    name = FALLBACK_PATH if FALLBACK_PATH in verified.files else verified.engine
    if not name.endswith(".onnx"):
        raise IncompatibleEngine(
            f"the bundle holds no graph ({FALLBACK_PATH}); [policy] seal_fallback = true in the spec puts one there"
        )
    backend_named("onnxruntime").version()
    try:
        with ExitStack() as opened:
            own = opened.enter_context(_PrivateCopy(verified, name))
            runner = OnnxRuntimeRunner(own.path, spec=spec, cast_io=engine.cast_io, options=EngineOptions())
            opened.enter_context(runner)
            closing.push(opened.pop_all())
            return runner
    except RunError as err:
        foreign = engine.nms == "efficient_nms" or engine.precision in ("fp8", "bf16")
        why = "; it was made for TensorRT, and ONNX Runtime does not have all of its operators" if foreign else ""
        raise RunError(f"{err.message}{why}", where=str(verified.folder / name), hint=err.hint) from err


def _reference(verified: VerifiedBundle, *, spec: GateSpec, reference: Callable[[], torch.nn.Module] | None) -> Runner:
    """The caller's PyTorch model, where its weights are those of the reference that the engine was checked against."""
    expected = verified.metadata.digests.weights
    if reference is None:
        raise IncompatibleEngine("load was given no reference")
    if expected is None or spec.model.factory is None:
        raise IncompatibleEngine("the bundle does not say which weights the reference had in PyTorch")
    backend_named("torch").version()
    from gate.engines.torch.runner import TorchRunner
    from gate.factory import state_digest

    try:
        module = reference()
        got = state_digest(module)
    except Exception as err:
        raise RunError(f"the reference failed: {type(err).__name__}: {err}") from err
    if got != expected:
        raise RunError(f"the reference has other weights: {got[:12]}…, the engine was checked against {expected[:12]}…")
    device = spec.model.device if gpu() is not None else "cpu"
    return TorchRunner(module, spec=spec, device=device)


class _PrivateCopy:
    """A verified file's bytes where nobody else can write, hashed on the way and looked at once more.

    In memory that is sealed against writing, where the system has that; else in a folder of this user alone.

    Args:
        verified: The bundle.
        name: The file's path in it.

    Raises:
        DigestMismatch: The file was written to since it was hashed.
        VerificationError: It is no engine as it may be loaded: other bytes lay there when verification looked at them.
        GateError: There is no room for it.
    """

    def __init__(self, verified: VerifiedBundle, name: str) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="gate-"))
        self._file = -1
        self.path = self._folder / Path(name).name
        try:
            if hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir():
                self._file = os.memfd_create("gate-engine", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
                with os.fdopen(os.dup(self._file), "wb") as target:
                    _copy(verified, name, target)
                fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, _all_seals())
                with os.fdopen(os.dup(self._file), "rb") as copied:
                    _require_engine(verified, name, copied)
                self.path.symlink_to(f"/proc/{os.getpid()}/fd/{self._file}")
            else:
                file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                with os.fdopen(file, "wb") as target:
                    _copy(verified, name, target)
                with self.path.open("rb") as copied:
                    _require_engine(verified, name, copied)
        except OSError as err:
            self.close()
            raise GateError(
                f"cannot be copied before it is loaded: {err.strerror or err}", where=str(verified.folder / name)
            ) from err
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give it back."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> _PrivateCopy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _all_seals() -> int:
    """Against every change, this process's own included. Source: fcntl(2), "File Sealing"."""
    seals = 0
    for name in _SEALS:
        seals |= int(getattr(fcntl, name))
    return seals


def _copy(verified: VerifiedBundle, name: str, target: BinaryIO) -> None:
    """Copy what was hashed, and not a byte more than there was.

    Raises:
        DigestMismatch: It is not what was hashed.
    """
    expected = _digest_of(verified, name)
    with verified.open(name) as source:
        got = atomic.digest_of_stream(source, copy_to=target, most_bytes=expected.size_bytes + 1)
    if got != expected:
        raise _changed(verified, name)


def _require_engine(verified: VerifiedBundle, name: str, copied: BinaryIO) -> None:
    """Look at what is loaded, as verification looked at what lay in the bundle.

    Verification hashes a file and looks at it one after the other; who writes there in between shows it two files.
    """
    try:
        require_engine(copied, name)
    except VerificationError as err:
        raise VerificationError(err.message, where=str(verified.folder / name), hint=err.hint) from err


def _digest_of(verified: VerifiedBundle, name: str) -> FileDigest:
    digest = verified.files.get(name)
    if digest is None:
        raise BundleError("is missing", where=str(verified.folder / name))
    return digest


def _changed(verified: VerifiedBundle, name: str) -> DigestMismatch:
    return DigestMismatch(
        "was written to after it was verified",
        where=str(verified.folder / name),
        hint="Someone can write to the bundle's folder. Fetch the bundle again, and let nobody write there.",
    )
