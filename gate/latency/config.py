"""The tables `[engine.latency]`, `[engine.stages]` and `[engine.usage]`: what is timed, how, and what is allowed."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal

import msgspec

from gate.errors import SpecError

_Positive = Annotated[float, msgspec.Meta(gt=0)]
_NonNegative = Annotated[float, msgspec.Meta(ge=0)]
_PositiveInt = Annotated[int, msgspec.Meta(ge=1)]
_Sizes = _PositiveInt | Annotated[tuple[_PositiveInt, ...], msgspec.Meta(min_length=1)]
_PERCENT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*")

PERCENTILES = {"p50_ms": 0.5, "p90_ms": 0.9, "p95_ms": 0.95, "p99_ms": 0.99, "p99_9_ms": 0.999}
"""Budgets by percentile."""

NO_BUDGET = "[engine.latency] has no budget"
"""How the problem of a table without a limit begins."""

SESSIONS = 5
"""Processes whose inferences are pooled at the least. Source: docs/latency.md."""

Timed = Literal["host_wall", "gpu_compute", "latency"]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of these tables: frozen, and a key it does not know is an error."""


class RegressionSpec(_Table, frozen=True):
    """How much slower than another engine, timed in turn with it in the same processes.

    Args:
        against: `baseline`: the accepted baseline's engine, from its sealed bundle; `reference`: the PyTorch model;
            the name of another engine of the spec; or the path of a bundle, from the spec's folder.
        p50, p95: Most growth, as `"3 %"` or 3.0 percent.
    """

    against: Annotated[str, msgspec.Meta(min_length=1)] = "baseline"
    p50: str | _Positive | None = None
    p95: str | _Positive | None = None

    @property
    def limits(self) -> dict[str, float]:
        """Most growth in percent by percentile, `p50` and `p95`; 3 and 5 where the table names neither."""
        if self.p50 is None and self.p95 is None:
            return {"p50": 3.0, "p95": 5.0}
        given = {"p50": self.p50, "p95": self.p95}
        return {name: percent_from(value) for name, value in given.items() if value is not None}


class SpeedupSpec(_Table, frozen=True):
    """How many times faster than another engine at the median.

    Args:
        against: As in a regression; left out, the PyTorch model.
        at_least: Its p50 divided by this engine's.
    """

    at_least: _Positive
    against: Annotated[str, msgspec.Meta(min_length=1)] = "reference"


class LatencySpec(_Table, frozen=True):
    """What is timed, and its budgets, at each batch size and shape. Several tables: `[[engine.latency]]`.

    Args:
        batch: Batch size, or several.
        axes: Sizes of other dynamic axes by name, one or several each; left out: the samples' own. Every combination
            with every batch size is measured.
        timed: What the budgets are for. `host_wall`: one inference from its inputs in host memory to its outputs
            there, by the host's clock. `gpu_compute`: between CUDA events around the engine alone. `latency`: copy in,
            compute and copy out, between CUDA events. The last two are for engines on a GPU.
        transfers: Whether an inference copies its inputs to the GPU and its outputs back; left out: not where
            `gpu_compute` is timed.
        wait: How the host waits for the GPU: `spin` asks again and again, `block` sleeps.
        streams: Inferences at the same time, each with a context and stream of its own.
        sessions: Fresh processes, at the least.
        samples: Inferences of all sessions, at the least; left out: 200 of each session, and what the strictest
            budget needs.
        max_time_s: Measure no longer than this; what is not decided by then is INCONCLUSIVE.
        session_timeout_s: A session that takes longer is ended, and counts as an engine that hangs.
        warm_up_s: Untimed inferences before, for so long or 200 of them, whichever comes first.
        p50_ms, p90_ms, p95_ms, p99_ms, p99_9_ms: Budgets per inference.
        throughput_at_least: Samples per second.
        regression: How much slower than another engine it may be.
        speedup: How much faster than another engine it must be.
    """

    batch: _Sizes = 1
    axes: dict[str, _Sizes] = {}
    timed: Timed = "host_wall"
    transfers: bool | None = None
    wait: Literal["spin", "block"] = "spin"
    streams: _PositiveInt = 1
    sessions: Annotated[int, msgspec.Meta(ge=SESSIONS)] = SESSIONS
    samples: _PositiveInt | None = None
    max_time_s: _Positive = 120.0
    session_timeout_s: _Positive = 300.0
    warm_up_s: _NonNegative = 1.0
    p50_ms: _Positive | None = None
    p90_ms: _Positive | None = None
    p95_ms: _Positive | None = None
    p99_ms: _Positive | None = None
    p99_9_ms: _Positive | None = None
    throughput_at_least: _Positive | None = None
    regression: RegressionSpec | None = None
    speedup: SpeedupSpec | None = None

    @property
    def copies(self) -> bool:
        """Whether inputs are copied to the GPU and outputs back."""
        return self.timed != "gpu_compute" if self.transfers is None else self.transfers

    @property
    def budgets(self) -> dict[str, float]:
        """The absolute budgets by name, throughput among them."""
        names = (*PERCENTILES, "throughput_at_least")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def has_limit(self) -> bool:
        """Whether it asks for anything."""
        return bool(self.budgets) or self.regression is not None or self.speedup is not None

    @property
    def rivals(self) -> tuple[str, ...]:
        """What it is timed in turn with, each once."""
        asked = [each.against for each in (self.regression, self.speedup) if each is not None]
        return tuple(dict.fromkeys(asked))

    def checks_against(self, against: str, cell: Cell) -> tuple[str, ...]:
        """Names of the checks of one cell that rest on being timed in turn with another engine."""
        found = []
        if self.regression is not None and self.regression.against == against:
            found += [cell.check(f"latency.regression_{each}") for each in self.regression.limits]
        if self.speedup is not None and self.speedup.against == against:
            found.append(cell.check("latency.speedup"))
        return tuple(found)


class Cell(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One batch size and shape of a table.

    Args:
        batch: Batch size.
        axes: Sizes of other dynamic axes, by name.
        name: Such as `batch=8,height=320`; empty where the engine is timed at one alone.
    """

    batch: int
    axes: dict[str, int] = {}
    name: str = ""

    def check(self, check: str) -> str:
        """The name of a check of this cell: `latency.p99_ms[batch=8]`."""
        return f"{check}[{self.name}]" if self.name else check


class TimedTable(msgspec.Struct, frozen=True, kw_only=True):
    """A table with its cells, and where it stands in the spec.

    Args:
        spec: The table.
        cells: At least one.
        key: Of the table within its engine: `("latency",)` or `("latency", 1)`.
    """

    spec: LatencySpec
    cells: tuple[Cell, ...]
    key: tuple[str | int, ...]


def timed_tables(latency: LatencySpec | Sequence[LatencySpec] | None) -> tuple[TimedTable, ...]:
    """Every table with its cells; a cell has a name where there is more than one of them."""
    if latency is None:
        return ()
    tables = [latency] if isinstance(latency, LatencySpec) else list(latency)
    every = [_cells(table) for table in tables]
    if sum(map(len, every)) == 1:
        every = [[msgspec.structs.replace(every[0][0], name="")]]
    single = isinstance(latency, LatencySpec)
    return tuple(
        TimedTable(spec=table, cells=tuple(cells), key=("latency",) if single else ("latency", index))
        for index, (table, cells) in enumerate(zip(tables, every, strict=True))
    )


def latency_checks(latency: LatencySpec | Sequence[LatencySpec] | None) -> tuple[str, ...]:
    """Names of the checks that the tables ask for, in their order."""
    return tuple(latency_limits(latency))


def latency_limits(latency: LatencySpec | Sequence[LatencySpec] | None) -> dict[str, float]:
    """Limits by the checks that the tables ask for, in their order.

    Raises:
        SpecError: One is no share such as "3 %".
    """
    found: dict[str, float] = {}
    for table in timed_tables(latency):
        spec = table.spec
        for cell in table.cells:
            limits = {name.removesuffix("_at_least"): value for name, value in spec.budgets.items()}
            if spec.regression is not None:
                limits |= {f"regression_{name}": value for name, value in spec.regression.limits.items()}
            if spec.speedup is not None:
                limits["speedup"] = spec.speedup.at_least
            found |= {cell.check(f"latency.{name}"): value for name, value in limits.items()}
    return found


def latency_problems(
    latency: LatencySpec | Sequence[LatencySpec], *, batch_axis: str | int, axes: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What contradicts itself, each with its key within the engine.

    Args:
        latency: The tables.
        batch_axis: Name of the inputs' first axis, or its size where it is fixed.
        axes: Least and most of each dynamic axis.
    """
    names: list[str] = []
    if not isinstance(latency, LatencySpec) and not latency:
        yield ("latency",), "[[engine.latency]] has no table"
    for table in timed_tables(latency):
        spec, key = table.spec, table.key
        if not spec.has_limit:
            yield (
                key,
                f"{NO_BUDGET}; it takes {', '.join((*PERCENTILES, 'throughput_at_least'))}, regression, speedup",
            )
        names += [cell.name for cell in table.cells]
        yield from _size_problems(table, batch_axis=batch_axis, axes=axes)
        for name, value in spec.budgets.items():
            if not 0.0 < value < math.inf:
                yield (*key, name), f"[engine.latency] {name} is a finite number above 0, got {value:g}"
        if spec.speedup is not None and not 0.0 < spec.speedup.at_least < math.inf:
            yield (
                (*key, "speedup", "at_least"),
                f"[engine.latency] speedup at_least is a finite number above 0, got {spec.speedup.at_least:g}",
            )
        if spec.timed == "latency" and spec.transfers is False:
            yield (
                (*key, "transfers"),
                'timed = "latency" is copy in, compute and copy out: transfers = false contradicts it',
            )
        if spec.streams > 1 and spec.rivals:
            yield (*key, "streams"), "regression and speedup time two engines in turn: they need streams = 1"
        if spec.streams > 1 and spec.timed != "host_wall":
            yield (*key, "streams"), 'several streams share the GPU, so only timed = "host_wall" says what one took'
        if spec.regression is not None:
            try:
                limits = spec.regression.limits
            except SpecError as err:
                yield (*key, "regression"), err.message
            else:
                for name, value in limits.items():
                    if not 0.0 < value < math.inf:
                        yield (*key, "regression", name), f"regression {name} is above 0 %, got {value:g} %"
    for twice in sorted({name for name in names if names.count(name) > 1}):
        yield ("latency",), f"[[engine.latency]] measures {twice or 'the same'} twice"


def fixed_batch_problem(batch: int, fixed: int) -> str | None:
    """Why a batch size does not fit inputs whose first axis is fixed; None where it does."""
    if batch == fixed:
        return None
    return f"batch = {batch}, and the first axis of the inputs is fixed: batch = {fixed} is what can be timed"


def _size_problems(
    table: TimedTable, *, batch_axis: str | int, axes: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Sizes that the inputs do not take."""
    key = table.key
    for name in table.spec.axes:
        if name in ("batch", batch_axis):
            yield (*key, "axes", name), f"[engine.latency] axes has {name!r}, the first axis: its size is batch"
        elif name not in axes:
            yield (*key, "axes", name), f"[engine.latency] axes has {name!r}, which no input has as a dynamic axis"
    for cell in table.cells:
        sizes = {name: size for name, size in cell.axes.items() if name in axes and name != batch_axis}
        if isinstance(batch_axis, str):
            sizes[batch_axis] = cell.batch
        elif (problem := fixed_batch_problem(cell.batch, batch_axis)) is not None:
            yield (*key, "batch"), f"[engine.latency] {problem}"
        for axis, size in sizes.items():
            least, most = axes[axis]
            if not least <= size <= most:
                name = "batch" if axis == batch_axis else axis
                at = ("batch",) if axis == batch_axis else ("axes", axis)
                yield (*key, *at), f"[engine.latency] {name} = {size} is outside the profile ({least} to {most})"


def percent_from(value: str | float) -> float:
    """Percent from `"3 %"` or 3.0.

    Raises:
        SpecError: It is neither.
    """
    if isinstance(value, str):
        found = _PERCENT.fullmatch(value)
        if found is None:
            raise SpecError(f'a share is written "3 %" or 3.0, got {value!r}')
        return float(found.group(1))
    return float(value)


def percent_of(speedup: SpeedupSpec) -> float:
    """The tolerance that a speedup's limit leaves, in percent: how far 1 lies from it, and at least 1 %.

    Noise that is small beside it decides; the guards hold noise against it.
    """
    return max(1.0, 100.0 * abs(speedup.at_least - 1.0))


class StagesSpec(_Table, frozen=True):
    """The stages of the whole pipeline of one sample: decode, preprocess, transfer, inference, postprocess.

    Args:
        samples: How many samples are taken through it.
        p50_ms, p95_ms, p99_ms: Budgets by stage; `total` is all of them together.
    """

    samples: _PositiveInt = 100
    p50_ms: dict[str, _Positive] = {}
    p95_ms: dict[str, _Positive] = {}
    p99_ms: dict[str, _Positive] = {}


class UsageSpec(_Table, frozen=True):
    """What the engine may take while it runs without a pause.

    Args:
        batch: Batch size.
        seconds: How long it runs in each of the sessions.
        power_w: Mean power of the GPU, at most.
        energy_mj: Energy of the GPU per inference, at most, in millijoules.
        gpu_percent_at_least: Mean utilisation of the GPU.
        cpu_percent_at_most: CPU time over wall time; 100 is one core.
    """

    batch: _PositiveInt = 1
    seconds: _Positive = 1.0
    power_w: _Positive | None = None
    energy_mj: _Positive | None = None
    gpu_percent_at_least: _Positive | None = None
    cpu_percent_at_most: _Positive | None = None


def _cells(table: LatencySpec) -> list[Cell]:
    others = {name: _several(value) for name, value in table.axes.items() if name != "batch"}
    sizes = {"batch": _several(table.batch), **others}
    found = []
    for chosen in itertools.product(*sizes.values()):
        named = dict(zip(sizes, chosen, strict=True))
        name = ",".join(f"{axis}={size}" for axis, size in named.items())
        found.append(Cell(batch=named.pop("batch"), axes=named, name=name))
    return found


def _several(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else value
