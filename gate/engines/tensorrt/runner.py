"""A deserialised plan that runs."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns
from types import TracebackType
from typing import Any

import numpy as np

from gate.engines.feed import require_feed, require_inputs
from gate.engines.interface import Unread, Wait
from gate.engines.regions import released_with, require_alike, unread_regions
from gate.engines.tensorrt.buffers import Buffers, output_allocator
from gate.engines.tensorrt.device_array import DeviceArray, DeviceInput, device_input, nbytes_of
from gate.engines.tensorrt.loaded import BFLOAT16, LoadedPlan, Profile
from gate.engines.tensorrt.memory import Memory, four_events, memory
from gate.errors import RunError
from gate.spec import GateSpec
from gate.tensors import Array, NamedArrays, TensorMeta

Shape = tuple[int, ...]


@dataclass(eq=False)
class _Bound:
    """Inputs that the runner was asked to run, and where it put them while they are the current ones.

    Args:
        feed: As given, in the engine's dtypes.
        inputs: The page-locked array of each input that is copied in.
        outputs: The page-locked array of each output whose shape does not depend on values.
        own: What holds the memory of the batches that this one takes turns with, if it does.
        resident: The address of each input that lies on the device for good, in memory of the batch's own.
    """

    feed: Mapping[str, Array]
    inputs: dict[str, Array] = field(default_factory=dict)
    outputs: dict[str, Array] = field(default_factory=dict)
    own: Buffers | None = None
    resident: dict[str, int] = field(default_factory=dict)


class TensorRTRunner:
    """A deserialised plan on the first visible GPU, with an execution context, a stream and buffers of its own.

    Args:
        plan: The engine; the runner holds it until it is closed.
        spec: Its inputs and their ranges.
        cast_io: Feed a float input in the engine's own floating dtype.
        cuda_graph: Capture the inference, and replay it while shapes and addresses stay the same.
        memory_of: Gives what device memory comes from.

    Raises:
        RunError: Its inputs are not the spec's, NumPy does not have the type of one, or it cannot be run.
        BackendUnavailable: No library for device memory is installed.
    """

    def __init__(
        self,
        plan: LoadedPlan,
        *,
        spec: GateSpec,
        cast_io: bool = False,
        cuda_graph: bool = False,
        memory_of: Callable[[], Memory] = memory,
    ) -> None:
        self._plan = plan
        self._where = plan.where
        self._spec = spec
        self._cast_io = cast_io
        self._cuda_graph = cuda_graph
        self._memory_of = memory_of
        self._closed = False
        self._memory: Memory | None = None
        self._stream: int | None = None
        self._context: Any = None
        self._events: dict[Wait, tuple[int, int, int, int]] = {}
        self._releases: list[weakref.finalize[..., Any]] = []
        self._graph: int | None = None
        self._parked: dict[_Bound, int] = {}
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._by_values: set[str] = set()
        self._bound: _Bound | None = None
        self._runs = 0
        plan.hold()
        try:
            self._inputs, self._outputs = plan.tensors()
            require_inputs(self._inputs, spec=spec, cast_io=cast_io, where=self._where)
            plan.require_runnable()
            self._profiles = plan.profiles()
            self._memory = memory_of()
            self._buffers = Buffers(self._memory)
            self._allocator = output_allocator(plan.trt, self._buffers)
            self._stream = self._memory.stream()
            self._context = plan.context()
        except BaseException:
            self.close()
            raise

    @property
    def inputs(self) -> Mapping[str, TensorMeta]:
        """What it takes."""
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, TensorMeta]:
        """What it gives."""
        return self._outputs

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """The plan's optimization profiles. A feed is run in the first that holds its shapes."""
        return self._profiles

    @property
    def device_memory_bytes(self) -> int:
        """Device memory that an execution context takes for activations, beside weights, inputs and outputs.

        Raises:
            RunError: The runner is closed.
        """
        self._opened()
        return self._plan.device_memory_bytes

    def run(self, feed_dict: NamedArrays) -> dict[str, Array]:
        """One inference: copy in through page-locked memory, compute, copy out, wait.

        Outputs in bfloat16 come as float32. An output whose shape depends on values has the shape that it got.

        Raises:
            RunError: An input does not fit, the engine failed, or the runner is closed.
        """
        bound = self._bind(feed_dict)
        with self._recovering():
            found = self._infer(bound)
        return {
            name: _float32_from_bfloat16(found[name]) if meta.dtype == BFLOAT16 else found[name].copy()
            for name, meta in self._outputs.items()
        }

    def timed(self, feed_dict: NamedArrays) -> Callable[[], None]:
        """One inference with both copies, between page-locked arrays and buffers that are there, done when it returns.

        Raises:
            RunError: As `run`.
        """
        bound = self._bind(feed_dict)

        def once() -> None:
            self._opened()
            with self._recovering():
                if self._bound is not bound:
                    self._place(bound)
                self._infer(bound)

        once()
        return once

    def region_timed(self, feeds: Sequence[NamedArrays], *, transfers: bool, wait: Wait) -> Callable[[int], Unread]:
        """The regions of an inference on one of several batches, between CUDA events on the runner's stream.

        With transfers every batch has a page-locked array of its own, copied to the one buffer that the engine reads. Without,
        every batch has a buffer of its own, and a CUDA graph of its own where one was asked for: its address is set, or its
        graph chosen, before the clock starts. Both are freed with the function, or when the runner is closed.

        Raises:
            RunError: As `run`, or the batches differ in shape.
        """
        memory, stream = self._opened()
        if wait not in self._events:
            self._events[wait] = four_events(memory, blocking=wait == "block")
        events = self._events[wait]
        first, start, end, last = events
        own = Buffers(memory)

        def elapsed_ns(begin: int, finish: int) -> int:
            self._opened()
            return memory.elapsed_ns(begin, finish)

        def once(index: int) -> Unread:
            self._opened()
            batch = batches[index]
            with self._recovering():
                self._turn_to(batch)
                self._capture()
                if transfers:
                    memory.record(first, stream)
                    self._copy_in(batch)
                memory.record(start, stream)
                before = perf_counter_ns()
                self._execute()
                enqueue = perf_counter_ns() - before
                memory.record(end, stream)
                if transfers:
                    self._copy_out(batch)
                    memory.record(last, stream)
                unread = unread_regions(elapsed_ns, events, enqueue=enqueue, transfers=transfers)
                memory.wait(last if transfers else end)
            return unread

        try:
            batches = self._batches(feeds, own, transfers=transfers)
            for index in range(len(batches)):
                once(index)
        except BaseException:
            own.close()
            raise
        self._releases = released_with(once, own.close, self._releases)
        return once

    def run_on_device(self, feed_dict: Mapping[str, Any]) -> dict[str, DeviceArray]:
        """One inference on arrays that lie on the device: nothing is copied, neither in nor out.

        Args:
            feed_dict: Per input an object with `__cuda_array_interface__`, such as a CUDA tensor of PyTorch or an array of
                CuPy: C-contiguous, in the engine's own dtype, at an address that is a multiple of 256.

        Returns:
            The outputs, done. Each holds until this runner's next inference, or until it is closed.

        Raises:
            RunError: As `run`, or an input is not such an array.
        """
        memory, stream = self._opened()
        given = self._device_feed(feed_dict)
        self._bound = None
        with self._recovering():
            self._drop_parked()
            self._set_shapes({name: each.shape for name, each in given.items()})
            for name, each in given.items():
                if each.stream is not None:
                    memory.synchronize(each.stream)
                self._set_address(name, each.address)
            shapes = self._place_outputs()
            self._capture()
            self._execute()
            memory.synchronize(stream)
            return self._left(shapes)

    def run_to_device(self, feed_dict: NamedArrays) -> dict[str, DeviceArray]:
        """One inference on host arrays, copied in as by `run`; the outputs stay on the device, as by `run_on_device`.

        Raises:
            RunError: As `run`.
        """
        bound = self._bind(feed_dict)
        memory, stream = self._opened()
        with self._recovering():
            self._copy_in(bound)
            self._capture()
            self._execute()
            memory.synchronize(stream)
            return self._left({name: array.shape for name, array in bound.outputs.items()})

    def fresh(self) -> TensorRTRunner:
        """Another runner, with a context, a stream and buffers of its own, closed on its own.

        It shares the engine; in TensorRT 8 and 9, whose contexts do not share a profile, it loads the plan again.

        Raises:
            RunError: It cannot be made, or this one is closed.
        """
        self._opened()
        return TensorRTRunner(
            self._plan.another(),
            spec=self._spec,
            cast_io=self._cast_io,
            cuda_graph=self._cuda_graph,
            memory_of=self._memory_of,
        )

    def close(self) -> None:
        """Free the context, the buffers and the stream; the engine too where no other runner holds it."""
        if self._closed:
            return
        self._closed = True
        memory, stream = self._memory, self._stream
        # After an error of CUDA each of these may fail again; what can be given back still is.
        if memory is not None:
            if stream is not None:
                with contextlib.suppress(RunError):
                    memory.synchronize(stream)
            with contextlib.suppress(RunError):
                self._drop_graph()
            with contextlib.suppress(RunError):
                self._drop_parked()
            for event in [each for four in self._events.values() for each in four]:
                with contextlib.suppress(RunError):
                    memory.drop_event(event)
        self._context = self._bound = self._allocator = None
        if memory is not None:
            for release in self._releases:
                release()
            self._buffers.close()
            if stream is not None:
                with contextlib.suppress(RunError):
                    memory.close(stream)
        self._plan.release()

    def __enter__(self) -> TensorRTRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _opened(self) -> tuple[Memory, int]:
        if self._closed or self._memory is None or self._stream is None:
            raise RunError("the runner is closed", where=self._where)
        return self._memory, self._stream

    @contextlib.contextmanager
    def _recovering(self) -> Iterator[None]:
        """After an error nothing that was set is relied on: the next inference sets all of it again."""
        try:
            yield
        except BaseException:
            self._bound = None
            self._shapes = {}
            self._addresses = {}
            with contextlib.suppress(RunError):
                self._drop_graph()
            with contextlib.suppress(RunError):
                self._drop_parked()
            raise

    def _bind(self, feed_dict: NamedArrays) -> _Bound:
        self._opened()
        bound = _Bound(require_feed(feed_dict, self._inputs, spec=self._spec, cast_io=self._cast_io))
        with self._recovering():
            self._place(bound)
        return bound

    def _place(self, bound: _Bound) -> None:
        """Make it the current one: shapes, buffers and addresses, and its inputs in page-locked memory."""
        self._bound = None
        self._drop_parked()
        self._set_shapes({name: array.shape for name, array in bound.feed.items()})
        for name, array in bound.feed.items():
            if bound.own is None:
                bound.inputs[name] = self._staged(name, array)
            self._set_address(name, bound.resident.get(name) or self._buffers.device(name, array.nbytes))
        bound.outputs = {
            name: self._pinned(name, self._outputs[name].dtype, shape) for name, shape in self._place_outputs().items()
        }
        self._bound = bound

    def _batches(self, feeds: Sequence[NamedArrays], own: Buffers, *, transfers: bool) -> list[_Bound]:
        """Batches that take turns, with memory of their own: page-locked, or on the device where there are no transfers.

        Raises:
            RunError: One does not fit, they differ in shape, or there is too little memory.
        """
        memory, stream = self._opened()
        batches = [
            _Bound(require_feed(feed, self._inputs, spec=self._spec, cast_io=self._cast_io), own=own) for feed in feeds
        ]
        require_alike([batch.feed for batch in batches], where=self._where)
        self._bound = None  # the current one's page-locked memory is staged to
        for index, batch in enumerate(batches):
            for name, array in batch.feed.items():
                key = f"{index} {name}"
                if transfers:
                    source = own.pinned(key, dtype=array.dtype.name, shape=array.shape, nbytes=array.nbytes)
                    source[...] = array
                    batch.inputs[name] = source
                else:
                    batch.resident[name] = own.device(key, array.nbytes)
                    memory.to_device(batch.resident[name], self._staged(name, array), stream)
                    memory.synchronize(stream)
        return batches

    def _turn_to(self, batch: _Bound) -> None:
        """Make a batch the current one. After one that it takes turns with, that is an address, or nothing at all."""
        current = self._bound
        if current is batch:
            return
        if current is None or current.own is not batch.own:
            self._place(batch)
            return
        self._bound = None
        if batch.resident:
            if self._graph is not None:
                self._parked[current], self._graph = self._graph, None
            for name, address in batch.resident.items():
                self._set_address(name, address)
            self._graph = self._parked.pop(batch, None)
        batch.outputs = current.outputs
        self._bound = batch

    def _staged(self, name: str, array: Array) -> Array:
        """An input in the runner's page-locked memory."""
        staged = self._pinned(name, array.dtype.name, array.shape)
        staged[...] = array
        return staged

    def _set_shapes(self, shapes: Mapping[str, Shape]) -> None:
        memory, stream = self._opened()
        profile = self._profile_of(shapes)
        if self._context.active_optimization_profile != profile.index:
            self._drop_graph()
            self._shapes, self._addresses = {}, {}
            if not self._context.set_optimization_profile_async(profile.index, stream):
                raise self._plan.failed(f"the engine does not switch to profile {profile.index}")
            memory.synchronize(stream)
        for name, shape in shapes.items():
            if self._shapes.get(name) == shape:
                continue
            self._drop_graph()
            if not self._context.set_input_shape(name, shape):
                raise self._plan.failed(f"input {name!r} cannot have the shape {list(shape)}")
            self._shapes[name] = shape

    def _profile_of(self, shapes: Mapping[str, Shape]) -> Profile:
        """The first profile that holds the shapes.

        Raises:
            RunError: None does; says which axis and what is allowed.
        """
        outside = {
            profile.index: {(name, axis) for name, shape in shapes.items() for axis in profile.outside(name, shape)}
            for profile in self._profiles
        }
        for profile in self._profiles:
            if not outside[profile.index]:
                return profile
        several = len(self._profiles) > 1
        hint = "Build the engine with a profile that holds it: [inputs] or options.profiles in the spec."
        for name, shape in shapes.items():
            for axis, size in enumerate(shape):
                if all((name, axis) in each for each in outside.values()):
                    allowed = dict.fromkeys(
                        _range(profile.ranges[name][0][axis], profile.ranges[name][2][axis])
                        for profile in self._profiles
                    )
                    raise RunError(
                        f"input {name!r} is {list(shape)}: axis {axis} ({self._spec.inputs[name].shape[axis]}) is {size}, "
                        f"the plan's profile{'s allow' if several else ' allows'} {' or '.join(allowed)}",
                        where=self._where,
                        hint=hint,
                    )
        ranges = "; ".join(
            f"profile {each.index}: "
            + ", ".join(f"{name} {list(low)} to {list(high)}" for name, (low, _, high) in each.ranges.items())
            for each in self._profiles
        )
        given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise RunError(f"no profile of the plan holds {given} ({ranges})", where=self._where, hint=hint)

    def _place_outputs(self) -> dict[str, Shape]:
        """Give every output a buffer, or, where its shape depends on values, the allocator; the shapes of the former."""
        shapes: dict[str, Shape] = {}
        for name, meta in self._outputs.items():
            shape = tuple(int(size) for size in self._context.get_tensor_shape(name))
            if any(size < 0 for size in shape):
                # After an inference TensorRT 8.6 gives the shape that this one had, which says nothing of the next.
                self._by_values.add(name)
            if name in self._by_values:
                if not self._context.set_output_allocator(name, self._allocator):
                    raise self._plan.failed(f"no output allocator for {name!r}")
                continue
            shapes[name] = shape
            self._set_address(name, self._buffers.device(name, nbytes_of(meta.dtype, shape)))
        return shapes

    def _set_address(self, name: str, address: int) -> None:
        if self._addresses.get(name) == address:
            return
        self._drop_graph()
        if not self._context.set_tensor_address(name, address):
            raise self._plan.failed(f"no address for {name!r}")
        self._addresses[name] = address

    def _pinned(self, name: str, dtype: str, shape: Shape) -> Array:
        return self._buffers.pinned(
            name,
            dtype="uint16" if dtype == BFLOAT16 else dtype,
            shape=shape,
            nbytes=nbytes_of(dtype, shape),
        )

    def _copy_in(self, bound: _Bound) -> None:
        memory, stream = self._opened()
        for name, array in bound.inputs.items():
            memory.to_device(self._addresses[name], array, stream)

    def _infer(self, bound: _Bound) -> dict[str, Array]:
        """Both copies and the inference between; the outputs in page-locked memory."""
        memory, stream = self._opened()
        self._copy_in(bound)
        self._capture()
        self._execute()
        outputs = self._copy_out(bound)
        memory.synchronize(stream)
        return outputs

    def _copy_out(self, bound: _Bound) -> dict[str, Array]:
        """The page-locked arrays that the outputs come to lie in when the stream gets there."""
        memory, stream = self._opened()
        for name, array in bound.outputs.items():
            if array.nbytes:
                memory.to_host(array, self._addresses[name], stream)
        dynamic: dict[str, Array] = {}
        for name, shape in self._dynamic_shapes().items():
            array = dynamic[name] = self._pinned(name, self._outputs[name].dtype, shape)
            if array.nbytes:
                memory.to_host(array, self._buffers.device(name, 0), stream)
        return {**bound.outputs, **dynamic}

    def _execute(self) -> None:
        memory, stream = self._opened()
        self._runs += 1
        if self._graph is not None:
            memory.launch(self._graph, stream)
            return
        self._allocator.shapes, self._allocator.error = {}, None
        ran = self._context.execute_async_v3(stream)
        if self._allocator.error is not None:
            error = self._allocator.error
            raise RunError(f"no memory for an output: {error.message}", where=self._where) from error
        if not ran:
            raise self._plan.failed("the engine did not run")

    def _dynamic_shapes(self) -> dict[str, Shape]:
        """What the outputs turned out to be whose shape depends on values.

        Raises:
            RunError: The engine did not say.
        """
        shapes: dict[str, Shape] = {}
        for name in self._outputs:
            if name in self._addresses:
                continue
            shape = self._allocator.shapes.get(name)
            if shape is None or any(size < 0 for size in shape):
                raise self._plan.failed(f"the engine did not say what shape output {name!r} has")
            shapes[name] = shape
        return shapes

    def _left(self, shapes: Mapping[str, Shape]) -> dict[str, DeviceArray]:
        """The outputs of the inference that is done, in its buffers.

        Args:
            shapes: Of those whose shape does not depend on values.
        """
        run = self._runs
        shapes = {**shapes, **self._dynamic_shapes()}
        return {
            name: DeviceArray(
                self._buffers.device(name, 0),
                shape=shapes[name],
                dtype=meta.dtype,
                is_current=lambda: not self._closed and self._runs == run,
            )
            for name, meta in self._outputs.items()
        }

    def _capture(self) -> None:
        """Capture the inference where that was asked for and is not done: once run as it is, then collected.

        Raises:
            RunError: It cannot be captured.
        """
        if not self._cuda_graph or self._graph is not None:
            return
        memory, stream = self._opened()
        hint = "Leave options.cuda_graph out for this engine."
        dynamic = [name for name in self._outputs if name not in self._addresses]
        if dynamic:
            raise RunError(
                f"no CUDA graph of this engine: the shape of output {', '.join(map(repr, dynamic))} depends on values",
                where=self._where,
                hint=hint,
            )
        # The first inference in a shape allocates and initialises, which cannot be captured.
        self._execute()
        memory.synchronize(stream)
        try:
            memory.begin_capture(stream)
            try:
                ran = self._context.execute_async_v3(stream)
            finally:
                graph = memory.end_capture(stream)
        except RunError as err:
            raise RunError(
                f"the inference cannot be captured in a CUDA graph: {err.message}", where=self._where, hint=hint
            ) from err
        if not ran:
            memory.drop_graph(graph)
            failed = self._plan.failed("the inference cannot be captured in a CUDA graph")
            raise RunError(failed.message, where=self._where, hint=hint)
        self._graph = graph

    def _drop_graph(self) -> None:
        graph, self._graph = self._graph, None
        if graph is not None and self._memory is not None:
            self._memory.drop_graph(graph)

    def _drop_parked(self) -> None:
        """Give the graphs back of batches that are not the current one."""
        while self._parked and self._memory is not None:
            self._memory.drop_graph(self._parked.popitem()[1])

    def _device_feed(self, feed_dict: Mapping[str, Any]) -> dict[str, DeviceInput]:
        """What lies on the device, held against the engine's inputs.

        Raises:
            RunError: One is missing, unexpected or cannot be read there, or two disagree about a named axis.
        """
        memory, _ = self._opened()
        missing = [name for name in self._inputs if name not in feed_dict]
        extra = [name for name in feed_dict if name not in self._inputs]
        if missing or extra:
            what = f"input {', '.join(map(repr, missing))} is missing" if missing else ""
            what += "; " if missing and extra else ""
            what += f"unexpected input {', '.join(map(repr, extra))}" if extra else ""
            raise RunError(f"{what}; it takes {', '.join(map(repr, self._inputs))}", where=self._where)
        given = {name: device_input(name, feed_dict[name], meta) for name, meta in self._inputs.items()}
        sizes: dict[str, tuple[str, int]] = {}
        for name, each in given.items():
            if not memory.is_on_device(each.address):
                raise RunError(f"input {name!r} does not lie on the GPU: address {each.address:#x}", where=self._where)
            if self._buffers.overlaps(each.address, each.nbytes):
                raise RunError(
                    f"input {name!r} lies in a buffer of this runner, which the inference writes to",
                    where=self._where,
                    hint="Copy the output before it is fed again.",
                )
            for axis, size in zip(self._spec.inputs[name].shape, each.shape, strict=True):
                other, known = sizes.setdefault(axis, (name, size)) if isinstance(axis, str) else (name, size)
                if known != size:
                    raise RunError(f"axis {axis!r} is {known} in input {other!r} and {size} in input {name!r}")
        return given


def _float32_from_bfloat16(bits: Array) -> Array:
    """The float32 values of bfloat16 bits: its upper half.

    Args:
        bits: uint16, any shape.
    """
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"
