"""What one session brings home: raw durations by region, and what the device did meanwhile."""

from __future__ import annotations

from typing import Literal

import msgspec

Region = Literal["host_wall", "latency", "h2d", "enqueue", "gpu_compute", "d2h"]
REGIONS: tuple[Region, ...] = ("host_wall", "latency", "h2d", "enqueue", "gpu_compute", "d2h")
"""`host_wall`: from inputs in host memory to outputs there, by the host's clock; on a device without copies, from the
first launch to the last result. `h2d`, `gpu_compute`, `d2h`: between CUDA events on one stream. `enqueue`: the host's
time to launch the engine. `latency`: h2d + gpu_compute + d2h of the same inference, as trtexec defines it."""

LEAST_NS: dict[Region, int] = {"host_wall": 1, "latency": 1, "h2d": 0, "enqueue": 0, "gpu_compute": 1, "d2h": 0}
"""The least that a region can take: where nothing is copied, the events around it may be one step of the clock."""


class Reading(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the GPU did right after a leg; None where the driver does not say.

    Args:
        subject: Whose leg it was: its index.
        sm_clock_mhz, temperature_c, power_w: At that moment.
        slowdowns: Reasons for a clock below the maximum, as in gate.device.GpuState.
        gpu_percent: Share of the last fraction of a second in which a kernel ran.
        others: Processes that came to the GPU since the session began, and are not the gate's.
    """

    subject: int
    sm_clock_mhz: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    slowdowns: tuple[str, ...] | None = None
    gpu_percent: int | None = None
    others: int | None = None


class SubjectTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The kept inferences of one engine in one session, in the order in which they were timed.

    Args:
        regions: Nanoseconds by region, all of the same length; a CPU engine has `host_wall` alone.
        leg: Kept inferences in each leg: inference i is of leg i // leg.
        warm_up: Untimed inferences before.
        span_ns: From the begin of the first kept inference to the end of the last one, of all streams together.
    """

    regions: dict[Region, tuple[int, ...]]
    leg: int
    warm_up: int
    span_ns: int


class CellTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One batch size and shape in one session.

    Args:
        subjects: In the order of the job.
        readings: One for each leg in which the GPU was looked at; empty without a GPU.
    """

    subjects: tuple[SubjectTimes, ...]
    readings: tuple[Reading, ...] = ()


class Usage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one engine took while it ran alone without a pause; None where the system does not say.

    Args:
        seconds: How long.
        inferences: How many.
        energy_mj: Of the GPU, by its own counter.
        power_w: Mean: energy / seconds, else the mean of readings.
        gpu_percent: Mean share of the time in which a kernel ran.
        cpu_percent: CPU time of the process / wall time; 100 is one core.
        others: The most processes of others on the GPU meanwhile that were not there before the session.
    """

    seconds: float
    inferences: int
    energy_mj: float | None = None
    power_w: float | None = None
    gpu_percent: float | None = None
    cpu_percent: float | None = None
    others: int | None = None


class MemoryUse(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Memory above what the process held before its first engine was loaded; None where the system does not say.

    Args:
        device_steady_mib: On the device when all engines of the session were loaded and had run once.
        device_peak_mib: The most on the device.
        host_steady_mib, host_peak_mib: Resident in the process.
    """

    device_steady_mib: float | None = None
    device_peak_mib: float | None = None
    host_steady_mib: float | None = None
    host_peak_mib: float | None = None


class SessionTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One fresh process.

    Args:
        cells: In the order of the job.
        clock: Name of the host's clock.
        resolution_ns: The least step of it.
        usage: Of each engine; empty where it was not asked for.
        memory: All engines of the session together.
        seconds: Wall time from its start to its end.
        busy_percent: GPU utilisation before the session's own first inference; None without a GPU.
    """

    cells: tuple[CellTimes, ...]
    clock: str
    resolution_ns: int
    memory: MemoryUse
    usage: tuple[Usage, ...] = ()
    seconds: float = 0.0
    busy_percent: int | None = None


class StageSummary(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One stage of the whole pipeline of one sample, or `total`.

    Args:
        stage: `decode`, `preprocess`, `transfer`, `inference`, `postprocess` or `total`.
        n: Samples.
        mean_ms, sd_ms, p50_ms, p95_ms, p99_ms: Per sample; percentiles are nearest-rank.
        share: Of the summed total, 0 to 1.
    """

    stage: str
    n: int
    mean_ms: float
    sd_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    share: float
