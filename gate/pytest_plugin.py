"""The pytest plugin: each `gate.toml` is a file of tests, one per engine and check.

    examples/digits/gate.toml::ort-fp16::parity PASSED

The names are known from the spec alone; an engine is built and run when the first of its tests is. A test passes only
where a finding of its own passed: FAILED, INCONCLUSIVE and a check that was not made are failures, and an optional
engine that cannot run here is skipped.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gate.errors import GateError
from gate.pytest_benchmark_table import add_latencies, is_only_benchmarks

if TYPE_CHECKING:
    from gate.results import CheckRun, EngineResult
    from gate.spec import EngineSpec, SpecFile

UPDATE_REASON = "pytest --gate-update-baselines"
_STATUS = "gate.status"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options `--gate-*`."""
    group = parser.getgroup("gate", "accuracy-regression gate")
    group.addoption(
        "--gate-report", metavar="DIR", help="write report.json and report.md of each spec into DIR/<model>"
    )
    group.addoption("--gate-engines", metavar="A,B", help="collect only these engines")
    group.addoption("--gate-cache", metavar="DIR", help="reuse what is unchanged (.gate/cache in the root folder)")
    group.addoption("--gate-baselines", metavar="DIR", help="accepted baselines (baselines in the root folder)")
    group.addoption(
        "--gate-bundles", metavar="DIR", help="sealed bundles of accepted engines (bundles in the root folder)"
    )
    group.addoption("--gate-max-time", type=float, metavar="S", help="measure each latency no longer than S seconds")
    group.addoption(
        "--gate-update-baselines",
        action="store_true",
        help="accept what this run measures as baselines, and fail the run: look at them and commit them",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Keep the runs of this session.

    Raises:
        UsageError: A folder that was asked for is a file, or a time is not above 0.
    """
    limit_s = config.getoption("gate_max_time")
    if limit_s is not None and not 0.0 < limit_s < math.inf:
        raise pytest.UsageError(f"--gate-max-time: needs seconds above 0, got {limit_s:g}")
    for option in ("gate_report", "gate_cache", "gate_baselines", "gate_bundles"):
        given = config.getoption(option)
        if given and (config.invocation_params.dir / given).is_file():
            raise pytest.UsageError(f"--{option.replace('_', '-')}: {given} is not a folder")
    config.stash[_RUNS] = Runs(config)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect `gate.toml` and `*.gate.toml`, apart from the record of a spec in a sealed bundle."""
    if (file_path.name == "gate.toml" or file_path.name.endswith(".gate.toml")) and not _is_sealed(file_path):
        collector: pytest.Collector = SpecCollector.from_parent(parent, path=file_path)
        return collector
    return None


def _is_sealed(path: Path) -> bool:
    return path.parent.name == "policy" and (path.parents[1] / "seals" / "verdict.dsse.json").exists()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse an engine name that no spec has: nothing would be tested under it."""
    runs, asked = session.config.stash[_RUNS], _asked_engines(session.config)
    unknown = sorted(asked - runs.engines_seen)
    if runs.engines_seen and unknown and not session.config.getoption("lf", default=False):
        raise pytest.UsageError(
            f"--gate-engines: no spec has {', '.join(unknown)}; there is {', '.join(sorted(runs.engines_seen))}"
        )


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report: pytest.TestReport | pytest.CollectReport) -> Any:
    """Show an inconclusive test by that word; it counts as failed."""
    properties = getattr(report, "user_properties", ())
    if report.failed and any(tuple(each) == (_STATUS, "INCONCLUSIVE") for each in properties):
        return "failed", "I", ("INCONCLUSIVE", {"yellow": True})
    return None


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker of pytest-xdist ran."""
    node.config.stash[_RUNS].take_over(getattr(node, "workeroutput", {}).get("gate_runs", ()))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, Any, Any]:
    """Write reports and baselines; a run that writes baselines fails.

    Before any other plugin ends the session: what one of those does cannot keep a report from being written, and
    pytest-benchmark saves what it holds by then.
    """
    config = session.config
    runs = config.stash[_RUNS]
    if hasattr(config, "workeroutput"):
        config.workeroutput["gate_runs"] = runs.handed_over()
    else:
        _finish(session, runs)
        runs.messages += add_latencies(config, runs.timed)
    return (yield)


def _finish(session: pytest.Session, runs: Runs) -> None:
    config = session.config
    try:
        runs.write_reports()
        if config.getoption("gate_update_baselines"):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            runs.update_baselines()
    except GateError as err:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        runs.messages.append(f"ERROR {err}")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say what was written."""
    messages = config.stash[_RUNS].messages
    if messages:
        terminalreporter.section("gate")
        for message in messages:
            terminalreporter.line(message)


@pytest.fixture
def gate(request: pytest.FixtureRequest) -> Gate:
    """Check specs in tests of one's own: `run = gate.check("gate.toml", engine="ort-fp16")`."""
    return Gate(request.config)


class Gate:
    """What the fixture `gate` gives."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def check(self, path: str | Path, engine: str | None = None) -> CheckRun:
        """Run a spec, or one engine of it; once per session.

        Args:
            path: Of the spec, from the working folder or from pytest's root folder.
            engine: Its name; left out: all.

        Raises:
            GateError: As `gate.check`.
        """
        from gate.spec import read_spec

        __tracebackhide__ = True
        given = Path(path)
        from_root = self._config.rootpath / given
        try:
            file = read_spec(from_root if not given.exists() and from_root.exists() else given)
            return self._config.stash[_RUNS].check(file, () if engine is None else (engine,))
        except GateError as err:
            # Its message says what to do; where in the gate it was raised does not.
            raise err.with_traceback(None) from None


class Runs:
    """The runs of a session: each engine of a spec is run once."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._done: dict[tuple[Path, tuple[str, ...]], CheckRun | GateError] = {}
        self._from_workers: list[CheckRun] = []
        self.engines_seen: set[str] = set()
        self.timed: dict[str, EngineResult] = {}
        self.messages: list[str] = []

    def check(self, file: SpecFile, engines: tuple[str, ...]) -> CheckRun:
        """The run of these engines, now or from before.

        Raises:
            GateError: As `gate.check`.
        """
        key = (file.path.resolve(), engines)
        if key not in self._done:
            try:
                self._done[key] = self._run(file, engines)
            except GateError as err:
                self._done[key] = err
        done = self._done[key]
        if isinstance(done, GateError):
            raise done
        return done

    def _run(self, file: SpecFile, engines: tuple[str, ...]) -> CheckRun:
        import warnings

        from gate import pipeline

        options = pipeline.CheckOptions(
            engines=engines,
            cache=self._folder("gate_cache", ".gate/cache"),
            baselines=self.baselines,
            bundles=self._folder("gate_bundles", "bundles"),
            max_time_s=self._config.getoption("gate_max_time"),
        )
        with warnings.catch_warnings():
            # A framework's warning is listed by pytest; it is no verdict, even where `-W error` is set.
            warnings.simplefilter("default")
            return pipeline.check(file, options, pipeline.Silence())

    @property
    def baselines(self) -> Path:
        """Folder of the accepted baselines."""
        return self._folder("gate_baselines", "baselines")

    def _folder(self, option: str, default: str) -> Path:
        given = self._config.getoption(option)
        return self._config.invocation_params.dir / given if given else self._config.rootpath / default

    def handed_over(self) -> list[str]:
        """A worker's runs, as JSON for the process that started it."""
        from gate.report.json_report import json_bytes

        return [json_bytes(run, pretty=False).decode() for run in self._finished()]

    def take_over(self, texts: Any) -> None:
        """A worker's runs."""
        import json

        from gate.results import run_from_builtins

        self._from_workers += [run_from_builtins(json.loads(text)) for text in texts]

    def _finished(self) -> list[CheckRun]:
        return [*(run for run in self._done.values() if not isinstance(run, GateError)), *self._from_workers]

    def merged(self) -> list[CheckRun]:
        """One run per spec, of all its engines that were run; by path."""
        import msgspec

        merged: dict[str, CheckRun] = {}
        for run in self._finished():
            before = merged.get(run.spec_path)
            if before is None:
                merged[run.spec_path] = run
                continue
            names = {result.name for result in before.engines}
            more = tuple(result for result in run.engines if result.name not in names)
            device = run.device if run.device.kind == "gpu" else before.device
            merged[run.spec_path] = msgspec.structs.replace(before, engines=(*before.engines, *more), device=device)
        return [merged[path] for path in sorted(merged)]

    def write_reports(self) -> None:
        """Both reports of each spec, where they were asked for.

        Raises:
            GateError: The disk is full or may not be written to.
        """
        if not self._config.getoption("gate_report"):
            return
        from gate.atomic import write_bytes
        from gate.report.json_report import write_report
        from gate.report.markdown import markdown

        root = self._folder("gate_report", ".")
        taken: set[str] = set()
        for run in self.merged():
            name, count = run.model_id, 1
            while name in taken:
                count += 1
                name = f"{run.model_id}-{count}"
            taken.add(name)
            write_bytes(root / name / "report.md", markdown(run).encode())
            write_report(run, root / name / "report.json")
            self.messages.append(f"report: {root / name / 'report.md'}")

    def update_baselines(self) -> None:
        """Accept what was measured.

        Raises:
            GateError: The disk is full or may not be written to.
        """
        from gate.author import author
        from gate.baseline import accept
        from gate.utc import utc_now

        now = utc_now()
        written = 0
        seen: set[tuple[str, str]] = set()
        for run in self._finished():
            engines = tuple(each.name for each in run.engines if (run.spec_path, each.name) not in seen)
            seen.update((run.spec_path, name) for name in engines)
            if not engines:
                continue
            result = accept(run, engines=engines, root=self.baselines, who=author(), when=now, why=UPDATE_REASON)
            self.messages += [f"baseline written: {each.path}" for each in result.accepted]
            self.messages += [f"baseline not written: {each.engine}: {each.reason}" for each in result.skipped]
            written += len(result.accepted)
        self.messages.append(
            f"--gate-update-baselines wrote {written} baseline{'' if written == 1 else 's'}, so this run FAILED; "
            "look at them, commit them, and run again without it"
        )


_RUNS = pytest.StashKey[Runs]()


class SpecCollector(pytest.File):
    """A `gate.toml`."""

    def collect(self) -> Iterator[pytest.Collector]:
        """Its engines.

        Raises:
            SpecError: It is malformed.
        """
        import os

        from gate.spec import read_spec

        shown = os.path.relpath(self.path)
        file = read_spec(self.path if shown.startswith(os.pardir) else Path(shown))
        asked = _asked_engines(self.config)
        for engine in file.spec.engines:
            self.config.stash[_RUNS].engines_seen.add(engine.name)
            if not asked or engine.name in asked:
                collector: pytest.Collector = EngineCollector.from_parent(self, name=engine.name, file=file)
                yield collector

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException]) -> Any:  # type: ignore[override]  # as Collector
        """The message alone, where the spec is at fault."""
        return str(excinfo.value) if isinstance(excinfo.value, GateError) else super().repr_failure(excinfo)


class EngineCollector(pytest.Collector):
    """One engine of a spec."""

    def __init__(self, *, file: SpecFile, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.file = file

    def collect(self) -> Iterator[pytest.Item]:
        """Its checks."""
        engine = self.file.engine(self.name)
        for name in check_names(engine, self.file):
            item: pytest.Item = CheckItem.from_parent(self, name=name, file=self.file, engine=engine)
            if self.config.pluginmanager.hasplugin("xdist"):
                item.add_marker(pytest.mark.xdist_group(name=str(self.path)))
            if is_latency(name) and is_only_benchmarks(self.config):
                # By this pytest-benchmark knows what to run; `--benchmark-skip` still leaves no check out.
                item.fixturenames = ["benchmark"]  # type: ignore[attr-defined]  # of test functions
            yield item

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException]) -> Any:  # type: ignore[override]  # as Collector
        """The message alone, where the spec is at fault."""
        return str(excinfo.value) if isinstance(excinfo.value, GateError) else super().repr_failure(excinfo)


class CheckItem(pytest.Item):
    """One check of one engine."""

    def __init__(self, *, file: SpecFile, engine: EngineSpec, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.file = file
        self.engine = engine

    def runtest(self) -> None:
        """Run the engine, unless another of its checks did, and judge this check.

        Raises:
            NotPassed: It did not pass.
            GateError: The spec, its data or its reference are at fault.
        """
        from gate.pipeline import not_run_reason

        reason = not_run_reason(self.engine, self.file)
        if reason is not None:
            pytest.skip(f"NOT RUN: {reason}")
        run = self.config.stash[_RUNS].check(self.file, (self.engine.name,))
        if is_latency(self.name) and self.parent is not None:
            self.config.stash[_RUNS].timed[self.parent.nodeid] = run.engines[0]
        judgement = judge(run.engines[0], self.name, check_names(self.engine, self.file))
        self.user_properties += judgement.properties
        if judgement.status != "PASSED":
            raise NotPassed("\n".join(judgement.lines))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The finding, not a traceback."""
        if isinstance(excinfo.value, (GateError, NotPassed)):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """The spec, its first line, and the names."""
        # A line, since pytest needs one to report an item that a marker skips; and not the end of the node's id, which
        # it would take apart at its dots.
        return self.path, 0, f"{self.engine.name} {self.name}"


class NotPassed(Exception):
    """A check did not pass; the message is its findings."""


class Judgement:
    """What one test came to.

    Args:
        status: `PASSED`, `FAILED` or `INCONCLUSIVE`.
        lines: Why, where it is not PASSED.
        properties: Of the test, for JUnit XML: its status and the sentence of each of its findings.
    """

    def __init__(self, status: str, lines: list[str], sentences: dict[str, str]) -> None:
        self.status = status
        self.lines = lines
        self.properties: list[tuple[str, object]] = [(_STATUS, status), *sentences.items()]


def check_names(engine: EngineSpec, file: SpecFile) -> tuple[str, ...]:
    """The tests of an engine, known from the spec alone."""
    from gate.latency.config import latency_checks
    from gate.metamorphic import applicable_checks

    names: list[str] = [] if engine.plan is not None else ["build"]
    if engine.parity is not None:
        names.append("parity")
    if engine.required_evidence != "preflight" and applicable_checks(engine, file.spec.inputs):
        names.append("metamorphic")
    if engine.task is not None:
        limits = [key for key in engine.task.__struct_fields__ if getattr(engine.task, key) is not None]
        for key in limits or ["top1_drop_at_most_pp"]:
            names.append("task." + key.replace("_drop_at_most_pp", "_drop_pp").replace("_at_least", ""))
    names += _task_checks(engine, file)
    names += latency_checks(engine.latency)
    if engine.stages is not None:
        names.append("stages")
    if engine.usage is not None:
        names.append("usage")
    if engine.memory is not None:
        names += [f"memory.{key}" for key in engine.memory.budgets]
    if engine.baseline is not None:
        names.append("baseline")
    return tuple(names) or ("build",)


def is_latency(name: str) -> bool:
    """Whether a test is of what `[engine.latency]` asks for."""
    return name.partition(".")[0] == "latency"


def _task_checks(engine: EngineSpec, file: SpecFile) -> list[str]:
    """Names of the checks of a task other than classification, in the order of its limits.

    Raises:
        SpecError: There is no such kind of task, or a limit is on nothing that it measures.
    """
    if engine.task_limits is None or file.spec.task is None:
        return []
    from gate.metrics.findings import asked_limits
    from gate.metrics.kinds import kind_named

    return [each.check for each in asked_limits(kind_named(file.spec.task.kind), engine, file)]


def judge(result: EngineResult, name: str, names: tuple[str, ...]) -> Judgement:
    """What the findings of an engine say of one of its tests. Pure.

    A test without a finding of its own has failed, and says what kept it from being made. A finding that belongs to
    no test is shown by those; where there are none, the engine's first test fails with it, so that it is not lost.

    Args:
        result: Of the engine.
        name: Of the test.
        names: Of all tests of the engine.
    """
    from gate.verdict import Failure, Status
    from gate.wording import advice, anchor, belongs, failure_lines, finding_sentence

    if result.verdict is None:
        return Judgement("FAILED", [f"NOT RUN: {result.not_run}"], {})
    findings = result.verdict.findings
    reached = {each for each in names if any(belongs(finding.check, each) for finding in findings)}
    stray = [each for each in result.failing if not any(belongs(each.check, other) for other in names)]
    own = [finding for finding in findings if belongs(finding.check, name)]
    sentences = {f"gate.{each.check}": finding_sentence(each, precision=result.precision) for each in own}
    lines: list[str] = []
    if own:
        wrong = [finding for finding in result.failing if finding in own]
        if name == names[0] and reached == set(names):
            wrong += stray
    else:
        wrong = stray or [finding for finding in result.failing if isinstance(finding, Failure)]
        why = "there is no finding: nothing was compared"
        if wrong:
            why = f"not reached: {finding_sentence(wrong[0], precision=result.precision)}"
        lines.append(f"FAILED  {result.name}  {name}: {why}")
    if not wrong and not lines:
        return Judgement("PASSED", [], sentences)
    for index, finding in enumerate(wrong):
        if own or index:
            lines.append(
                f"{finding.status.value}  {result.name}  {finding_sentence(finding, precision=result.precision)}"
            )
        lines += [f"    {line}" for line in failure_lines(finding)]
        lines += [f"    {line}" for line in advice(finding).splitlines()]
        lines.append(f"    {anchor(finding.check)}")
    lines += [f"    {note}" for note in (*result.notes, *result.warnings)]
    inconclusive = bool(own) and all(finding.status is Status.INCONCLUSIVE for finding in wrong)
    status = "INCONCLUSIVE" if inconclusive else "FAILED"
    # pytest's summary shows the beginning of the first line, after the status and the engine's name.
    lines[0] = lines[0].removeprefix(f"{status}  {result.name}  ")
    return Judgement(status, lines, sentences)


def _asked_engines(config: pytest.Config) -> frozenset[str]:
    given = config.getoption("gate_engines") or ""
    return frozenset(name.strip() for name in given.split(",") if name.strip())
