"""What a backend and a runner are: everything the pipeline knows of TensorRT, ONNX Runtime and the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, runtime_checkable

import msgspec

from gate.spec import EngineSpec, GateSpec
from gate.tensors import Array, NamedArrays, TensorMeta
from gate.verdict import Evidence


class Layer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer of an engine (or node of a lowered graph): its name, type and the precision it runs in.

    Args:
        tactic: The kernel that the compiler chose, where the engine inspector says.
        format: The memory format of its first output, likewise.
    """

    name: str
    type: str
    precision: str
    tactic: str = ""
    format: str = ""


class TensorRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What calibration saw of an activation, and the range that its scale covers.

    Args:
        name: Of the tensor in the FP32 graph.
        low, high: What the lowest and the highest step of the quantised type stand for.
        clipped_fraction: Calibration values outside of it; None where they were not counted.
        max_abs: The largest absolute value that calibration saw; None where it was not recorded.
        p999_abs: 99.9 % of the absolute values are at most this, within the bins of a histogram; None likewise.
        state: `dead`: zeros only. `constant`: one value only. `outliers`: max_abs is far above p999_abs, so that a few
            values take most of the steps.
    """

    name: str
    low: float
    high: float
    clipped_fraction: float | None = None
    max_abs: float | None = None
    p999_abs: float | None = None
    state: Literal["ok", "dead", "constant", "outliers"] = "ok"


class CalibrationRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a quantised engine was calibrated on, and what came out.

    Args:
        tool: What calibrated, with its version.
        method: `minmax`, `entropy`, `percentile` or `max`.
        percentile: Of the absolute values, that a range covers; None for the other methods.
        samples: How many.
        sha256: Of the samples: names, dtypes, shapes and bytes, however they were batched.
        ranges: Of the quantised activations, in graph order; empty where the tool does not say.
        notes: Warnings: too few samples, dead, constant and clipped tensors, ranges that outliers take.
    """

    tool: str = ""
    method: str
    samples: int
    sha256: str
    ranges: tuple[TensorRange, ...] = ()
    notes: tuple[str, ...] = ()
    percentile: float | None = None

    @property
    def method_text(self) -> str:
        """The method with its parameter: `percentile 99.999`."""
        return self.method if self.percentile is None else f"{self.method} {self.percentile:g}"


class LoweringRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a graph was lowered.

    Args:
        precision: As asked for.
        tool, tool_version: What did it; `copy` where there was nothing to do, or the graph carried Q/DQ already.
        opset: Of the result. bf16 needs 22, so a lower one is raised to that.
        layers: Its nodes with their precision.
        calibration: Of int8 and fp8; None for the others.
        notes: What a reader should know.
    """

    precision: str
    tool: str
    tool_version: str
    opset: int
    layers: tuple[Layer, ...]
    calibration: CalibrationRecord | None = None
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Number of nodes by precision, most frequent first."""
        return dict(Counter(layer.precision for layer in self.layers).most_common())


class BuildRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How an engine was made: enough to make it again, and to say what it is without opening it.

    Args:
        backend: As in the spec.
        backend_version: Of the compiler or runtime, such as `1.31.1`.
        precision: As asked for in the spec.
        options: The backend's options, defaults resolved.
        profile: Per input `{"min": [...], "opt": [...], "max": [...]}`.
        layers: Layers with their precision, in execution or network order; empty where not listed.
        layers_source: Where the list comes from: `network` (typed, before tactics), `inspector`, `graph`, or of PyTorch
            `dispatch` (the operators of one run), `export` or `package`.
        log: The compiler's warnings and errors.
        command: An equivalent command line for the vendor's own tool, where there is one.
        run_command: That which times the engine, likewise.
        seconds: Wall time of the build; None where nothing was built.
        digests: sha256 of the other files that it was made with, by name: plugin libraries, a calibration cache.
        calibration: Of a calibrator in weak typing; explicit Q/DQ has it in its lowering record.
    """

    backend: str
    backend_version: str
    precision: str
    options: dict[str, Any]
    profile: dict[str, dict[str, list[int]]]
    layers: tuple[Layer, ...] = ()
    layers_source: str = "graph"
    log: tuple[str, ...] = ()
    command: str | None = None
    run_command: str | None = None
    seconds: float | None = None
    digests: dict[str, str] = {}
    calibration: CalibrationRecord | None = None


class Runner(Protocol):
    """A loaded engine (or the reference): arrays in, arrays out, by name. Close it when done."""

    @property
    def inputs(self) -> Mapping[str, TensorMeta]:
        """What it takes."""
        ...

    @property
    def outputs(self) -> Mapping[str, TensorMeta]:
        """What it gives."""
        ...

    def run(self, feed_dict: NamedArrays) -> dict[str, Array]:
        """One inference. The arrays returned belong to the caller.

        Raises:
            RunError: An input is missing, unexpected, of another dtype or outside the profile, or the engine failed.
        """
        ...

    def timed(self, feed_dict: NamedArrays) -> Callable[[], None]:
        """A call that runs one inference on inputs that are bound already: what the clock goes around."""
        ...

    def close(self) -> None:
        """Free what it holds. Calling it twice is harmless."""
        ...

    def __enter__(self) -> Runner: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


Wait = Literal["spin", "block"]


@dataclass(frozen=True)
class RegionTimes:
    """What one inference took on the device and on the way there, nanoseconds; None for what did not happen.

    Args:
        gpu_compute: Between two CUDA events around the engine.
        enqueue: The host's time to launch it.
        h2d, d2h: Between CUDA events around the copies; None without them.
    """

    gpu_compute: int
    enqueue: int
    h2d: int | None = None
    d2h: int | None = None


Unread = Callable[[], RegionTimes]
"""Asks the events of an inference that is done. Call it outside the clock, before the runner's next inference: its events
are those of the next one."""


@runtime_checkable
class RegionTimed(Protocol):
    """A runner on a GPU that can tell the regions of an inference apart."""

    def region_timed(self, feeds: Sequence[NamedArrays], *, transfers: bool, wait: Wait) -> Callable[[int], Unread]:
        """A call that runs one inference on one of several batches, all of the same shape, and says what it took.

        Args:
            feeds: Batches that are bound once and take turns, so that no cache holds the input.
            transfers: Copy the inputs in from page-locked memory and the outputs back, on the engine's stream; without,
                the batches lie on the device already and the outputs stay there.
            wait: How the host waits for the end: `spin` or `block`.

        Returns:
            A function of the batch's index. It returns when the last event of the inference is reached, with what reads
            the events. A clock around it has the inference, recording two events (four with transfers) and one wait:
            some microseconds of the host, the same for every engine of a backend.

        Raises:
            RunError: As `Runner.run`; or the batches differ in shape.
        """
        ...


@runtime_checkable
class OutputsOnDevice(Protocol):
    """A runner on a GPU that can leave its outputs there."""

    def run_to_device(self, feed_dict: NamedArrays) -> dict[str, Any]:
        """One inference from host arrays, as `Runner.run`; what it gives stays on the device, and is done.

        Returns:
            By name CUDA tensors of PyTorch, objects with `__cuda_array_interface__`, or host arrays of outputs that the
            engine makes there. They hold until the runner's next inference, or until it is closed.

        Raises:
            RunError: As `Runner.run`.
        """
        ...


@runtime_checkable
class Renewable(Protocol):
    """A runner that can make another of the same loaded engine, with an execution context of its own."""

    def fresh(self) -> Runner:
        """Another runner; it keeps nothing that earlier runs left behind, and is closed on its own.

        Raises:
            RunError: It cannot be made.
        """
        ...


class Progress(Protocol):
    """Told what a build is doing."""

    def __call__(self, name: str, done: float | None, /) -> None:
        """A phase, and the share of it that is done, 0 to 1; None where that is not known."""
        ...


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a build may use beside the graph; None where there is none. Each is called only when it is needed.

    Args:
        model: Gives the `torch.nn.Module` in eval mode, on the CPU.
        feeds: Gives sample inputs of several batch sizes, for tools that trace.
        calibration: Gives the calibration samples in batches, by input name.
        calibration_sha256: Digest of these samples.
        onnx_sha256: Digest of the graph that is built, its external data included.
        progress: Told what happens.
    """

    model: Callable[[], Any] | None = None
    feeds: Callable[[], tuple[dict[str, Array], ...]] | None = None
    calibration: Callable[[], Iterable[NamedArrays]] | None = None
    calibration_sha256: str | None = None
    onnx_sha256: str | None = None
    progress: Progress | None = None


CALIBRATION_NAME = "calibration.cache"
"""What the ranges that a compiler calibrated are called, beside the engine's file."""

Origin = Literal["lowered", "exported", "model"]
"""What a backend builds an engine from: the graph in its precision, the FP32 graph, or the PyTorch model."""


class Backend(Protocol):
    """One way to make and run engines. Paths in an engine's options are absolute here (`gate.spec.located`)."""

    name: str

    def version(self) -> str:
        """The installed version of the compiler or runtime, found without importing it where possible.

        Raises:
            BackendUnavailable: It is not installed; the hint is the command that installs it.
        """
        ...

    def runs_here(self, engine: EngineSpec) -> Evidence | None:
        """The evidence that a run here gives (`host`, `device`), or None where it can only compile."""
        ...

    def origin(self, engine: EngineSpec) -> Origin:
        """What the engine is built from."""
        ...

    def file_name(self, engine: EngineSpec) -> str:
        """What the engine's file is called in a cache entry or bundle: `model.onnx`, `model.plan`."""
        ...

    def unsealable(self, engine: EngineSpec) -> str | None:
        """Why such an engine is not sealed, whatever its verdict; None where it is."""
        ...

    def require_supported(self, engine: EngineSpec) -> None:
        """Hold the engine's options against the installed version, before anything is made.

        Raises:
            SpecError: The version does not have one of them; says what to use instead.
        """
        ...

    def build(
        self, *, onnx: Path | None, out: Path, spec: GateSpec, engine: EngineSpec, resources: Resources | None = None
    ) -> BuildRecord:
        """Make the engine and write it to `out`.

        Args:
            onnx: The graph that `origin` asks for; None where it asks for the model.
            out: The file to write.
            spec: Its inputs and their ranges.
            engine: What is asked for.
            resources: What it may use beside the graph.

        Raises:
            BuildError: The compiler refused the graph; carries its log and the node.
        """
        ...

    def describe(self, path: Path, *, spec: GateSpec, engine: EngineSpec) -> BuildRecord:
        """What is known of an engine's file that the team brings itself, without running it.

        Raises:
            RunError: It cannot be read.
            IncompatibleEngine: It is of another version, GPU or platform.
        """
        ...

    def open(self, path: Path, *, spec: GateSpec, engine: EngineSpec, resources: Resources | None = None) -> Runner:
        """Load an engine's file.

        Args:
            path: The file.
            spec: Its inputs and their ranges.
            engine: What was asked for.
            resources: The model, for engines that are not whole in their file: PyTorch eager and compiled.

        Raises:
            RunError: It cannot be loaded.
            IncompatibleEngine: It was built for another version, GPU or platform.
        """
        ...
