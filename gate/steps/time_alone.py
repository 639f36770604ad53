"""One engine timed without a check: against budgets, in turn with another, or from what trtexec wrote."""

from __future__ import annotations

import difflib
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from gate.engines import backend as backend_named
from gate.errors import BackendUnavailable, MeasurementError, SpecError
from gate.latency.budgets import budget_findings, summarise
from gate.latency.config import NO_BUDGET, LatencySpec, latency_problems, timed_tables
from gate.latency.exported_times import MOST_CHARACTERS, exported_times
from gate.sessions.job import Subject
from gate.spec import EngineSpec, GateSpec, SpecFile, batch_axis_of, dynamic_axes_of, read_spec
from gate.steps.context import CheckOptions, Context, Observer, Silence
from gate.steps.feeds import Feeds, RandomFeeds, SampleFeeds
from gate.steps.latency import Rival, Timed, Timing, measured_latency
from gate.steps.make import make_engine
from gate.steps.rivals import bundle_rival, engine_subject, require_same_inputs, rival_of
from gate.store import SPEC_PATH, verify_seal
from gate.verdict import Evidence

_SEPARATOR = "::"


_B = "b"
"""What the table of the command calls the other engine."""


@dataclass(frozen=True)
class _Named:
    """What a name leads to.

    Args:
        file: Its spec.
        engine: Its part of it.
        bundle: The verified bundle that it lies in; None: it is made.
    """

    file: SpecFile
    engine: EngineSpec
    bundle: Rival | None


@dataclass(frozen=True)
class _Opened:
    """An engine that is there.

    Args:
        subject: What a session loads.
        feeds: The batches that go with it.
        run: Its spec's run; None for a bundle.
    """

    subject: Subject
    feeds: Feeds
    run: Context | None


def compare_latency(
    first: str, against: str | None, spec: LatencySpec, options: CheckOptions, observer: Observer | None = None
) -> Timed:
    """Time an engine of a spec or a bundle, in turn with another where one is named.

    Args:
        first: `gate.toml::engine`, a spec with one engine, or the folder of a bundle.
        against: The same, or for an engine of a spec `reference`, `baseline` or the name of another engine.
        spec: How, and what is allowed; its comparisons are against `b`.
        options: Where cache, baselines and bundles lie.
        observer: Told of progress.

    Raises:
        SpecError: A name leads to nothing, or the batch sizes do not fit the inputs.
        GateError: An engine cannot be made, or a bundle is not what was sealed.
    """
    observer = observer or Silence()
    closing: list[Callable[[], None]] = []
    try:
        named = _named(first)
        engine = msgspec.structs.replace(named.engine, latency=spec)
        evidence = backend_named(engine.backend).runs_here(engine)
        if evidence is None:
            raise BackendUnavailable(
                f"backend {engine.backend!r} can only compile on this machine, so there is nothing to time",
                hint="gate doctor says what is usable here.",
            )
        _require_timeable(spec, named.file.spec, evidence)
        other = None if against is None else _other(named, against)
        if other is not None:
            _require_timeable(spec, other.file.spec, evidence, where=str(against))
        a = _opened(named, options, observer, closing)
        rival: Rival | None = None
        if other is not None:
            b = _opened(other, options, observer, closing)
            rival = Rival(_B, str(against), b.subject, on_gpu=other.engine.required_evidence == "device")
        elif against is not None and a.run is not None:
            rival = replace(rival_of(a.run, engine, against, evidence=evidence), against=_B)
        timing = Timing(
            file=None,
            engine=engine,
            subject=a.subject,
            evidence=evidence,
            rival=lambda against: _given(rival, against),
            feeds=a.feeds,
            advance=observer.advance,
            max_time_s=options.max_time_s,
        )
        sessions = sum(table.spec.sessions * max(len(table.spec.rivals), 1) for table in timed_tables(spec))
        observer.stage("latency", engine=engine.name, total=sessions)
        found = measured_latency(timing)
        observer.done()
        return found
    finally:
        for close in closing:
            close()


def exported_latency(paths: Sequence[Path], spec: LatencySpec) -> Timed:
    """Budgets on what `trtexec --exportTimes` wrote; a file is a process.

    Args:
        paths: The files.
        spec: The budgets. What trtexec timed is `latency` and `gpu_compute`; `host_wall` stands for the first.

    Raises:
        SpecError: It asks for something that the files do not say.
        MeasurementError: A file cannot be read, or is not what trtexec writes.
    """
    for key in ("streams", "axes", "max_time_s"):
        if getattr(spec, key) != getattr(LatencySpec(), key):
            raise SpecError(f"what trtexec wrote is measured already: {key} has no meaning for it")
    for name, value in spec.budgets.items():
        if not 0.0 < value < math.inf:
            raise SpecError(f"{name} is a finite number above 0, got {value:g}")
    texts: dict[str, str] = {}
    for path in paths:
        try:
            if path.stat().st_size > MOST_CHARACTERS:
                raise MeasurementError(f"is longer than {MOST_CHARACTERS} bytes", where=str(path))
            texts[str(path)] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as err:
            raise MeasurementError(f"cannot be read: {err}", where=str(path)) from err
    times = exported_times(texts)
    asked = msgspec.structs.replace(spec, timed="latency" if spec.timed == "host_wall" else spec.timed)
    cells = timed_tables(asked)[0].cells
    if len(cells) > 1:
        raise SpecError(
            f"files of trtexec are of one batch size, got --batch {','.join(str(each.batch) for each in cells)}",
            hint="Judge the files of each batch size on their own.",
        )
    cell = msgspec.structs.replace(cells[0], name="")
    metrics = summarise(
        times.subjects,
        cell=cell,
        spec=asked,
        clock="trtexec",
        stopped="as trtexec measured it",
        notes=(*times.notes, "how the host waited, and what else ran on the GPU, is not in the files"),
    )
    found = budget_findings(times.subjects, cell=cell, spec=asked, evidence=Evidence.DEVICE)
    return Timed(latencies=(metrics,), findings=found)


def _require_timeable(spec: LatencySpec, inputs: GateSpec, evidence: Evidence, *, where: str | None = None) -> None:
    """Hold what is asked for against the inputs, before anything is made.

    Raises:
        SpecError: A size is outside the profile, options contradict each other, or they need a GPU.
    """
    for _, message in latency_problems(spec, batch_axis=batch_axis_of(inputs), axes=dynamic_axes_of(inputs)):
        # Measuring without a limit is what the command may do and a spec may not.
        if not message.startswith(NO_BUDGET) or spec.has_limit:
            raise SpecError(message.removeprefix("[engine.latency] "), where=where)
    if spec.timed != "host_wall" and evidence is not Evidence.DEVICE:
        raise SpecError(f'--timed {spec.timed} needs an engine on a GPU; leave it out, which is "host_wall"')


def _named(name: str) -> _Named:
    """What a name leads to; nothing is made yet, and a bundle is verified.

    Raises:
        SpecError: It leads to nothing, or to a spec with several engines.
        BundleError: It is a bundle, and not what was sealed.
    """
    path, separator, wanted = name.partition(_SEPARATOR)
    if not separator and Path(path).is_dir():
        rival = bundle_rival(Path(path), against=path)
        file = read_spec(Path(path) / SPEC_PATH)
        return _Named(file, file.engine(verify_seal(Path(path)).metadata.engine), rival)
    if not Path(path).exists():
        raise SpecError(
            "there is no such file, and no such bundle",
            where=path,
            hint=f"An engine is named with its spec, such as gate.toml{_SEPARATOR}{wanted or path}.",
        )
    file = read_spec(Path(path))
    if not separator:
        names = [each.name for each in file.spec.engines]
        if len(names) != 1:
            raise SpecError(
                f"has {len(names)} engines, and one is timed: {', '.join(names)}",
                where=str(file.path),
                hint=f"gate latency {shlex.quote(f'{path}{_SEPARATOR}{names[0]}')}",
            )
        wanted = names[0]
    return _Named(file, file.engine(wanted), None)


def _opened(named: _Named, options: CheckOptions, observer: Observer, closing: list[Callable[[], None]]) -> _Opened:
    """Its engine, made where it is not sealed."""
    file, engine = named.file, named.engine
    if named.bundle is not None:
        return _Opened(named.bundle.subject, RandomFeeds(file.spec), None)
    run = Context(file, replace(options, engines=(engine.name,)), observer)
    closing.append(run.close)
    run.open_samples()
    run.open_reference()
    made = make_engine(run, engine, backend_named(engine.backend))
    return _Opened(engine_subject(engine, file=file, made=made), SampleFeeds(file.spec, run.source), run)


def _other(a: _Named, against: str) -> _Named | None:
    """What B names; None: the reference, the baseline or another engine of A's spec.

    Raises:
        SpecError: It names nothing, or takes other inputs than A.
        BundleError: It is a bundle, and not what was sealed.
    """
    names = [each.name for each in a.file.spec.engines]
    if a.bundle is None and against in ("reference", "baseline", *names):
        return None
    if against in ("reference", "baseline"):
        raise SpecError(
            f"a bundle has no {against} beside it", hint="Name an engine of a spec as A: gate latency gate.toml::ENGINE"
        )
    if a.bundle is None and _SEPARATOR not in against and not Path(against).exists():
        near = difflib.get_close_matches(against, ["reference", "baseline", *names], n=1, cutoff=0.55)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise SpecError(
            f"--against {against!r} is neither reference, baseline, an engine of {a.file.path} ({', '.join(names)}) "
            f"nor a bundle{meant}"
        )
    b = _named(against)
    require_same_inputs(a.file.spec, b.file.spec, other=against)
    return b


def _given(rival: Rival | None, against: str) -> Rival:
    if rival is None:
        raise MeasurementError(f"there is no {against} to time it in turn with", hint="Name the other with --against.")
    return rival
