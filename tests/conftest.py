"""What every test starts from."""

import os

# Small arrays on shared cores: threads of BLAS and of the runtimes only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["pytester"]

# The same examples in every run, and no deadline: CI's machines differ in speed.
settings.register_profile(
    "gate", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("gate")


def pytest_configure(config: pytest.Config) -> None:
    """A run that was asked for the GPU tests counts them: one that skipped them all has shown nothing."""
    if "gpu" in config.option.markexpr and "not gpu" not in config.option.markexpr:
        config.pluginmanager.register(AskedForGpu(config), "asked-for-gpu")


class AskedForGpu:
    """Fails a run of `-m gpu` in which no test ran."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.ran = 0
        self.skipped = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.ran += report.when == "call" and not report.skipped
        self.skipped += report.skipped

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.skipped and not self.ran:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.skipped and not self.ran:
            terminalreporter.write_line(
                f"asked for the tests that need a GPU, and all {self.skipped} were skipped: nothing was shown", red=True
            )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; saying so is better than a failure nobody can act on."""
    if any(item.get_closest_marker("gpu") for item in items) and not _has_gpu():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))


def _has_gpu() -> bool:
    try:
        import pynvml
    except ImportError:
        return False
    try:
        pynvml.nvmlInit()
        return bool(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return False
