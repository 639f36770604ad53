"""A loaded graph on a GPU: the provider that was asked for runs it, or nothing does."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns
from typing import Any

from gate.device import fingerprint
from gate.engines.interface import Unread, Wait
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
from gate.engines.onnxruntime.runner import OnnxRuntimeRunner, element_type, read_model
from gate.engines.onnxruntime.session import open_session, provider_list
from gate.engines.regions import released_with, require_alike, unread_regions
from gate.engines.tensorrt.buffers import Buffers
from gate.engines.tensorrt.device_array import DeviceArray, nbytes_of
from gate.engines.tensorrt.memory import Memory, four_events, memory
from gate.errors import BackendUnavailable, BuildError, RunError
from gate.spec import EngineOptions, GateSpec
from gate.tensors import Array, NamedArrays

_RETURN_EARLY = "disable_synchronize_execution_providers"
"""Entry of a run's configuration: the call returns when the work is queued, without waiting for the device.

Source: onnxruntime_run_options_config_keys.h, kOrtRunOptionsConfigDisableSynchronizeExecutionProviders.
"""

_HOST = "cpu"
"""What ONNX Runtime calls the host."""

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class _Batch:
    """A batch that is bound, and what is copied where for it.

    Args:
        binding: ONNX Runtime's IOBinding.
        held: What must outlive it.
        sources: Page-locked arrays, each with the address that it is copied to.
        sinks: Page-locked arrays, each with the address that it is copied from.
    """

    binding: Any
    held: tuple[Any, ...] = ()
    sources: tuple[tuple[Array, int], ...] = ()
    sinks: tuple[tuple[Array, int], ...] = ()


@dataclass(frozen=True)
class _Given:
    """The inputs of a batch.

    Args:
        bind: Binds them.
        held, sources: As `_Batch`.
    """

    bind: Callable[[Any], None]
    held: tuple[Any, ...] = ()
    sources: tuple[tuple[Array, int], ...] = ()


@dataclass(frozen=True)
class _Made:
    """An output that an inference made.

    Args:
        device: ONNX Runtime's name of where it lies.
        kind: What `bind_output` takes for its dtype.
    """

    name: str
    device: str
    kind: Any
    shape: tuple[int, ...]
    nbytes: int


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
        self._events: dict[Wait, tuple[int, int, int, int]] = {}
        self._releases: list[weakref.finalize[..., Any]] = []
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
        self._share_outputs(binding)
        return once

    def region_timed(self, feeds: Sequence[NamedArrays], *, transfers: bool, wait: Wait) -> Callable[[int], Unread]:
        """The regions of an inference on one of several batches, between CUDA events on the stream that the provider runs on.

        ONNX Runtime's own copies (`OrtValue.update_inplace`, binding an array) are not in the order of that stream, so
        the copies of a run with transfers are the runner's: from page-locked arrays of each batch to one buffer that is
        bound by address, and from the buffer that an output is bound to. An output that the provider leaves on the
        host is not copied. Every batch is bound once; all of them leave an output in the same buffer.

        Raises:
            RunError: As `run`, the batches differ in shape, or an output lies on another device.
            BackendUnavailable: No library for CUDA events is installed.
        """
        import onnxruntime

        self._open_session()
        clock, stream = self._clock()
        if wait not in self._events:
            self._events[wait] = four_events(clock, blocking=wait == "block")
        events = self._events[wait]
        first, start, end, last = events
        every = [self._required_feed(feed) for feed in feeds]
        require_alike(every, where=self._where)
        settings = onnxruntime.RunOptions()
        settings.add_run_config_entry(_RETURN_EARLY, "1")
        own = Buffers(clock)

        def elapsed_ns(begin: int, finish: int) -> int:
            self._open_session()
            return clock.elapsed_ns(begin, finish)

        def once(index: int) -> Unread:
            session = self._open_session()
            batch = batches[index]
            if transfers:
                clock.record(first, stream)
                for source, address in batch.sources:
                    clock.to_device(address, source, stream)
            clock.record(start, stream)
            try:
                before = perf_counter_ns()
                session.run_with_iobinding(batch.binding, settings)
                enqueue = perf_counter_ns() - before
            except Exception as err:
                raise self._failed(err) from err
            clock.record(end, stream)
            if transfers:
                for sink, address in batch.sinks:
                    clock.to_host(sink, address, stream)
                clock.record(last, stream)
            unread = unread_regions(elapsed_ns, events, enqueue=enqueue, transfers=transfers)
            clock.wait(last if transfers else end)
            return unread

        try:
            batches = self._batches(every, own, transfers=transfers)
            for index in range(len(batches)):
                once(index)
        except BaseException:
            own.close()
            raise
        self._releases = released_with(once, own.close, self._releases)
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
        for release in self._releases:
            release()
        if clock is not None:
            for event in [each for four in self._events.values() for each in four]:
                clock.drop_event(event)
            if self._stream is not None:
                clock.close(self._stream)
        self._events, self._stream = {}, None
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None

    def _clock(self) -> tuple[Memory, int]:
        if self._memory is None or self._stream is None:
            raise BackendUnavailable(
                "timing on the device needs CUDA events, and neither cuda-python nor PyTorch with CUDA is installed",
                hint='pip install "trt-gate[gpu]"',
            )
        return self._memory, self._stream

    def _batches(self, feeds: Sequence[Mapping[str, Array]], own: Buffers, *, transfers: bool) -> list[_Batch]:
        """Batches that are bound to their inputs, and to outputs that all of them share.

        What shapes the outputs have, and where the provider makes them, is seen in one inference of each batch.

        Raises:
            RunError: The runtime failed, an output lies elsewhere, or there is too little memory.
        """
        clock, stream = self._clock()
        session = self._open_session()
        try:
            given = [self._given(feed, own, index=index, transfers=transfers) for index, feed in enumerate(feeds)]
            made: list[list[_Made]] = []
            for each in given:
                # A binding of its own, since one that ran holds the outputs of that inference.
                binding = session.io_binding()
                each.bind(binding)
                for source, address in each.sources:
                    clock.to_device(address, source, stream)
                for name in self._outputs:
                    binding.bind_output(name, self._device, 0)
                binding.synchronize_inputs()
                session.run_with_iobinding(binding)
                made.append(self._made_by(binding))
            sinks = [self._sink(each, own, transfers=transfers) for each in zip(*made, strict=True)]
            batches = []
            for each, outputs in zip(given, made, strict=True):
                binding = session.io_binding()
                each.bind(binding)
                binding.synchronize_inputs()
                copies = []
                for output, (address, host) in zip(outputs, sinks, strict=True):
                    if not output.nbytes:
                        binding.bind_output(output.name, self._device, 0)
                        continue
                    binding.bind_output(output.name, output.device, 0, output.kind, list(output.shape), address)
                    if host is not None:
                        copies.append((host[: output.nbytes], address))
                batches.append(_Batch(binding, held=each.held, sources=each.sources, sinks=tuple(copies)))
        except RunError:
            raise
        except Exception as err:
            raise self._failed(err) from err
        return batches

    def _given(self, feed: Mapping[str, Array], own: Buffers, *, index: int, transfers: bool) -> _Given:
        """The inputs of a batch: in page-locked memory, for a buffer that all batches share, or on the device for good."""
        if not transfers:
            values = {name: self._on_device(array) for name, array in feed.items()}

            def bind_values(binding: Any) -> None:
                for name, value in values.items():
                    binding.bind_ortvalue_input(name, value)

            return _Given(bind_values, held=tuple(values.values()))
        sources = []
        for name, array in feed.items():
            source = own.pinned(f"{index} in {name}", dtype=array.dtype.name, shape=array.shape, nbytes=array.nbytes)
            source[...] = array
            sources.append((source, own.device(f"in {name}", array.nbytes)))

        def bind_addresses(binding: Any) -> None:
            for (name, array), (_, address) in zip(feed.items(), sources, strict=True):
                binding.bind_input(name, self._device, 0, array.dtype.type, list(array.shape), address)

        return _Given(bind_addresses, sources=tuple(sources))

    def _made_by(self, binding: Any) -> list[_Made]:
        """The outputs of an inference that is done.

        Source: `OrtValue.device_name` of ONNX Runtime 1.31: the kind of device in lower case, such as cpu, cuda or webgpu.

        Raises:
            RunError: One lies neither on the device nor on the host.
        """
        found = []
        for meta, value in zip(self._outputs.values(), binding.get_outputs(), strict=True):
            device = value.device_name()
            if device not in (self._device, _HOST):
                raise RunError(
                    f"output {meta.name!r} lies on {device!r}; its copy can be timed from {self._device!r} alone",
                    where=self._where,
                    hint='Time the engine on provider = "cuda" or "tensorrt" with outputs on the GPU or the host.',
                )
            shape = tuple(int(size) for size in value.shape())
            found.append(
                _Made(
                    meta.name, device, kind=element_type(meta.dtype), shape=shape, nbytes=nbytes_of(meta.dtype, shape)
                )
            )
        return found

    def _sink(self, made: Sequence[_Made], own: Buffers, *, transfers: bool) -> tuple[int, Array | None]:
        """Where every batch leaves an output, large enough for each, and the page-locked array that it is copied to.

        Returns:
            The address; and the array, uint8, or None where nothing is copied: without transfers, and on the host.

        Raises:
            RunError: Some batches leave it on the device and some on the host, or there is too little memory.
        """
        devices = sorted({each.device for each in made})
        if len(devices) > 1:
            raise RunError(f"output {made[0].name!r} lies on {' or '.join(devices)}, by batch", where=self._where)
        nbytes = max(each.nbytes for each in made)
        key = f"out {made[0].name}"
        on_device = devices[0] == self._device
        address = own.device(key, nbytes) if on_device else 0
        if on_device and not transfers:
            return address, None
        host = own.pinned(key, dtype="uint8", shape=(nbytes,), nbytes=nbytes)
        return (address, host) if on_device else (host.ctypes.data, None)

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
    if value.device_name() == _HOST:
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
