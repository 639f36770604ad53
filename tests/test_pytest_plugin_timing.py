"""The options of the pytest plugin that latency checks need: where bundles lie, and how long to measure."""

from __future__ import annotations

import json
import shutil

import pytest

from gate.baseline import accept
from gate.pipeline import CheckOptions, Silence, check, seal_passed
from gate.spec import read_spec
from tests.cli import conftest as tiny

REGRESSION = (
    '  [engine.latency]\n  samples = 100\n  warm_up_s = 0.0\n  regression = { against = "baseline", p50 = "900 %" }\n'
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The tiny project, sealed into `dist` and accepted, that now asks for a regression check.

    It is made before pytester begins: that drops what is imported within it, and torch dies of being loaded twice.
    """
    root = tmp_path_factory.mktemp("made")
    file = read_spec(tiny.write(root))
    run = check(file, CheckOptions(cache=root / ".gate/cache", baselines=root / "baselines"), Silence())
    seal_passed(file, run, root / "dist", baselines=root / "baselines")
    accept(run, root=root / "baselines", who="Ada", when="2026-11-21T10:00:00Z", why="first release")
    tiny.write(root, tiny.SPEC + REGRESSION)
    return root


@pytest.fixture
def project(made, pytester, monkeypatch):
    """A copy of it; `.runpytest(*options)` runs pytest in it."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    shutil.copytree(made, pytester.path, dirs_exist_ok=True)
    return pytester


def test_bundles_and_the_limit_of_time_are_options(project):
    result = project.runpytest("-v", "--gate-bundles", "dist")
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["gate.toml::ort::latency.regression_p50 PASSED*"])
    result = project.runpytest("-v", "--gate-bundles", "dist", "--gate-max-time", "0.01", "--gate-report", "out")
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["gate.toml::ort::latency.regression_p50 INCONCLUSIVE*"])
    (path,) = (project.path / "out").rglob("report.json")
    (latency,) = json.loads(path.read_bytes())["engines"][0]["latencies"]
    assert latency["stopped"].startswith("max_time_s = 0.01 s ")


def test_bundles_lie_in_the_root_folder_where_nothing_is_said(project):
    result = project.runpytest("--gate-max-time", "0.01")
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["*bundles/tiny/ort: the accepted baseline's engine is not at hand*"])
    (project.path / "bundles").symlink_to("dist")
    result = project.runpytest("-v", "--gate-max-time", "0.01")
    result.stdout.fnmatch_lines(["gate.toml::ort::latency.regression_p50 INCONCLUSIVE*"])


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_a_limit_of_time_that_is_none_is_an_error_in_use(project, value):
    result = project.runpytest("--gate-bundles", "dist", f"--gate-max-time={value}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*--gate-max-time: needs seconds above 0, got {value}*"])
