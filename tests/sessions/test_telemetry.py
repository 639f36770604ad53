"""What the GPU and the process do while a session runs."""

# ruff: noqa: N802  the simulator has the names of NVML's functions
import os
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from gate.device import open_context
from gate.errors import MeasurementError
from gate.latency.measurement import MemoryUse, Reading
from gate.sessions.telemetry import MemoryMarks, measured_usage, open_watch


class NvmlSimulator:
    """NVML's bindings as far as a watch calls them: one GPU, divided or not."""

    NVML_CLOCK_SM = 1
    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        """As NVML's."""

    def __init__(self, *, gpus=1, lacks=()):
        self.gpus = gpus
        self.lacks = lacks
        self.open = 0
        self.pids = []
        self.energy = [1000]
        self.shares = [40]
        self.used = 100 << 20
        self.asked = []

    def _say(self, name, value):
        self.asked.append(name)
        if name in self.lacks or "everything" in self.lacks:
            raise self.NVMLError("Not Supported")
        return value

    def nvmlInit(self):
        if self.gpus is None:
            raise self.NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetCount(self):
        return self.gpus

    def nvmlDeviceGetHandleByIndex(self, index):
        if index >= (self.gpus or 0):
            raise self.NVMLError("Invalid Argument")
        return "whole"

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return "part"

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, part):
        return "whole"

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return self._say("clock", 1980)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return self._say("reasons", 0x1 | 0x2 | 0x4)

    def nvmlDeviceGetPowerUsage(self, handle):
        return self._say("power", 350_500)

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return self._say("temperature", 61)

    def nvmlDeviceGetUtilizationRates(self, handle):
        share = self.shares.pop(0) if len(self.shares) > 1 else self.shares[0]
        return self._say("utilisation", SimpleNamespace(gpu=share, memory=3))

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return self._say("processes", [SimpleNamespace(pid=pid) for pid in self.pids])

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return self._say("energy", self.energy.pop(0) if len(self.energy) > 1 else self.energy[0])

    def nvmlDeviceGetMemoryInfo(self, handle):
        return self._say("memory", SimpleNamespace(used=self.used if handle == "whole" else 7))


@pytest.fixture(autouse=True)
def visible(request, monkeypatch):
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")


def watching(simulator):
    watch = open_watch(simulator)
    assert watch is not None
    return watch


def test_reading_has_all_that_the_driver_says_and_the_clock_first():
    simulator = NvmlSimulator()
    watch = watching(simulator)
    simulator.asked.clear()
    assert watch.read(1) == Reading(
        subject=1,
        sm_clock_mhz=1980,
        temperature_c=61,
        power_w=350.5,
        slowdowns=("sw_power_cap",),
        gpu_percent=40,
        others=0,
    )
    assert simulator.asked[0] == "clock"
    assert len(simulator.asked) == 6
    assert simulator.open == 1


@pytest.mark.parametrize(
    ("lacks", "field"),
    [
        ("clock", "sm_clock_mhz"),
        ("temperature", "temperature_c"),
        ("power", "power_w"),
        ("reasons", "slowdowns"),
        ("utilisation", "gpu_percent"),
        ("processes", "others"),
    ],
)
def test_what_the_driver_does_not_say_is_none_and_the_rest_stays(lacks, field):
    reading = watching(NvmlSimulator(lacks=(lacks,))).read(0)
    assert [name for name in reading.__struct_fields__ if getattr(reading, name) is None] == [field]


def test_lost_gpu_says_nothing_and_raises_nothing():
    watch = watching(NvmlSimulator(lacks=("everything",)))
    assert watch.read(0) == Reading(subject=0)
    assert watch.energy_mj() is watch.busy_percent() is watch.used_bytes() is None


def test_bindings_without_a_function_say_none():
    class OldBindings(NvmlSimulator):
        def __getattribute__(self, name):
            if name == "nvmlDeviceGetTotalEnergyConsumption":
                raise AttributeError(name)
            return super().__getattribute__(name)

    assert watching(OldBindings()).energy_mj() is None


def test_no_gpu_no_driver_or_a_hidden_gpu_is_no_watch(monkeypatch):
    none = NvmlSimulator(gpus=0)
    assert open_watch(none) is None
    assert none.open == 0
    assert open_watch(NvmlSimulator(gpus=None)) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert open_watch(NvmlSimulator()) is None


def test_memory_of_a_mig_instance_is_its_own(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a")
    assert watching(NvmlSimulator()).used_bytes() == 7


@pytest.mark.parametrize(
    ("before", "now", "others"),
    [
        ([], [], 0),
        ([], [os.getpid()], 0),
        ([os.getppid()], [os.getppid(), os.getpid()], 0),
        ([], [os.getpid(), 4_000_001], 1),
        ([4_000_001], [4_000_001, os.getpid()], 0),
        ([4_000_001], [4_000_001, 4_000_002, os.getpid(), os.getpid()], 1),
        ([], [4_000_009], 0),
        ([4_000_001], [4_000_001], 0),
        ([4_000_001], [4_000_001, 4_000_009], 0),
        ([4_000_001], [4_000_001, 4_000_009, 4_000_002], 1),
        ([4_000_001], [4_000_009], 0),
    ],
    ids=[
        "nobody",
        "this process",
        "this process and its parent",
        "a newcomer",
        "one that was there",
        "both",
        "in a container: this process",
        "in a container: one that was there, without a context here",
        "in a container: one that was there",
        "in a container: one that was there and a newcomer",
        "in a container: one that was there has gone",
    ],
)
def test_newcomers_are_counted_without_this_process(before, now, others):
    simulator = NvmlSimulator()
    simulator.pids = before
    watch = watching(simulator)
    simulator.pids = now
    assert watch.read(0).others == others


def test_work_of_a_process_that_has_ended_is_waited_for():
    simulator = NvmlSimulator()
    simulator.shares = [98, 60, 4, 98]
    waited = []
    assert watching(simulator).busy_percent(settle_s=1.5, sleep=waited.append) == 4
    assert len(waited) == 2


def test_gpu_that_stays_busy_is_busy():
    simulator = NvmlSimulator()
    waited = []
    assert watching(simulator).busy_percent(settle_s=1.5, sleep=waited.append) == 40
    assert sum(waited) == pytest.approx(1.5)


class Time:
    """A clock that only calls move on."""

    def __init__(self, step_s):
        self.now = 50.0
        self.step_s = step_s
        self.calls = []

    def call(self, index):
        self.calls.append(index)
        self.now += self.step_s

    def clock(self):
        return self.now

    def cpu(self):
        return self.now * 0.25


def used_by(simulator, *, step_s=0.01, seconds=1.0):
    run = Time(step_s)
    watch = None if simulator is None else watching(simulator)
    return run, measured_usage(run.call, seconds, watch, clock=run.clock, cpu_clock=run.cpu)


def test_usage_takes_energy_from_the_counter_and_power_from_energy():
    simulator = NvmlSimulator()
    simulator.energy = [1_000_000, 1_400_000]
    run, usage = used_by(simulator)
    assert run.calls == list(range(usage.inferences))
    assert usage.seconds == pytest.approx(1.0, abs=0.011)
    assert usage.inferences in (100, 101)
    assert usage.energy_mj == 400_000.0
    assert usage.power_w == pytest.approx(400.0, rel=0.011)
    assert usage.gpu_percent == 40.0
    assert usage.cpu_percent == pytest.approx(25.0)


def test_usage_looks_every_50_ms_of_the_second_half():
    simulator = NvmlSimulator()
    used_by(simulator)
    assert 9 <= simulator.asked.count("utilisation") <= 11
    assert simulator.asked.count("power") == simulator.asked.count("utilisation")


@pytest.mark.parametrize("energy", [[1000, 1000], [1000, 5]], ids=["stood still", "began anew"])
def test_energy_counter_that_says_nothing_leaves_power_to_the_readings(energy):
    simulator = NvmlSimulator()
    simulator.energy = energy
    usage = used_by(simulator)[1]
    assert usage.energy_mj is None
    assert usage.power_w == pytest.approx(350.5)


def test_usage_of_a_gpu_that_says_nothing_has_no_numbers_of_it():
    usage = used_by(NvmlSimulator(lacks=("everything",)))[1]
    assert usage.energy_mj is usage.power_w is usage.gpu_percent is None
    assert usage.cpu_percent is not None


def test_usage_without_a_gpu_has_the_processor_alone():
    usage = used_by(None)[1]
    assert usage.energy_mj is usage.power_w is usage.gpu_percent is None
    assert usage.cpu_percent == pytest.approx(25.0)


def test_call_that_is_longer_than_the_time_is_made_once_and_looked_at():
    simulator = NvmlSimulator()
    run, usage = used_by(simulator, step_s=7.0)
    assert run.calls == [0]
    assert usage.seconds == 7.0
    assert usage.gpu_percent == 40.0


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_usage_over_no_time_is_an_error(seconds):
    with pytest.raises(MeasurementError, match="a time above 0 s"):
        measured_usage(lambda index: None, seconds, None)


def test_error_of_an_inference_is_not_hidden():
    def broken(index):
        raise MeasurementError(f"inference {index} failed")

    with pytest.raises(MeasurementError, match="inference 0 failed"):
        measured_usage(broken, 1.0, None)


def test_busy_loop_takes_one_core_or_less_by_the_real_clocks():
    usage = measured_usage(lambda index: sum(range(1000)), 0.2, None)
    assert usage.seconds == pytest.approx(0.2, abs=0.15)
    assert 5.0 < (usage.cpu_percent or 0.0) < 150.0


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_host_memory_is_steady_and_peak_above_the_start():
    marks = MemoryMarks(None)
    held = np.ones(48 * 2**20, dtype=np.uint8)
    del_me = np.ones(48 * 2**20, dtype=np.uint8)
    del del_me
    marks.steady()
    use = marks.use()
    assert held.size
    assert use.host_steady_mib == pytest.approx(48, abs=12)
    assert use.host_peak_mib == pytest.approx(96, abs=16)
    assert use.device_steady_mib is use.device_peak_mib is None


def test_device_memory_is_watched_while_engines_are_loaded_and_not_after():
    simulator = NvmlSimulator()
    marks = MemoryMarks(watching(simulator))
    simulator.used = 600 << 20
    deadline = time.monotonic() + 10
    seen = len(simulator.asked)
    while len(simulator.asked) < seen + 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    simulator.used = 300 << 20
    marks.steady()
    simulator.used = 900 << 20
    looked = len(simulator.asked)
    time.sleep(0.05)
    assert len(simulator.asked) == looked
    simulator.used = 250 << 20
    use = marks.use()
    assert use.device_peak_mib == 500.0
    assert use.device_steady_mib == 200.0


def test_device_memory_at_the_end_counts_for_the_peak():
    simulator = NvmlSimulator()
    marks = MemoryMarks(watching(simulator))
    simulator.used = 300 << 20
    marks.steady()
    simulator.used = 700 << 20
    assert marks.use().device_peak_mib == 600.0


def test_memory_that_the_driver_does_not_tell_is_none():
    marks = MemoryMarks(watching(NvmlSimulator(lacks=("memory",))))
    marks.steady()
    use = marks.use()
    assert use.device_peak_mib is use.device_steady_mib is None


def test_memory_without_its_steady_mark_has_none():
    use = MemoryMarks(None).use()
    assert use == MemoryUse(host_peak_mib=use.host_peak_mib)


@pytest.mark.gpu
def test_watch_reads_the_gpu_here():
    watch = open_watch()
    assert watch is not None
    assert open_context() is True
    reading = watch.read(0)
    assert reading.sm_clock_mhz
    assert reading.temperature_c
    assert reading.power_w
    assert reading.slowdowns is not None
    assert watch.used_bytes()
    assert watch.busy_percent() is None or 0 <= (watch.busy_percent() or 0) <= 100


@pytest.mark.gpu
def test_context_of_this_process_is_not_another_on_the_gpu_here():
    watch = open_watch()
    assert watch is not None
    before = watch.others()
    assert open_context() is True
    assert watch.others() == before


@pytest.mark.gpu
def test_reading_the_gpu_here_takes_less_than_a_leg():
    watch = open_watch()
    assert watch is not None
    watch.read(0)
    taken = []
    for _ in range(50):
        begin = time.perf_counter()
        watch.read(0)
        taken.append(time.perf_counter() - begin)
    assert sorted(taken)[25] < 0.05, f"a reading takes {1000 * sorted(taken)[25]:.2f} ms"


@pytest.mark.gpu
def test_usage_of_the_gpu_here_has_power():
    watch = open_watch()
    usage = measured_usage(lambda index: time.sleep(0.001), 1.0, watch)
    assert usage.power_w
    assert usage.inferences > 100
