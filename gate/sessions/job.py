"""What a session is asked for: written by the gate, read by the fresh process."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from gate.errors import MeasurementError
from gate.latency.config import Cell
from gate.spec import EngineSpec

JOB = "job.json"
TIMES = "times.json"
FAILED = "failed.json"
PHASE = "phase.txt"
STDOUT = "stdout.txt"
STDERR = "stderr.txt"


class Subject(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An engine that is timed.

    Args:
        name: What to call it in errors.
        spec: Path of the spec that its inputs and its model are of.
        engine: As the spec has it, its paths absolute; None: the PyTorch reference of the spec, as it is deployed in
            eager mode.
        file: Of the engine; None for the reference.
        sha256: Of that file: another is refused.
    """

    name: str
    spec: Path
    engine: EngineSpec | None = None
    file: Path | None = None
    sha256: str | None = None


class CellJob(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One batch size and shape.

    Args:
        cell: Which.
        feeds: Safetensors file with the batches in turn: tensor `<index>/<input>`.
        kept: Inferences of each engine that are kept; fewer where the job's `max_s` is over before.
        subjects: Which engines take turns here, by their index in the job: one or two.
        least_s: With one stream more are kept until they took so long, of all engines together.
        most: But no more than these.
    """

    cell: Cell
    feeds: Path
    kept: int
    subjects: tuple[int, ...]
    least_s: float = 0.0
    most: int = 0


class Job(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One session.

    Args:
        subjects: All are loaded before the first is timed.
        cells: May be empty where only memory or usage is asked for.
        leg: Kept inferences of a leg; `discard` untimed ones go before each.
        order: Which engine begins: 0, then A B B A; 1, then B A A B.
        warm_up_s, warm_up_calls: Whichever comes first.
        transfers, wait, streams, timed: As in `[engine.latency]`.
        usage_s: How long each engine runs without a pause to see what it takes; 0: not at all.
        usage_feeds: For that, as `CellJob.feeds`.
        on_gpu: Whether to look at the GPU.
        max_s: The session aims to be done with its cells so many seconds after it began to load the engines, each cell
            with an equal share of what is left: it begins no legs that would end later, once each engine has two.
            None: all inferences are kept.
    """

    subjects: tuple[Subject, ...]
    cells: tuple[CellJob, ...] = ()
    leg: int = 8
    discard: int = 2
    order: Literal[0, 1] = 0
    warm_up_s: float = 1.0
    warm_up_calls: int = 200
    transfers: bool = True
    wait: Literal["spin", "block"] = "spin"
    streams: int = 1
    usage_s: float = 0.0
    usage_feeds: Path | None = None
    on_gpu: bool = False
    max_s: float | None = None


class Failure(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Why a session has no times.

    Args:
        error: Name of the class in gate.errors.
        message, where, hint: As in GateError.
    """

    error: str
    message: str
    where: str | None = None
    hint: str | None = None


def bytes_from_job(job: Job) -> bytes:
    """The job as JSON."""
    return msgspec.json.encode(job, enc_hook=str)


def job_from_bytes(data: bytes) -> Job:
    """The job from JSON.

    Raises:
        MeasurementError: It is not a job.
    """
    try:
        return msgspec.json.decode(data, type=Job, dec_hook=_path)
    except msgspec.MsgspecError as err:
        raise MeasurementError(f"is no session's job: {err}", where=JOB) from err


def _path(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(kind)
