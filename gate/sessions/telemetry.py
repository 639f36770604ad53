"""What the GPU and the process do while a session runs, read between timed regions and never inside one."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any

from gate.device import Nvml, open_nvml, slowdown_names
from gate.errors import MeasurementError
from gate.latency.guards import BUSY_PERCENT
from gate.latency.measurement import MemoryUse, Reading, Usage
from gate.memory import DevicePeak, peak_resident_mib, reset_host_peak, resident_mib

LOOK_S = 0.05
"""Seconds between two looks at power and utilisation while an engine runs without a pause."""

SETTLE_S = 1.5
"""How long the work of a process that has ended may be seen in the utilisation, with some room. Source: nvml.h,
nvmlUtilization_t: the sample period is between 1/6 second and 1 second."""

_SETTLE_STEP_S = 0.1
_PEAK_STEP_S = 0.01


class GpuWatch:
    """Reads the first visible GPU by NVML, which stays open. Made by `open_watch`.

    Args:
        nvml: NVML, open.
        own: Process numbers of the gate: this process and the one that waits for it.
    """

    def __init__(self, nvml: Nvml, *, own: tuple[int, ...]) -> None:
        self._nvml = nvml
        self._own = frozenset(own)
        self._before = self._processes() or frozenset()

    def read(self, subject: int) -> Reading:
        """What the GPU does at this moment, the clock first since it changes soonest.

        Args:
            subject: Index of the engine whose leg it was.
        """
        nvml, whole = self._nvml, self._nvml.whole
        clock = nvml.ask("nvmlDeviceGetClockInfo", whole, nvml.bindings.NVML_CLOCK_SM)
        reasons = nvml.ask("nvmlDeviceGetCurrentClocksThrottleReasons", whole)
        power = self.power_w()
        temperature = nvml.ask("nvmlDeviceGetTemperature", whole, nvml.bindings.NVML_TEMPERATURE_GPU)
        return Reading(
            subject=subject,
            sm_clock_mhz=_whole_number(clock),
            temperature_c=_whole_number(temperature),
            power_w=power,
            slowdowns=None if reasons is None else slowdown_names(reasons),
            gpu_percent=self._utilisation(),
            others=self.others(),
        )

    def power_w(self) -> float | None:
        """Power of the whole board, watts."""
        milliwatts = self._nvml.ask("nvmlDeviceGetPowerUsage", self._nvml.whole)
        return None if milliwatts is None else milliwatts / 1000.0

    def energy_mj(self) -> float | None:
        """Energy that the GPU has taken since its driver was loaded, millijoules. The driver counts in steps."""
        millijoules = self._nvml.ask("nvmlDeviceGetTotalEnergyConsumption", self._nvml.whole)
        return None if millijoules is None else float(millijoules)

    def busy_percent(self, *, settle_s: float = 0.0, sleep: Callable[[float], None] = time.sleep) -> int | None:
        """Share of the last fraction of a second in which a kernel ran.

        Args:
            settle_s: Where the GPU is busy look again until it is not, for so long: work of a process that has ended is
                seen for up to a second.
            sleep: Waits for so many seconds.
        """
        found = self._utilisation()
        for _ in range(math.ceil(settle_s / _SETTLE_STEP_S)):
            if found is None or found <= BUSY_PERCENT:
                break
            sleep(_SETTLE_STEP_S)
            found = self._utilisation()
        return found

    def used_bytes(self) -> int | None:
        """Memory in use on the GPU, or on the MIG instance that is visible, by all processes."""
        memory = self._nvml.ask("nvmlDeviceGetMemoryInfo", self._nvml.part)
        return None if memory is None else int(memory.used)

    def others(self) -> int | None:
        """How many processes came to compute on the GPU (or MIG instance) since the watch was opened, beside the gate's.

        Who was there before and is idle takes nothing; who was there and works is seen by `busy_percent`. In a container
        the driver may give numbers of the host, among which this process does not find itself: one newcomer is then
        taken for it.
        """
        now = self._processes()
        if now is None:
            return None
        newcomers = now - self._own - self._before
        return len(newcomers) - bool(newcomers and os.getpid() not in now)

    def _utilisation(self) -> int | None:
        found = self._nvml.ask("nvmlDeviceGetUtilizationRates", self._nvml.whole)
        return None if found is None else int(found.gpu)

    def _processes(self) -> frozenset[int] | None:
        found = self._nvml.ask("nvmlDeviceGetComputeRunningProcesses", self._nvml.part)
        return None if found is None else frozenset(int(each.pid) for each in found)


def open_watch(bindings: Any = None) -> GpuWatch | None:
    """Watch the first visible GPU; None where there is none, or NVML's bindings are not installed.

    Open it before this process opens a CUDA context of its own: who is on the GPU by then is somebody else.

    Args:
        bindings: Used in the place of `pynvml`.
    """
    opened = open_nvml(bindings)
    return None if opened is None else GpuWatch(opened, own=(os.getpid(), os.getppid()))


def measured_usage(
    call: Callable[[int], object],
    seconds: float,
    watch: GpuWatch | None,
    *,
    clock: Callable[[], float] = time.perf_counter,
    cpu_clock: Callable[[], float] = time.process_time,
) -> Usage:
    """Run a call without a pause, and say what it takes.

    Utilisation and power are read between calls in the second half of the time, since the driver's numbers look back by
    up to a second.

    Args:
        call: One inference, done when it returns; called with 0, 1, 2 and so on.
        seconds: For how long; one call is made at least.
        watch: Of the GPU; None without one.
        clock: Wall time, seconds.
        cpu_clock: CPU time of all threads of the process, seconds.

    Raises:
        MeasurementError: The time is not above 0, or the clock stood still.
    """
    if not 0.0 < seconds < math.inf:
        raise MeasurementError(f"usage is measured over a time above 0 s, got {seconds:g} s")
    powers: list[float | None] = []
    shares: list[float | None] = []
    others: list[int | None] = []
    inferences = 0
    energy_before = None if watch is None else watch.energy_mj()
    cpu_begin, begin = cpu_clock(), clock()
    end, next_look = begin + seconds, begin + seconds / 2.0
    now = begin
    while now < end:
        call(inferences)
        inferences += 1
        now = clock()
        if watch is not None and now >= next_look:
            powers.append(watch.power_w())
            shares.append(watch.busy_percent())
            others.append(watch.others())
            next_look = now + LOOK_S
    energy_after = None if watch is None else watch.energy_mj()
    cpu_s, wall_s = cpu_clock() - cpu_begin, clock() - begin
    if not wall_s > 0.0:
        raise MeasurementError(f"{inferences} inferences took {wall_s:g} s by the clock, so there is no usage")
    energy = None
    # A counter that stood still or began anew says nothing; 0 mJ would keep every limit.
    if energy_before is not None and energy_after is not None and energy_after > energy_before:
        energy = energy_after - energy_before
    return Usage(
        others=max((each for each in others if each is not None), default=None),
        seconds=wall_s,
        inferences=inferences,
        energy_mj=energy,
        power_w=_mean(powers) if energy is None else energy / 1000.0 / wall_s,
        gpu_percent=_mean(shares),
        cpu_percent=100.0 * cpu_s / wall_s,
    )


class MemoryMarks:
    """Takes the marks from which the memory of a session follows: made before the first engine is loaded.

    Open the CUDA context of the process before (gate.device.open_context), so that it is no engine's.

    Args:
        watch: Of the GPU; None without one.
    """

    def __init__(self, watch: GpuWatch | None) -> None:
        self._used: Callable[[], int | None] = (lambda: None) if watch is None else watch.used_bytes
        self._has_peak = reset_host_peak()
        self._host_before = resident_mib()
        self._host_steady: float | None = None
        self._device_before = self._used()
        self._device_steady: float | None = None
        self._device_peak = DevicePeak(self._used, _PEAK_STEP_S)

    def steady(self) -> None:
        """All engines are loaded and have run once. From here the device is watched no more: it disturbs the timing."""
        self._device_peak.stop()
        self._device_peak.look()
        self._host_steady = _above(resident_mib(), self._host_before)
        used = self._used()
        if used is not None and self._device_before is not None:
            self._device_steady = max(0, used - self._device_before) / 2**20

    def use(self) -> MemoryUse:
        """What all engines together took, at the end and while they are still loaded. Steady is None without its mark."""
        self._device_peak.stop()
        self._device_peak.look()
        peak = _above(peak_resident_mib(), self._host_before) if self._has_peak else None
        return MemoryUse(
            device_steady_mib=self._device_steady,
            device_peak_mib=_at_least(self._device_peak.mib, self._device_steady),
            host_steady_mib=self._host_steady,
            host_peak_mib=_at_least(peak, self._host_steady),
        )


def _whole_number(value: Any) -> int | None:
    return None if value is None else int(value)


def _mean(values: list[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _above(now: float | None, before: float | None) -> float | None:
    return None if now is None or before is None else max(0.0, now - before)


def _at_least(peak: float | None, steady: float | None) -> float | None:
    """The system counts both a little apart in time; a peak is never below what was seen."""
    return peak if peak is None or steady is None else max(peak, steady)
