"""One engine timed without a check: against budgets, in turn with another, or from what trtexec wrote."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from gate.engines import backend as backend_named
from gate.errors import BackendUnavailable, MeasurementError, SpecError
from gate.latency.budgets import budget_findings, summarise
from gate.latency.config import LatencySpec, latency_problems, timed_tables
from gate.latency.exported_times import MOST_CHARACTERS, exported_times
from gate.sessions.job import Subject
from gate.spec import EngineSpec, GateSpec, SpecFile, batch_axis_of, dynamic_axes_of, read_spec
from gate.steps.context import CheckOptions, Context, Observer, Silence
from gate.steps.feeds import Feeds, RandomFeeds, SampleFeeds
from gate.steps.latency import Rival, Timed, Timing, measured_latency
from gate.steps.make import make_engine
from gate.steps.rivals import bundle_rival, engine_subject, rival_of
from gate.store import SPEC_PATH, verify
from gate.verdict import Evidence

_SEPARATOR = "::"


@dataclass(frozen=True)
class _Opened:
    """What A or B came to.

    Args:
        spec: Its inputs.
        engine: Its part of the spec.
        subject: What a session loads.
        feeds: The batches that go with it.
        run: Its spec's run; None for a bundle.
    """

    spec: GateSpec
    engine: EngineSpec
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
        a = _opened(first, options, observer, closing)
        engine = msgspec.structs.replace(a.engine, latency=spec)
        evidence = backend_named(engine.backend).runs_here(engine)
        if evidence is None:
            raise BackendUnavailable(
                f"backend {engine.backend!r} can only compile on this machine, so there is nothing to time",
                hint="gate doctor says what is usable here.",
            )
        sizes = dynamic_axes_of(a.spec)
        for _, message in latency_problems(spec, batch_axis=batch_axis_of(a.spec), axes=sizes):
            raise SpecError(message.removeprefix("[engine.latency] "))
        if spec.timed != "host_wall" and evidence is not Evidence.DEVICE:
            raise SpecError(f'--timed {spec.timed} needs an engine on a GPU; leave it out, which is "host_wall"')
        timing = Timing(
            file=None,
            engine=engine,
            subject=a.subject,
            evidence=evidence,
            rival=lambda _: _rival(a, str(against), options, observer, closing, evidence=evidence),
            feeds=a.feeds,
            advance=observer.advance,
            max_time_s=options.max_time_s,
        )
        observer.stage("latency", engine=engine.name)
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
        MeasurementError: A file cannot be read, or is not what trtexec writes.
    """
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
    cell = msgspec.structs.replace(timed_tables(asked)[0].cells[0], name="")
    metrics = summarise(
        times.subjects, cell=cell, spec=asked, clock="trtexec", stopped="as trtexec measured it", notes=times.notes
    )
    found = budget_findings(times.subjects, cell=cell, spec=asked, evidence=Evidence.DEVICE)
    return Timed(latencies=(metrics,), findings=found)


def _opened(name: str, options: CheckOptions, observer: Observer, closing: list[Callable[[], None]]) -> _Opened:
    path, separator, wanted = name.partition(_SEPARATOR)
    if not separator and Path(path).is_dir():
        return _bundle(Path(path))
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
    engine = file.engine(wanted)
    run = Context(file, replace(options, engines=(wanted,)), observer)
    closing.append(run.close)
    run.open_samples()
    run.open_reference()
    made = make_engine(run, engine, backend_named(engine.backend))
    subject = engine_subject(engine, file=file, made=made)
    return _Opened(file.spec, engine, subject, SampleFeeds(file.spec, run.source), run)


def _bundle(folder: Path) -> _Opened:
    rival = bundle_rival(folder, against=folder.name)
    file = _spec_of(folder)
    return _Opened(file.spec, file.engine(verify(folder).metadata.engine), rival.subject, RandomFeeds(file.spec), None)


def _spec_of(folder: Path) -> SpecFile:
    return read_spec(folder / SPEC_PATH)


def _rival(
    a: _Opened,
    against: str,
    options: CheckOptions,
    observer: Observer,
    closing: list[Callable[[], None]],
    *,
    evidence: Evidence,
) -> Rival:
    """What B names."""
    if a.run is not None and against in ("reference", "baseline", *(each.name for each in a.run.spec.engines)):
        return replace(rival_of(a.run, a.engine, against, evidence=evidence), against="b")
    if against in ("reference", "baseline"):
        raise SpecError(
            f"a bundle has no {against} beside it", hint="Name an engine of a spec as A: gate latency gate.toml::ENGINE"
        )
    b = _opened(against, options, observer, closing)
    if dict.fromkeys(b.spec.inputs) != dict.fromkeys(a.spec.inputs):
        raise SpecError(
            f"A takes {', '.join(a.spec.inputs)}, and B takes {', '.join(b.spec.inputs)}: they cannot be given the same"
        )
    return Rival("b", against, b.subject)
