"""A backend without a compiler, for tests of code that uses the gate: it computes with a function that you give it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

import numpy as np

from gate import atomic
from gate.engines.feed import metas_from_spec, profile_of, require_feed
from gate.engines.interface import BuildRecord, Layer, Origin, Resources
from gate.errors import BuildError, RunError
from gate.spec import EngineSpec, GateSpec
from gate.tensors import Array, NamedArrays, TensorMeta
from gate.verdict import Evidence

Function = Callable[[dict[str, Array]], Mapping[str, Array]]


class FakeRunner:
    """A runner that calls a function.

    Args:
        function: Inputs by name to outputs by name.
        spec: What the inputs are; they are checked as a real runner checks them.
        outputs: What it says it gives; left out: found by a run on zeros of the smallest shape.
    """

    def __init__(self, function: Function, *, spec: GateSpec, outputs: Mapping[str, TensorMeta] | None = None) -> None:
        self._function = function
        self._spec = spec
        self._inputs = metas_from_spec(spec)
        self._outputs = outputs
        self.closed = False

    @property
    def inputs(self) -> Mapping[str, TensorMeta]:
        """The spec's inputs."""
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, TensorMeta]:
        """What it gives."""
        if self._outputs is None:
            zeros = {name: np.zeros(each.sized("min"), each.dtype) for name, each in self._spec.inputs.items()}
            self._outputs = {
                name: TensorMeta(name, array.dtype.name, tuple(None for _ in array.shape))
                for name, array in self.run(zeros).items()
            }
        return self._outputs

    def run(self, feed_dict: NamedArrays) -> dict[str, Array]:
        """The function's answer, copied.

        Raises:
            RunError: An input does not fit, or the runner is closed.
        """
        if self.closed:
            raise RunError("the runner is closed")
        feed = require_feed(feed_dict, self._inputs, spec=self._spec)
        return {name: np.array(array) for name, array in self._function(feed).items()}

    def timed(self, feed_dict: NamedArrays) -> Callable[[], None]:
        """A call of the function on inputs that are checked already.

        Raises:
            RunError: As `run`.
        """
        self.run(feed_dict)
        feed = require_feed(feed_dict, self._inputs, spec=self._spec)

        def once() -> None:
            self._function(feed)

        return once

    def close(self) -> None:
        """Refuse to run from now on."""
        self.closed = True

    def __enter__(self) -> FakeRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class FakeBackend:
    """A backend whose engines all compute one function; its engine's file holds the ONNX file's bytes.

    Args:
        function: Inputs by name to outputs by name.
        name: Shown as the backend's.
        evidence: What `runs_here` says; None: it can only compile.
        layers: What its build record lists; left out: one matrix multiplication in the precision asked for.
    """

    def __init__(
        self,
        function: Function,
        *,
        name: str = "fake",
        evidence: Evidence | None = Evidence.HOST,
        layers: tuple[Layer, ...] | None = None,
    ) -> None:
        self.name = name
        self._function = function
        self._evidence = evidence
        self._layers = layers

    def version(self) -> str:
        """A fixed version."""
        return "1.0"

    def runs_here(self, engine: EngineSpec) -> Evidence | None:  # noqa: ARG002 - the Protocol's
        """As it was made."""
        return self._evidence

    def origin(self, engine: EngineSpec) -> Origin:  # noqa: ARG002 - the Protocol's
        """The lowered graph."""
        return "lowered"

    def file_name(self, engine: EngineSpec) -> str:  # noqa: ARG002 - the Protocol's
        """`model.onnx`."""
        return "model.onnx"

    def unsealable(self, engine: EngineSpec) -> str | None:  # noqa: ARG002 - the Protocol's
        """None: it is sealed."""
        return None

    def require_supported(self, engine: EngineSpec) -> None:
        """It has no options."""

    def build(
        self,
        *,
        onnx: Path | None,
        out: Path,
        spec: GateSpec,
        engine: EngineSpec,
        resources: Resources | None = None,  # noqa: ARG002 - the Protocol's
    ) -> BuildRecord:
        """Copy the file."""
        if onnx is None:
            raise BuildError("the fake copies an ONNX file, and there is none")
        atomic.write_bytes(out, onnx.read_bytes())
        layers = self._layers if self._layers is not None else (Layer("fake", "MatMul", engine.precision),)
        return BuildRecord(
            backend=self.name,
            backend_version=self.version(),
            precision=engine.precision,
            options={},
            profile=profile_of(spec),
            layers=layers,
        )

    def describe(self, path: Path, *, spec: GateSpec, engine: EngineSpec) -> BuildRecord:  # noqa: ARG002
        """As it would have been built."""
        return BuildRecord(
            backend=self.name, backend_version=self.version(), precision=engine.precision, options={}, profile={}
        )

    def open(
        self,
        path: Path,
        *,
        spec: GateSpec,
        engine: EngineSpec,  # noqa: ARG002 - the Protocol's
        resources: Resources | None = None,  # noqa: ARG002 - the Protocol's
    ) -> FakeRunner:
        """A runner of the function.

        Raises:
            RunError: There is no such file.
        """
        if not path.is_file():
            raise RunError("there is no such file", where=str(path))
        return FakeRunner(self._function, spec=spec)
