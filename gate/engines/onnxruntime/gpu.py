"""A loaded graph on a GPU: the provider that was asked for runs it, or nothing does."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gate.device import fingerprint
from gate.engines.onnxruntime.placement import (
    CPU_NODES_AT_MOST,
    placed_nodes,
    require_placement,
    shape_nodes,
)
from gate.engines.onnxruntime.providers import (
    NAMES,
    TF32_OVERRIDE,
    cache_key,
    kept_folder,
    resolved_options,
)
from gate.engines.onnxruntime.runner import OnnxRuntimeRunner, read_model
from gate.engines.onnxruntime.session import open_session, provider_list
from gate.engines.tensorrt.device_array import DeviceArray
from gate.engines.tensorrt.memory import Memory, memory
from gate.errors import BackendUnavailable, BuildError, RunError
from gate.spec import EngineOptions, GateSpec
from gate.tensors import Array, NamedArrays

_RETURN_EARLY = "disable_synchronize_execution_providers"
"""Entry of a run's configuration: the call returns when the work is queued, without waiting for the device.

Source: onnxruntime_run_options_config_keys.h, kOrtRunOptionsConfigDisableSynchronizeExecutionProviders.
"""

_CHUNK_BYTES = 1 << 20


class OnnxRuntimeGpuRunner(OnnxRuntimeRunner):
    """A loaded graph on the first visible GPU, on a stream of its own.

    TensorRT compiles when the session opens. What it compiled is kept for the process, in a temporary folder, so that
    every runner of a file has the same engine; `trt_engine_cache_path` keeps it for longer.

    Args:
        path: The ONNX file.
        spec: Its inputs and their ranges.
        precision: As asked for in the spec: it decides on TF32.
        cast_io: Feed a float input in the graph's own floating dtype.
        options: Of the engine; their provider is on a GPU.
        keep: Keep the compiled engine for other runners of this process.
        device_memory: What gives the stream and the events; left out: cuda-python or PyTorch, where installed.

    `told` is what the provider was told, without folders; `counts` the number of nodes by provider.

    Raises:
        RunError: The provider does not run the graph, it cannot be loaded, or its inputs are not the spec's.
        BackendUnavailable: The provider cannot be loaded here.
    """

    _device = "cuda"

    def __init__(
        self,
        path: Path,
        *,
        spec: GateSpec,
        precision: str,
        cast_io: bool = False,
        options: EngineOptions,
        keep: bool = True,
        device_memory: Memory | None = None,
    ) -> None:
        self._precision = precision
        self._keep = keep
        self._scratch: Path | None = None
        self._memory = device_memory if device_memory is not None else _installed_memory()
        self._stream: int | None = self._memory.stream() if self._memory is not None else None
        self._events: tuple[int, int] | None = None
        self._left: object = None
        self.told: dict[str, str] = {}
        self.counts: dict[str, int] = {}
        self._spec = spec
        try:
            super().__init__(path, spec=spec, cast_io=cast_io, options=options)
        except BaseException:
            self.close()
            raise

    def timed(self, feed_dict: NamedArrays) -> Callable[[], None]:
        """One inference from inputs in host memory to outputs there: both copies are in it, and it waits for the device.

        Raises:
            RunError: As `run`.
        """
        import onnxruntime

        session = self._open_session()
        values = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(array)
            for name, array in self._required_feed(feed_dict).items()
        }
        binding = session.io_binding()
        for name in self._outputs:
            binding.bind_output(name, "cpu")

        def once() -> None:
            try:
                # Binding is what copies an input to the device, so it belongs into the call.
                for name, value in values.items():
                    binding.bind_ortvalue_input(name, value)
                binding.synchronize_inputs()
                self._open_session().run_with_iobinding(binding)
                binding.synchronize_outputs()
            except RunError:
                raise
            except Exception as err:
                raise self._failed(err) from err

        once()
        return once

    def gpu_timed(self, feed_dict: NamedArrays) -> Callable[[], int]:
        """One inference on inputs that lie on the device, to outputs that stay there, between two CUDA events.

        The events are on the stream that the provider runs on. What it computes on the host between two kernels, and
        waits for, is in the time.

        Returns:
            A function that runs one inference and returns its nanoseconds on the device.

        Raises:
            RunError: As `run`.
            BackendUnavailable: No library for CUDA events is installed.
        """
        import onnxruntime

        session = self._open_session()
        clock, stream = self._memory, self._stream
        if clock is None or stream is None:
            raise BackendUnavailable(
                "timing on the device needs CUDA events, and neither cuda-python nor PyTorch with CUDA is installed",
                hint='pip install "trt-gate[gpu]"',
            )
        binding = session.io_binding()
        for name, array in self._required_feed(feed_dict).items():
            binding.bind_ortvalue_input(name, self._on_device(array))
        for name in self._outputs:
            binding.bind_output(name, self._device, 0)
        binding.synchronize_inputs()
        settings = onnxruntime.RunOptions()
        settings.add_run_config_entry(_RETURN_EARLY, "1")
        if self._events is None:
            self._events = (clock.event(), clock.event())
        start, end = self._events

        def once() -> int:
            session = self._open_session()
            clock.record(start, stream)
            try:
                session.run_with_iobinding(binding, settings)
            except Exception as err:
                raise self._failed(err) from err
            clock.record(end, stream)
            return clock.elapsed_ns(start, end)

        once()
        return once

    def run_to_device(self, feed_dict: NamedArrays) -> dict[str, Any]:
        """One inference; what the graph's outputs are on the device stays there, and holds until the next such call.

        Source: IOBinding and OrtValue of ONNX Runtime 1.31: an output that is bound to a device alone is allocated
        there when it is made, and `get_outputs` gives it; it is the session's memory, held by the binding.

        Returns:
            Objects with `__cuda_array_interface__`; arrays where an output did not come to lie on the device.

        Raises:
            RunError: As `run`.
        """
        session = self._open_session()
        self._left = None  # its memory is there for this inference
        feed = {name: self._on_device(array) for name, array in self._required_feed(feed_dict).items()}
        # A binding of its own: one that ran holds its outputs, which ONNX Runtime would write the next ones to.
        binding = session.io_binding()
        try:
            for name, value in feed.items():
                binding.bind_ortvalue_input(name, value)
            for name in self._outputs:
                binding.bind_output(name, self._device, 0)
            binding.synchronize_inputs()
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            values = binding.get_outputs()
        except Exception as err:
            raise self._failed(err) from err
        left = self._left = (binding, values)
        return {
            meta.name: _left_by(value, meta.dtype, is_current=lambda: self._left is left)
            for meta, value in zip(self._outputs.values(), values, strict=True)
        }

    def __enter__(self) -> OnnxRuntimeGpuRunner:
        return self

    def close(self) -> None:
        """Free the outputs that lie on the device and the session, then the stream that it ran on."""
        self._left = None
        super().close()
        clock, self._memory = self._memory, None
        if clock is not None:
            for event in self._events or ():
                clock.drop_event(event)
            if self._stream is not None:
                clock.close(self._stream)
        self._events = self._stream = None
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None

    def _on_device(self, array: Array) -> Any:
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_numpy(array, self._device, 0)

    def _load(self, path: Path, options: EngineOptions) -> Any:
        asked = NAMES[options.provider or "cpu"]
        self.told = resolved_options(options, precision=self._precision, spec=self._spec)
        given = {**self.told, **self._cache_options(path, options)}
        session = open_session(path, options, providers=provider_list(asked, given, stream=self._stream))
        self.counts = require_placement(
            placed_nodes(session),
            asked=asked,
            at_most=CPU_NODES_AT_MOST if options.cpu_nodes_at_most is None else options.cpu_nodes_at_most,
            shapes=_shapes_in(path),
            where=str(path),
        )
        return session

    def _cache_options(self, path: Path, options: EngineOptions) -> dict[str, str]:
        """The folders of TensorRT's engines and timings, each named by all that they depend on; made if need be."""
        if options.provider != "tensorrt":
            return {}
        software = _software()
        kept = kept_folder(options, "trt_engine_cache_path")
        if kept is None and not self._keep:
            self._scratch = Path(tempfile.mkdtemp(prefix="gate-onnxruntime-"))
        key = cache_key(
            model_sha256=_model_sha256(path),
            options=self.told,
            software=software if kept is not None else {**software, "path": str(path.resolve())},
        )
        engines = (kept or self._scratch or _process_folder()) / key
        engines.mkdir(parents=True, exist_ok=True)
        found = {"trt_engine_cache_path": str(engines)}
        timings = kept_folder(options, "trt_timing_cache_path")
        if timings is not None:
            timings = timings / cache_key(model_sha256="", options={}, software=software)
            timings.mkdir(parents=True, exist_ok=True)
            found["trt_timing_cache_path"] = str(timings)
        return found


def _left_by(value: Any, dtype: str, *, is_current: Callable[[], bool]) -> DeviceArray | Array:
    """An OrtValue where it lies; as an array where that is the host."""
    if value.device_name() == "cpu":
        array: Array = value.numpy()
        return array
    return DeviceArray(value.data_ptr(), shape=tuple(value.shape()), dtype=dtype, is_current=is_current)


def _installed_memory() -> Memory | None:
    with contextlib.suppress(BackendUnavailable):
        return memory()
    return None


def _shapes_in(path: Path) -> frozenset[str]:
    """Names of the nodes that only do arithmetic on shapes; none where `onnx` is not installed, which is stricter."""
    try:
        return shape_nodes(read_model(path)[0])
    except ImportError:
        return frozenset()
    except BuildError as err:
        raise RunError(err.message, where=err.where, hint=err.hint) from err


def _model_sha256(path: Path) -> str:
    """sha256 of an ONNX file, and of the files with its external data."""
    try:
        names = read_model(path)[1]
    except BuildError as err:
        raise RunError(err.message, where=err.where, hint=err.hint) from err
    digest = hashlib.sha256()
    for file in (path, *(path.parent / name for name in names)):
        digest.update(f"{file.stat().st_size}\n".encode())
        with file.open("rb") as opened:
            while chunk := opened.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def _software() -> Mapping[str, str | None]:
    """What a compiled engine depends on beside the graph and the options."""
    device = fingerprint(for_gpu=True)
    versions = {
        name: version for name, version in device.versions.items() if name.startswith(("onnxruntime", "tensorrt"))
    }
    return {
        **versions,
        "gpu": device.name,
        "compute_capability": device.compute_capability,
        "driver": device.driver,
        "cuda": device.cuda,
        TF32_OVERRIDE: os.environ.get(TF32_OVERRIDE),
    }


@functools.cache
def _process_folder() -> Path:
    """Where engines are kept that no user asked to keep: gone when the process ends."""
    folder = tempfile.mkdtemp(prefix="gate-onnxruntime-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
