"""The regions of an inference in PyTorch. Where there is no GPU, the runner's own logic runs on the CPU."""

import threading
from contextlib import ExitStack

import msgspec
import numpy as np
import pytest
import torch

from gate.engines.interface import RegionTimed
from gate.engines.torch.engine import CudaTorchEngineRunner, TorchEngineRunner
from gate.errors import RunError
from gate.spec import GateSpec
from gate.timing import concurrent


def engine_alone(runner, feed):
    """A call that gives the nanoseconds of the engine alone, its inputs on the device."""
    once = runner.region_timed([feed], transfers=False, wait="spin")
    return lambda: once(0)().gpu_compute


AXES = {"n": {"min": 1, "opt": 2, "max": 4}}
SPEC = msgspec.convert(
    {
        "schema": 1,
        "model": {"id": "m", "factory": "a:b", "output_names": ["y", "most"]},
        "inputs": {name: {"dtype": "float32", "shape": ["n", 3], "axes": AXES} for name in ("a", "b")},
        "data": {"source": "a:b", "samples": 1},
        "engine": [{"name": "e", "backend": "torch", "precision": "fp32", "parity": {}}],
    },
    GateSpec,
)
A = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
TURNS = [{"a": A, "b": A + 1}, {"a": -A, "b": A}, {"a": 2 * A, "b": A - 1}]


class Clock:
    """Time that passes with what is done, nanoseconds, and what was seen of it."""

    def __init__(self):
        self.now_ns = 0
        self.slept = 0
        self.seen = []
        self.queries = 0
        self.streams = []
        self.used = []
        self.local = threading.local()
        self.settled = 0

    @property
    def stream(self):
        """The current one of the thread."""
        return getattr(self.local, "stream", "default")

    def did(self, what):
        """Something was given to the current stream."""
        self.used.append((what, self.stream))


class Stream:
    """Of torch.cuda; a context in which it is the current one."""

    def __init__(self, clock):
        self.clock, self.synchronized = clock, 0
        clock.streams.append(self)

    def __enter__(self):
        self.before, self.clock.local.stream = self.clock.stream, self

    def __exit__(self, *_):
        self.clock.local.stream = self.before

    def synchronize(self):
        self.synchronized += 1


class Event:
    """Of torch.cuda."""

    def __init__(self, clock, blocking):
        self.clock, self.blocking, self.at = clock, blocking, None

    def record(self, stream=None):
        self.at = self.clock.now_ns
        self.clock.used.append(("event", stream or self.clock.stream))

    def synchronize(self):
        self.clock.slept += self.blocking
        self.clock.local.reached = self.at

    def elapsed_time(self, end):
        self.clock.queries += 1
        assert end.at <= self.clock.local.reached, "not ready"
        return (end.at - self.at) / 1e6


class Counted(torch.Tensor):
    """A tensor that time passes with when it is copied to."""

    clock = None

    def copy_(self, source, non_blocking=False):
        assert non_blocking
        self.clock.now_ns += 100
        self.clock.did("copy")
        return super().copy_(source)


class OnTheCpu(CudaTorchEngineRunner):
    """The same runner on tensors in host memory."""

    clock = None

    def _counted(self, tensor):
        found = tensor.clone().as_subclass(Counted)
        found.clock = self.clock
        return found

    def _host_tensors(self, feed_dict):
        return TorchEngineRunner._host_tensors(self, feed_dict)

    def _on_device(self, tensors):
        self.clock.did("place")
        return tuple(self._counted(each) for each in tensors)

    def _new_stream(self):
        return Stream(self.clock)

    def _current(self, stream):
        return stream

    def _settle(self):
        self.clock.settled += 1

    def _event(self, *, blocking):
        return Event(self.clock, blocking)

    def _page_locked(self, like):
        return self._counted(torch.empty(like.shape, dtype=like.dtype))


@pytest.fixture
def simulated():
    clock = Clock()
    OnTheCpu.clock = clock
    with opened(clock) as runner:
        yield runner, clock


def opened(clock):
    """An engine whose outputs are of another dtype than the model's."""

    def engine(a, b):
        clock.now_ns += 1000
        clock.did("engine")
        y = (a * b + 1).to(torch.float16)
        clock.seen.append(np.array(y.tolist(), np.float32))
        return {"y": y, "most": y.argmax(1)}

    return OnTheCpu(engine, spec=SPEC, mode="eager", dtypes={"y": "float32"}, tf32=False, where="the engine")


def cell(function, name):
    """What a name of an enclosing function stands for."""
    return dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))[name].cell_contents


def test_copies_and_compute_are_told_apart_for_each_batch_in_turn(simulated):
    runner, clock = simulated
    assert isinstance(runner, RegionTimed)
    once = runner.region_timed(TURNS, transfers=True, wait="spin")
    for index in (0, 1, 2, 2, 0, 1):
        times = once(index)()
        assert (times.h2d, times.gpu_compute, times.d2h) == (200, 1000, 200)
        assert times.enqueue > 0
        np.testing.assert_array_equal(clock.seen[-1], TURNS[index]["a"] * TURNS[index]["b"] + 1)
    sinks = cell(cell(once, "launched"), "sinks")
    assert len(sinks) == 2
    assert sinks["y"].dtype == torch.float32
    np.testing.assert_array_equal(sinks["y"].tolist(), -A * A + 1)
    assert sinks["most"].tolist() == [0, 0]


def test_without_transfers_each_batch_lies_on_the_device_already(simulated):
    runner, clock = simulated
    assert isinstance(runner, RegionTimed)
    once = runner.region_timed(TURNS, transfers=False, wait="spin")
    alone = engine_alone(runner, TURNS[0])
    for index in (0, 1, 2, 2, 0, 1):
        times = once(index)()
        assert (times.h2d, times.gpu_compute, times.d2h) == (None, 1000, None)
        np.testing.assert_array_equal(clock.seen[-1], TURNS[index]["a"] * TURNS[index]["b"] + 1)
        assert alone() == 1000
        np.testing.assert_array_equal(clock.seen[-1], TURNS[0]["a"] * TURNS[0]["b"] + 1)


@pytest.mark.parametrize("transfers", [False, True])
@pytest.mark.parametrize("wait", ["spin", "block"])
def test_events_are_asked_only_after_the_call_returned(simulated, transfers, wait):
    runner, clock = simulated
    once = runner.region_timed(TURNS, transfers=transfers, wait=wait)
    assert clock.queries == 0
    unread = once(1)
    assert clock.queries == 0
    assert unread().gpu_compute == 1000
    assert clock.queries == (3 if transfers else 1)


@pytest.mark.parametrize("transfers", [False, True])
def test_each_runner_works_on_a_stream_of_its_own_and_leaves_the_current_one_as_it_was(simulated, transfers):
    first, clock = simulated
    second = opened(clock)
    second.close = lambda: TorchEngineRunner.close(second)
    calls = [runner.region_timed(TURNS, transfers=transfers, wait="spin") for runner in (first, second)]
    assert len(clock.streams) == clock.settled == 2
    for stream, call in zip(clock.streams, calls, strict=True):
        clock.used.clear()
        thread = threading.Thread(target=call, args=(1,))
        thread.start()
        thread.join()
        call(2)
        assert {used for _, used in clock.used} == {stream}
        assert {what for what, _ in clock.used} == {"event", "engine", *(["copy"] if transfers else [])}
    assert clock.stream == "default"
    first.region_timed(TURNS, transfers=transfers, wait="spin")
    assert len(clock.streams) == 2
    clock.used.clear()
    first.run(TURNS[0])
    assert {used for _, used in clock.used} == {"default"}
    second.close()


def test_what_is_placed_for_a_stream_is_placed_on_it_and_waited_for_before_it_is_freed(simulated):
    runner, clock = simulated
    runner.region_timed(TURNS, transfers=False, wait="spin")
    (stream,) = clock.streams
    assert [used for what, used in clock.used if what == "place"] == [stream] * 3
    runner.close()
    assert stream.synchronized == 1


def test_one_page_locked_array_an_output_is_copied_to_whatever_its_shape(simulated):
    runner, _ = simulated
    runner._function = lambda a, b: {"y": a[: 1 + int(a[0, 0] > 0)], "most": b}
    once = runner.region_timed(TURNS * 20, transfers=True, wait="spin")
    sinks = cell(cell(once, "launched"), "sinks")
    for index in (0, 1, 0, 1, 1):
        once(index)
        assert list(sinks) == ["y", "most"]
        np.testing.assert_array_equal(sinks["y"].tolist(), TURNS[index]["a"][: 2 - index])


def test_host_sleeps_only_where_it_is_asked_to_block(simulated):
    runner, clock = simulated
    spin = runner.region_timed(TURNS, transfers=True, wait="spin")
    assert clock.slept == 0
    runner.region_timed(TURNS, transfers=True, wait="block")
    slept = clock.slept
    assert slept > 0
    spin(0)
    assert clock.slept == slept


def test_batches_that_cannot_take_turns_are_refused(simulated):
    runner, _ = simulated
    with pytest.raises(RunError, match=r"input 'a' is \[2, 3\] in batch 0 and \[1, 3\] in batch 1"):
        runner.region_timed([TURNS[0], {"a": A[:1], "b": A[:1]}], transfers=True, wait="spin")
    with pytest.raises(RunError, match="there is no batch to time"):
        runner.region_timed([], transfers=False, wait="spin")


def test_failure_on_the_device_is_a_run_error_and_a_closed_runner_says_so(simulated):
    runner, _ = simulated
    once = runner.region_timed(TURNS, transfers=True, wait="spin")

    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access")

    runner._event = lambda blocking: type("Broken", (), {"record": broken, "synchronize": broken})()
    with pytest.raises(RunError, match="illegal memory access"):
        runner.region_timed(TURNS, transfers=True, wait="spin")
    runner.close = lambda: TorchEngineRunner.close(runner)
    runner.close()
    with pytest.raises(RunError, match="the runner is closed"):
        once(0)


def test_timed_calls_of_one_runner_take_turns_each_on_its_own_feed():
    seen = []

    def engine(a, b):
        seen.append((a * b).numpy().copy())
        return {"y": a * b, "most": a.argmax(1)}

    with TorchEngineRunner(engine, spec=SPEC, mode="eager", dtypes={}, tf32=False, where="the engine") as runner:
        calls = [runner.timed({name: array.copy() for name, array in feed.items()}) for feed in TURNS]
        for index in (0, 1, 2, 1, 0):
            calls[index]()
            np.testing.assert_array_equal(seen[-1], TURNS[index]["a"] * TURNS[index]["b"])


@pytest.mark.gpu
@pytest.mark.parametrize("wait", ["spin", "block"])
def test_regions_of_batches_in_turn_on_the_gpu(wait):
    seen = []

    def engine(a, b):
        seen.append((a * b).cpu().numpy())
        for _ in range(50):
            a = a * 1.0 + b
        return {"y": a * 0 + b, "most": a.argmax(1)}

    with CudaTorchEngineRunner(engine, spec=SPEC, mode="eager", dtypes={}, tf32=False, where="the engine") as runner:
        before = runner.run(TURNS[0])
        for transfers in (True, False):
            once = runner.region_timed(TURNS, transfers=transfers, wait=wait)
            for turn in range(12):
                times = once(turn % 3)()
                assert min(times.gpu_compute, times.enqueue) > 0
                assert (times.h2d is not None and times.h2d > 0) == transfers
                assert (times.d2h is not None and times.d2h > 0) == transfers
                np.testing.assert_array_equal(seen[-1], TURNS[turn % 3]["a"] * TURNS[turn % 3]["b"])
        for name, values in runner.run(TURNS[0]).items():
            np.testing.assert_array_equal(values, before[name])


@pytest.mark.gpu
def test_runners_on_the_gpu_work_on_streams_of_their_own_in_threads():
    used = [set(), set()]

    def engine_of(index):
        def engine(a, b):
            used[index].add(torch.cuda.current_stream().cuda_stream)
            for _ in range(50):
                a = a * 1.0 + b
            return {"y": a, "most": a.argmax(1)}

        return engine

    with ExitStack() as stack:
        calls = []
        for index in range(2):
            runner = CudaTorchEngineRunner(
                engine_of(index), spec=SPEC, mode="eager", dtypes={}, tf32=False, where="the engine"
            )
            calls.append(stack.enter_context(runner).region_timed(TURNS, transfers=True, wait="spin"))
        found = concurrent(calls_by_number(calls), kept=40, discard=2, warm_up_s=0.1, warm_up_calls=5)
        assert len(found.times.regions["host_wall"]) == 40
        first, second = used
        assert len(first) == len(second) == 1
        assert first != second
        assert torch.cuda.current_stream().cuda_stream not in first | second


def calls_by_number(calls):
    """Calls whose batches take turns."""
    return [lambda number, call=call: call(number % len(TURNS)) for call in calls]
