import json
import statistics

import pytest

from gate.pytest_benchmark_table import add_latencies
from gate.results import EngineResult, LatencyMetrics
from gate.verdict import Evidence, Failure, Finding, Interval, Limit, Verdict
from tests.cli import conftest as tiny

LATENCY = "  [engine.latency]\n  max_time_s = 60.0\n  warm_up_s = 0.0\n  samples = 60\n  p50_ms = 1000.0\n"
NODE = "gate.toml::ort"


@pytest.fixture
def installed(monkeypatch):
    # Beside other workers it reports no benchmark, which is not what is tested here.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    return pytest.importorskip("pytest_benchmark", minversion="5.3")


@pytest.fixture
def project(pytester, monkeypatch):
    """A folder with a latency budget whose data cannot be used: every check fails, and fast."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    tiny.write(pytester.path, tiny.SPEC.replace("samples = 32", "samples = 33") + LATENCY)
    return pytester


def metrics(durations_ns, name="", batch=8, axes=None):
    ordered = sorted(durations_ns)

    def rank(p):
        return ordered[-(-int(p * 1000) * len(ordered) // 1000) - 1] / 1e6

    return LatencyMetrics(
        name=name,
        timed="host_wall",
        batch=batch,
        axes=axes or {},
        n=len(ordered),
        sessions=5,
        warm_up=200,
        mean_ms=sum(ordered) / len(ordered) / 1e6,
        p50_ms=rank(0.5),
        p90_ms=rank(0.9),
        p95_ms=rank(0.95),
        p99_ms=rank(0.99),
        p99_9_ms=rank(0.999),
        max_ms=ordered[-1] / 1e6,
        throughput=batch * 1e9 * len(ordered) / sum(ordered),
        clock="perf_counter_ns",
        durations_ns=tuple(durations_ns),
    )


def budget(check, estimate, limit):
    return Finding(
        check=check,
        estimate=estimate,
        interval=Interval(estimate, estimate),
        limit=Limit("at_most", limit),
        unit="ms",
        n=10,
        evidence=Evidence.HOST,
        hint="docs/findings.md#latency",
    )


def engine(*latencies, findings=()):
    findings = findings or (budget("latency.p50_ms", 1.0, 2.0),)
    return EngineResult(
        name="ort", backend="onnxruntime", precision="fp32", verdict=Verdict(findings=findings), latencies=latencies
    )


DURATIONS = [1_000_000 + 1_000 * ((7 * index) % 101) for index in range(100)]


class Saved:
    """What pytest-benchmark makes of our entries, told to save them."""

    def __init__(self, pytester, *options):
        self.path = pytester.path / "out.json"
        self.config = pytester.parseconfigure(*options)
        self.session = self.config.pluginmanager.get_plugin("pytest-benchmark")
        self.session.json = self.path

    def of(self, timed):
        self.told = add_latencies(self.config, timed)
        self.session.finish()
        return json.loads(self.path.read_bytes())["benchmarks"]


def test_an_entry_has_the_name_of_its_node_and_our_numbers(installed, pytester):
    findings = (
        budget("latency.p50_ms[batch=8]", 1.0, 2.0),
        budget("latency.p99_ms[batch=8]", 3.0, 2.0),
        budget("latency.p50_ms[batch=1]", 1.0, 2.0),
        budget("parity.rel_rmse", 0.0, 1.0),
        Failure(check="latency", error="RunError", message="it hangs", evidence=Evidence.HOST),
    )
    measured = metrics(DURATIONS, "batch=8")
    saved = Saved(pytester)
    (entry,) = saved.of({NODE: engine(measured, findings=findings)})
    assert saved.told == []
    assert entry["fullname"] == "gate.toml::ort::latency[batch=8]"
    assert entry["name"] == "ort::latency[batch=8]"
    assert entry["group"] == "gate"
    assert entry["param"] == "batch=8"
    assert entry["params"] == {"batch": 8}
    stats = entry["stats"]
    assert stats["data"] == [each / 1e9 for each in DURATIONS]
    assert stats["rounds"] == 100
    assert stats["iterations"] == 1
    assert stats["min"] == pytest.approx(min(DURATIONS) / 1e9, rel=1e-12)
    assert stats["max"] == pytest.approx(measured.max_ms / 1e3, rel=1e-12)
    assert stats["mean"] == pytest.approx(measured.mean_ms / 1e3, rel=1e-12)
    assert stats["median"] == pytest.approx(statistics.median(DURATIONS) / 1e9, rel=1e-12)
    assert stats["stddev"] == pytest.approx(statistics.stdev(DURATIONS) / 1e9, rel=1e-9)
    assert stats["ops"] * 8 == pytest.approx(measured.throughput, rel=1e-9)
    assert entry["extra_info"] == {
        "p50_ms": measured.p50_ms,
        "p95_ms": measured.p95_ms,
        "p99_ms": measured.p99_ms,
        "timed": "host_wall",
        "batch": 8,
        "sessions": 5,
        "backend": "onnxruntime",
        "precision": "fp32",
        "verdicts": {
            "latency.p50_ms[batch=8]": "PASSED",
            "latency.p99_ms[batch=8]": "FAILED",
            "latency": "FAILED",
        },
    }


def test_each_batch_size_of_each_engine_is_an_entry(installed, pytester):
    two = engine(metrics(DURATIONS, "batch=1", 1), metrics(DURATIONS[:9], "batch=8"))
    entries = Saved(pytester).of({NODE: two, "sub/x.gate.toml::trt": engine(metrics(DURATIONS))})
    assert [each["fullname"] for each in entries] == [
        "gate.toml::ort::latency[batch=1]",
        "gate.toml::ort::latency[batch=8]",
        "sub/x.gate.toml::trt::latency",
    ]
    assert [each["stats"]["rounds"] for each in entries] == [100, 9, 100]


def test_grouping_by_a_size_that_an_engine_does_not_have_is_no_error(installed, pytester):
    saved = Saved(pytester, "--benchmark-group-by=param:height")
    with_height = engine(metrics(DURATIONS, "batch=8,height=32", axes={"height": 32}))
    assert len(saved.of({NODE: with_height, "gate.toml::other": engine(metrics(DURATIONS))})) == 2
    assert [name for name, _ in saved.session.groups] == ["height=", "height=32"]


def test_one_inference_is_an_entry_and_none_is_told(installed, pytester):
    saved = Saved(pytester)
    (entry,) = saved.of({NODE: engine(metrics([5_000_000]), LatencyMetrics(**_without_durations()))})
    assert entry["stats"]["stddev"] == 0
    assert saved.told == ["gate.toml::ort::latency[batch=2] has no raw durations: pytest-benchmark does not show it"]


def _without_durations():
    import msgspec

    return msgspec.structs.asdict(metrics([1_000_000], "batch=2", 2)) | {"durations_ns": ()}


@pytest.mark.parametrize("option", ["--benchmark-disable", "--benchmark-skip"])
def test_nothing_is_shown_where_benchmarks_are_off(installed, pytester, option):
    config = pytester.parseconfigure(option)
    assert add_latencies(config, {NODE: engine(metrics(DURATIONS))}) == []
    assert config.pluginmanager.get_plugin("pytest-benchmark").benchmarks == []


def test_without_pytest_benchmark_nothing_is_added_or_told(pytester):
    config = pytester.parseconfigure("-p", "no:benchmark", "-p", "no:pytest-benchmark")
    assert add_latencies(config, {NODE: engine(metrics(DURATIONS))}) == []


class Unlike:
    """A plugin of the name, that keeps its benchmarks in another way."""


@pytest.mark.parametrize("name", ["benchmark", "pytest-benchmark"])
def test_a_version_that_works_in_another_way_is_told_and_is_no_error(pytester, name):
    config = pytester.parseconfigure("-p", "no:benchmark")
    config.pluginmanager.unblock(name)
    config.pluginmanager.register(Unlike(), name)
    (told,) = add_latencies(config, {NODE: engine(metrics(DURATIONS))})
    assert told.startswith("WARNING pytest-benchmark ")
    assert "verdicts and reports do not depend on it" in told


@pytest.mark.parametrize("option", ["--benchmark-disable", "--benchmark-skip"])
def test_an_option_that_turns_benchmarks_off_leaves_no_check_out(installed, project, option):
    result = project.runpytest_subprocess("-v", option)
    result.assert_outcomes(failed=4)
    result.stdout.fnmatch_lines(["gate.toml::ort::latency.p50_ms FAILED*"])


def test_benchmark_only_runs_the_latency_checks_and_says_what_it_leaves_out(installed, project):
    result = project.runpytest_subprocess("-v", "-rs", "--benchmark-only")
    result.assert_outcomes(failed=1, skipped=3)
    result.stdout.fnmatch_lines(
        ["gate.toml::ort::latency.p50_ms FAILED*", "SKIPPED*Skipping non-benchmark (--benchmark-only active)*"]
    )


def test_an_engine_that_was_not_timed_is_not_shown(installed, project):
    result = project.runpytest_subprocess("--benchmark-json=out.json", "-k", "latency")
    result.assert_outcomes(failed=1, deselected=3)
    assert not (project.path / "out.json").exists()


def test_a_report_is_written_even_where_another_plugin_cannot_end_the_session(project):
    tiny.write(project.path, tiny.BROKEN)
    project.makeconftest(
        """
        import pytest

        @pytest.hookimpl(hookwrapper=True)
        def pytest_sessionfinish(session):
            raise RuntimeError("cannot save")
            yield
        """
    )
    result = project.runpytest_subprocess("--gate-report=report")
    result.stderr.fnmatch_lines(["RuntimeError: cannot save"])
    assert result.ret != 0
    assert (project.path / "report" / "tiny" / "report.json").is_file()


@pytest.mark.slow
def test_a_real_run_has_the_numbers_of_the_report_and_can_be_compared_with_the_next(installed, project):
    tiny.write(project.path, tiny.SPEC + LATENCY)
    options = ("-v", "--gate-report=report", "--benchmark-columns=min,mean,rounds")
    result = project.runpytest_subprocess(*options, "--benchmark-json=out.json", "--benchmark-autosave")
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["*benchmark 'gate': 1 tests*", "ort::latency *"])
    (ours,) = json.loads((project.path / "out.json").read_bytes())["benchmarks"]
    (reported,) = json.loads((project.path / "report/tiny/report.json").read_bytes())["engines"][0]["latencies"]
    assert ours["fullname"] == "gate.toml::ort::latency"
    assert ours["stats"]["rounds"] == reported["n"] == len(ours["stats"]["data"])
    assert ours["stats"]["mean"] * 1e3 == pytest.approx(reported["mean_ms"], rel=1e-9)
    assert ours["stats"]["max"] * 1e3 == pytest.approx(reported["max_ms"], rel=1e-9)
    for key in ("p50_ms", "p95_ms", "p99_ms", "sessions", "timed", "batch"):
        assert ours["extra_info"][key] == reported[key]
    assert ours["extra_info"]["verdicts"] == {"latency.p50_ms": "PASSED"}

    again = project.runpytest_subprocess(
        *options, "--benchmark-compare", "--benchmark-only", "--benchmark-compare-fail=min:100000%"
    )
    again.assert_outcomes(passed=1, skipped=3)
    again.stdout.fnmatch_lines_random(["ort::latency (0001_*", "ort::latency (NOW)*"])
