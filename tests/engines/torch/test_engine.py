"""The regions of an inference in PyTorch. Where there is no GPU, the runner's own logic runs on the CPU."""

import msgspec
import numpy as np
import pytest
import torch

from gate.engines.interface import GpuTimed, RegionTimed
from gate.engines.torch.engine import CudaTorchEngineRunner, TorchEngineRunner
from gate.errors import RunError
from gate.spec import GateSpec

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


class Event:
    """Of torch.cuda."""

    def __init__(self, clock, blocking):
        self.clock, self.blocking, self.at = clock, blocking, None

    def record(self):
        self.at = self.clock.now_ns

    def synchronize(self):
        self.clock.slept += self.blocking

    def elapsed_time(self, end):
        return (end.at - self.at) / 1e6


class Counted(torch.Tensor):
    """A tensor that time passes with when it is copied to."""

    clock = None

    def copy_(self, source, non_blocking=False):
        assert non_blocking
        self.clock.now_ns += 100
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
        return tuple(self._counted(each) for each in tensors)

    def _event(self, *, blocking):
        return Event(self.clock, blocking)

    def _page_locked(self, like):
        return self._counted(torch.empty(like.shape, dtype=like.dtype))


@pytest.fixture
def simulated():
    clock = Clock()

    def engine(a, b):
        clock.now_ns += 1000
        y = (a * b + 1).to(torch.float16)
        clock.seen.append(np.array(y.tolist(), np.float32))
        return {"y": y, "most": y.argmax(1)}

    OnTheCpu.clock = clock
    with OnTheCpu(engine, spec=SPEC, mode="eager", dtypes={"y": "float32"}, tf32=False, where="the engine") as runner:
        yield runner, clock


def test_copies_and_compute_are_told_apart_for_each_batch_in_turn(simulated):
    runner, clock = simulated
    assert isinstance(runner, RegionTimed)
    once = runner.region_timed(TURNS, transfers=True, wait="spin")
    for index in (0, 1, 2, 2, 0, 1):
        times = once(index)
        assert (times.h2d, times.gpu_compute, times.d2h) == (200, 1000, 200)
        assert times.enqueue > 0
        np.testing.assert_array_equal(clock.seen[-1], TURNS[index]["a"] * TURNS[index]["b"] + 1)
    cells = dict(
        zip(
            once.__closure__[0].cell_contents.__code__.co_freevars,
            once.__closure__[0].cell_contents.__closure__,
            strict=True,
        )
    )
    sinks = {key[0]: value for key, value in cells["sinks"].cell_contents.items()}
    assert sinks["y"].dtype == torch.float32
    np.testing.assert_array_equal(sinks["y"].tolist(), -A * A + 1)
    assert sinks["most"].tolist() == [0, 0]


def test_without_transfers_each_batch_lies_on_the_device_already(simulated):
    runner, clock = simulated
    assert isinstance(runner, GpuTimed)
    once = runner.region_timed(TURNS, transfers=False, wait="spin")
    alone = runner.gpu_timed(TURNS[0])
    for index in (0, 1, 2, 2, 0, 1):
        times = once(index)
        assert (times.h2d, times.gpu_compute, times.d2h) == (None, 1000, None)
        np.testing.assert_array_equal(clock.seen[-1], TURNS[index]["a"] * TURNS[index]["b"] + 1)
        assert alone() == 1000
        np.testing.assert_array_equal(clock.seen[-1], TURNS[0]["a"] * TURNS[0]["b"] + 1)


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

    runner._event = lambda blocking: type("Broken", (), {"record": broken})()
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
                times = once(turn % 3)
                assert min(times.gpu_compute, times.enqueue) > 0
                assert (times.h2d is not None and times.h2d > 0) == transfers
                assert (times.d2h is not None and times.d2h > 0) == transfers
                np.testing.assert_array_equal(seen[-1], TURNS[turn % 3]["a"] * TURNS[turn % 3]["b"])
        for name, values in runner.run(TURNS[0]).items():
            np.testing.assert_array_equal(values, before[name])
