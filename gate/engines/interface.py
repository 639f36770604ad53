"""What a backend and a runner are: everything the pipeline knows of TensorRT, ONNX Runtime and the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import msgspec

from gate.spec import EngineSpec, GateSpec
from gate.tensors import Array, NamedArrays, TensorMeta
from gate.verdict import Evidence


class Layer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer of an engine (or node of a lowered graph): its name, type and the precision it runs in."""

    name: str
    type: str
    precision: str


class BuildRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How an engine was made: enough to make it again, and to say what it is without opening it.

    Args:
        backend: As in the spec.
        backend_version: Of the compiler or runtime, such as `1.31.1`.
        precision: As asked for in the spec.
        options: The backend's options, defaults resolved.
        profile: Per input `{"min": [...], "opt": [...], "max": [...]}`.
        layers: Layers with their precision, in execution or network order; empty where not listed.
        layers_source: Where the list comes from: `network` (typed, before tactics), `inspector` or `graph`.
        log: The compiler's warnings and errors.
        command: An equivalent command line for the vendor's own tool, where there is one.
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


class Backend(Protocol):
    """One way to make and run engines."""

    name: str

    def version(self) -> str:
        """The installed version of the compiler or runtime, found without importing it where possible.

        Raises:
            BackendUnavailable: It is not installed; the hint is the command that installs it.
        """
        ...

    def runs_here(self) -> Evidence | None:
        """The evidence that a run here gives (`host`, `device`), or None where it can only compile."""
        ...

    def file_name(self) -> str:
        """What the engine's file is called in a cache entry or bundle: `model.onnx`, `model.plan`."""
        ...

    def build(self, *, onnx: Path, out: Path, spec: GateSpec, engine: EngineSpec) -> BuildRecord:
        """Make the engine from an ONNX file that is already in its precision, and write it to `out`.

        Raises:
            BuildError: The compiler refused the graph; carries its log and the node.
        """
        ...

    def open(self, path: Path, *, spec: GateSpec, engine: EngineSpec) -> Runner:
        """Load an engine's file.

        Raises:
            RunError: It cannot be loaded.
            IncompatibleEngine: It was built for another version, GPU or platform.
        """
        ...
