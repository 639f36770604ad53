"""What an engine is timed in turn with, and loaded beside: the reference, another engine, a sealed bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gate.baseline import accepted_engine
from gate.engines import backend as backend_named
from gate.errors import BaselineError, GateError, MeasurementError, RunError, SpecError
from gate.latency.config import Cell, LatencySpec, timed_tables
from gate.latency.measurement import MemoryUse
from gate.sessions.job import Job, Subject
from gate.sessions.run import run_session, write_feeds
from gate.spec import EngineSpec, GateSpec, MemorySpec, SpecFile, batch_axis_of, dynamic_axes_of, located, read_spec
from gate.steps.context import Context
from gate.steps.feeds import SampleFeeds
from gate.steps.latency import Rival, Timing, failure, private_folder
from gate.steps.make import Made, make_engine
from gate.store import SPEC_PATH, verify_seal
from gate.verdict import Evidence, Failure

SESSION_MEMORY = ("device_steady_mib", "together_host_mib", "together_device_mib")
"""Budgets of memory that are measured in a fresh process."""


@dataclass(frozen=True)
class EngineMemory:
    """What an engine takes in a fresh process: alone, and with the engines that are loaded beside it."""

    alone: MemoryUse | None
    together: MemoryUse | None

    def of(self, key: str) -> float | None:
        """The number that a budget of `SESSION_MEMORY` is for, in MiB; None where the system does not say."""
        if key == "device_steady_mib":
            return None if self.alone is None else self.alone.device_steady_mib
        if self.together is None:
            return None
        return self.together.host_peak_mib if key == "together_host_mib" else self.together.device_peak_mib


def timing_of(run: Context, engine: EngineSpec, made: Made, *, evidence: Evidence) -> Timing:
    """An engine of a run as it is timed."""
    return Timing(
        file=run.file,
        engine=engine,
        subject=engine_subject(engine, file=run.file, made=made),
        evidence=evidence,
        rival=lambda against: rival_of(run, engine, against, evidence=evidence),
        feeds=SampleFeeds(run.spec, run.source),
        advance=run.observer.advance,
        max_time_s=run.options.max_time_s,
    )


def engine_subject(engine: EngineSpec, *, file: SpecFile, made: Made) -> Subject:
    """An engine of the spec as a session loads it."""
    return Subject(
        name=engine.name,
        spec=file.path.resolve(),
        engine=located(engine, file.folder),
        file=made.path.resolve(),
        sha256=made.sha256,
    )


def first_sessions(engine: EngineSpec) -> int:
    """How many sessions there are at the least."""
    tables = timed_tables(engine.latency)
    return sum(table.spec.sessions * max(len(table.spec.rivals), 1) for table in tables)


def rival_of(run: Context, engine: EngineSpec, against: str, *, evidence: Evidence) -> Rival:
    """What `against` names.

    Raises:
        BaselineError: No baseline was accepted, or the bundle at hand is of another engine.
        BundleError, VerificationError: The bundle is not what was sealed.
        GateError: The other engine cannot be made.
    """
    if against == "reference":
        if run.options.reference is not None:
            raise RunError(
                "the reference is a recording, which cannot be timed",
                hint="Time against it on a machine with PyTorch, or against another engine.",
            )
        return Rival(
            against,
            f"the reference, {run.identity.title}",
            Subject(name=against, spec=run.file.path.resolve()),
            on_gpu=run.spec.model.device == "cuda",
        )
    if against == "baseline":
        return _baseline(run, engine, evidence)
    if against in [each.name for each in run.spec.engines]:
        other = run.file.engine(against)
        made = make_engine(run, other, backend_named(other.backend))
        subject = engine_subject(other, file=run.file, made=made)
        return Rival(against, f"engine {against}", subject, on_gpu=other.required_evidence == "device")
    return _same_inputs(run, bundle_rival(run.file.folder / against, against=against), run.file.folder / against)


def _baseline(run: Context, engine: EngineSpec, evidence: Evidence) -> Rival:
    """The engine of the accepted baseline, from its sealed bundle."""
    folder = run.options.bundles / run.spec.model.id / engine.name
    accepted = accepted_engine(
        run.options.baselines, case=run.spec.model.id, engine=engine.name, backend=engine.backend, evidence=evidence
    )
    if not folder.is_dir():
        raise BaselineError(
            f"the accepted baseline's engine is not at hand: there is no bundle for sha256 {accepted[:12]}…",
            where=str(folder),
            hint="Seal what was accepted (gate check --seal DIR), keep that folder, and give it with --bundles DIR.",
        )
    rival = bundle_rival(folder, against="baseline")
    if rival.subject.sha256 != accepted:
        raise BaselineError(
            f"the bundle is not of the accepted baseline's engine: its sha256 is {(rival.subject.sha256 or '')[:12]}…, "
            f"accepted was {accepted[:12]}…",
            where=str(folder),
            hint="Give the folder with the bundle of the accepted engine (--bundles DIR), or accept the baseline anew.",
        )
    return _same_inputs(run, rival, folder)


def _same_inputs(run: Context, rival: Rival, folder: Path) -> Rival:
    require_same_inputs(run.spec, read_spec(rival.subject.spec).spec, other=str(folder))
    return rival


def require_same_inputs(a: GateSpec, b: GateSpec, *, other: str) -> None:
    """Refuse engines that cannot be given the same.

    Raises:
        SpecError: They cannot.
    """
    kinds = [
        {
            name: (each.dtype, [size if isinstance(size, int) else None for size in each.shape])
            for name, each in spec.inputs.items()
        }
        for spec in (a, b)
    ]
    if kinds[0] != kinds[1]:
        said = [
            ", ".join(f"{name} {each.dtype} [{', '.join(map(str, each.shape))}]" for name, each in spec.inputs.items())
            for spec in (a, b)
        ]
        raise SpecError(
            f"A takes {said[0]}, and B takes {said[1]}: they cannot be given the same",
            where=other,
            hint="Name an engine with the same inputs.",
        )


def bundle_rival(folder: Path, *, against: str) -> Rival:
    """A sealed bundle's engine, verified before anything of it is used.

    Raises:
        BundleError, DigestMismatch, VerificationError: It is not what was sealed.
        SpecError: Its spec cannot be read.
    """
    bundle = verify_seal(folder)
    file = read_spec(folder / SPEC_PATH)
    engine = file.engine(bundle.metadata.engine)
    subject = Subject(
        name=against,
        spec=file.path.resolve(),
        engine=located(engine, file.folder),
        file=bundle.engine.resolve(),
        sha256=bundle.files[bundle.engine.relative_to(bundle.folder).as_posix()].sha256,
    )
    title = f"{bundle.metadata.engine} of {folder}"
    return Rival(against, title, subject, on_gpu=engine.required_evidence == "device")


def engine_memory(run: Context, timing: Timing, memory: MemorySpec) -> tuple[EngineMemory | None, tuple[Failure, ...]]:
    """What an engine takes in a fresh process, alone and beside the engines that the spec names."""
    try:
        alone = together = None
        if memory.device_steady_mib is not None:
            alone = _session_memory(run.spec, timing, ())
        if memory.together_with:
            others = [run.file.engine(name) for name in memory.together_with]
            subjects = [
                engine_subject(each, file=run.file, made=make_engine(run, each, backend_named(each.backend)))
                for each in others
            ]
            together = _session_memory(run.spec, timing, subjects)
    except GateError as err:
        return None, (failure("memory", err, timing.evidence),)
    return EngineMemory(alone, together), ()


def _least_cell(spec: GateSpec) -> Cell:
    """The smallest batch that the inputs take: one, the profile's least, or the size that is fixed."""
    axis = batch_axis_of(spec)
    return Cell(batch=axis if isinstance(axis, int) else dynamic_axes_of(spec)[axis][0])


def _on_gpu(subject: Subject) -> bool:
    return subject.engine is not None and subject.engine.required_evidence == "device"


def _session_memory(spec: GateSpec, timing: Timing, others: list[Subject] | tuple[Subject, ...]) -> MemoryUse:
    """Of a session that loads an engine of the spec and others, all with its inputs, and runs each once."""
    with private_folder() as folder:
        feeds = folder / "feeds.safetensors"
        write_feeds(feeds, timing.feeds.batches(_least_cell(spec)))
        subjects = (timing.subject, *others)
        job = Job(
            subjects=subjects,
            usage_feeds=feeds,
            on_gpu=timing.evidence is Evidence.DEVICE or any(map(_on_gpu, subjects)),
        )
        times = run_session(job, timeout_s=LatencySpec().session_timeout_s)
    if times.memory == MemoryUse():
        raise MeasurementError("the system does not say what memory a process takes")
    return times.memory
