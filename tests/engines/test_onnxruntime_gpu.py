"""A graph on a GPU. Where there is none, the runner's own logic runs on the CPU provider, with a clock that counts."""

import ctypes
import ctypes.util
import functools
import importlib.util
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from gate.compare_on_device import has_cuda, host_array
from gate.engines import backend
from gate.engines.interface import OutputsOnDevice, RegionTimed, RegionTimes
from gate.engines.onnxruntime import OnnxRuntimeRunner
from gate.engines.onnxruntime.gpu import OnnxRuntimeGpuRunner, _left_by, _Made, _process_folder
from gate.engines.onnxruntime.placement import RECORD_ENTRY, placed_nodes, require_placement
from gate.engines.tensorrt.buffers import Buffers
from gate.errors import BackendUnavailable, BuildError, RunError
from gate.spec import EngineOptions, GateSpec
from gate.verdict import Evidence

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def engine_alone(runner, feed):
    """A call that gives the nanoseconds of the engine alone, its inputs on the device."""
    once = runner.region_timed([feed], transfers=False, wait="spin")
    return lambda: once(0)().gpu_compute


RANDOM = np.random.default_rng(0)
KERNELS = (RANDOM.standard_normal((8, 3, 3, 3)) / 5).astype(np.float32)
WEIGHT = (RANDOM.standard_normal((8 * 14 * 14, 10)) / 40).astype(np.float32)
X = RANDOM.standard_normal((2, 3, 16, 16)).astype(np.float32)


def make_spec(precision="fp32", **options):
    return msgspec.convert(
        {
            "schema": 1,
            "model": {"id": "m", "factory": "a:b"},
            "inputs": {
                "x": {
                    "dtype": "float32",
                    "shape": ["n", 3, 16, 16],
                    "axes": {"n": {"min": 1, "opt": 2, "max": 4}},
                }
            },
            "data": {"source": "a:b", "samples": 1},
            "engine": [
                {
                    "name": "e",
                    "backend": "onnxruntime",
                    "precision": precision,
                    "options": {"provider": "cuda", **options},
                    "parity": {},
                }
            ],
        },
        GateSpec,
    )


SPEC = make_spec()


def write_net(path, *, extra=(), outputs=()):
    """Convolution, activation, flattening by shape arithmetic, and a matrix product."""
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], name="conv"),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("Shape", ["r"], ["s"], name="shape"),
        helper.make_node("Gather", ["s", "i"], ["b"], name="gather"),
        helper.make_node("Concat", ["b", "m"], ["t"], axis=0, name="concat"),
        helper.make_node("Reshape", ["r", "t"], ["f"], name="reshape"),
        helper.make_node("MatMul", ["f", "w"], ["y"], name="product"),
        *extra,
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10]), *outputs],
        [
            numpy_helper.from_array(KERNELS, "k"),
            numpy_helper.from_array(WEIGHT, "w"),
            numpy_helper.from_array(np.array([0]), "i"),
            numpy_helper.from_array(np.array([-1]), "m"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


class CountingMemory:
    """Streams and events whose time is how often something was recorded, and copies of 100; its device is the host."""

    def __init__(self):
        self.calls = []
        self.blocks = {}
        self.blocking = set()
        self.slept = 0
        self.queries = 0
        self.reached = -1
        self._ticks = 0
        self._times = {}

    def allocate(self, nbytes):
        block = np.zeros(nbytes, np.uint8)
        self.blocks[block.ctypes.data] = block
        return block.ctypes.data

    def free(self, address):
        del self.blocks[address]

    def pinned(self, nbytes):
        return self.blocks[self.allocate(nbytes)]

    def unpin(self, array):
        self.free(array.ctypes.data)

    def to_device(self, address, array, stream):
        self._copy(address, array.ctypes.data, array.nbytes, stream)

    def to_host(self, array, address, stream):
        self._copy(array.ctypes.data, address, array.nbytes, stream)

    def _copy(self, to, source, nbytes, stream):
        assert stream == 5
        assert all(nbytes <= self.blocks[each].nbytes for each in (to, source)), "between memory of its own"
        ctypes.memmove(to, source, nbytes)
        self._ticks += 100

    def stream(self):
        self.calls.append("stream")
        return 5

    def event(self, *, blocking=False):
        self._times[len(self._times) + 100] = None
        if blocking:
            self.blocking.add(len(self._times) + 99)
        return len(self._times) + 99

    def record(self, event, stream):
        assert stream == 5
        self._ticks += 1
        self._times[event] = self._ticks * 1000

    def wait(self, event):
        self.slept += event in self.blocking
        self.reached = self._ticks * 1000

    def elapsed_ns(self, start, end):
        self.queries += 1
        assert self._times[end] <= self.reached, "cudaErrorNotReady"
        return self._times[end] - self._times[start]

    def drop_event(self, event):
        self.calls.append(f"drop {event}")

    def close(self, stream):
        self.calls.append(f"close {stream}")


class OnTheCpu(OnnxRuntimeGpuRunner):
    """The same runner with the CPU provider beneath it."""

    _device = "cpu"

    def _load(self, path, options):
        settings = onnxruntime.SessionOptions()
        settings.add_session_config_entry(RECORD_ENTRY, "1")
        session = onnxruntime.InferenceSession(str(path), settings, providers=[CPU])
        self.counts = require_placement(placed_nodes(session), asked=CPU, at_most=0)
        return session


@pytest.fixture
def net(tmp_path):
    return write_net(tmp_path / "net.onnx")


@pytest.fixture
def simulated(net):
    clock = CountingMemory()
    with OnTheCpu(net, spec=SPEC, precision="fp32", options=SPEC.engines[0].options, device_memory=clock) as runner:
        yield runner, clock


def test_gpu_runner_is_timed_on_the_device_and_a_cpu_runner_is_not(simulated, net):
    assert isinstance(simulated[0], RegionTimed)
    with OnnxRuntimeRunner(net, spec=SPEC) as runner:
        assert not isinstance(runner, RegionTimed)


def test_simulated_device_gives_time_between_two_events(simulated):
    runner, _ = simulated
    once = engine_alone(runner, {"x": X})
    assert once() == 1000
    assert once() == 1000
    runner.timed({"x": X})()
    assert runner.run({"x": X})["y"].shape == (2, 10)


def read(batch):
    """What was copied out for a batch with transfers, or lies where its outputs were made."""
    if batch.sinks:
        return batch.sinks[0][0].view(np.float32).reshape(-1, 10)
    return batch.binding.copy_outputs_to_cpu()[0]


def batches_of(once):
    """The batches that a function of `region_timed` has bound."""
    cells = dict(zip(once.__code__.co_freevars, once.__closure__, strict=True))
    return cells["batches"].cell_contents


TURNS = [X, -X, 2 * X]


@pytest.mark.parametrize("transfers", [False, True])
def test_each_batch_in_turn_is_computed_from_its_own_inputs(simulated, transfers):
    runner, clock = simulated
    assert isinstance(runner, RegionTimed)
    expected = [runner.run({"x": x})["y"] for x in TURNS]
    once = runner.region_timed([{"x": x.copy()} for x in TURNS], transfers=transfers, wait="spin")
    blocks = set(clock.blocks)
    for index in (0, 1, 2, 2, 0, 1):
        for sink, _ in batches_of(once)[index].sinks:
            sink[...] = 0
        times = once(index)()
        copied = 101_000 if transfers else None
        assert times == RegionTimes(gpu_compute=1000, enqueue=times.enqueue, h2d=copied, d2h=copied)
        assert times.enqueue > 0
        np.testing.assert_array_equal(read(batches_of(once)[index]), expected[index])
    assert set(clock.blocks) == blocks
    assert len(blocks) == (1 + 3 + 2 if transfers else 1)
    del once
    assert clock.blocks == {}
    np.testing.assert_array_equal(runner.run({"x": X})["y"], expected[0])


@pytest.mark.parametrize("transfers", [False, True])
@pytest.mark.parametrize("wait", ["spin", "block"])
def test_events_are_asked_only_after_the_call_returned(simulated, transfers, wait):
    runner, clock = simulated
    once = runner.region_timed([{"x": x} for x in TURNS], transfers=transfers, wait=wait)
    assert clock.queries == 0
    unread = once(1)
    assert clock.queries == 0
    assert unread().gpu_compute == 1000
    assert clock.queries == (3 if transfers else 1)
    runner.close()
    with pytest.raises(RunError, match="closed"):
        unread()


@pytest.fixture
def picking(tmp_path):
    """A graph with an output that has as many columns as values of `y` are above 0."""
    extra = [
        helper.make_node("Relu", ["y"], ["p"], name="p"),
        helper.make_node("NonZero", ["p"], ["z"], name="nonzero"),
    ]
    path = write_net(
        tmp_path / "picking.onnx",
        extra=extra,
        outputs=[helper.make_tensor_value_info("z", TensorProto.INT64, [2, None])],
    )
    clock = CountingMemory()
    with OnTheCpu(path, spec=SPEC, precision="fp32", options=SPEC.engines[0].options, device_memory=clock) as runner:
        yield runner, clock


MANY = [RANDOM.standard_normal(X.shape).astype(np.float32) for _ in range(64)]


@pytest.mark.parametrize("transfers", [False, True])
def test_all_batches_leave_an_output_in_one_buffer_large_enough_for_each(picking, transfers):
    runner, clock = picking
    expected = [runner.run({"x": x}) for x in MANY]
    largest = max(each["z"].nbytes for each in expected)
    assert len({each["z"].shape for each in expected}) > 1
    once = runner.region_timed([{"x": x} for x in MANY], transfers=transfers, wait="spin")
    outputs = expected[0]["y"].nbytes + largest
    held = sum(block.nbytes for block in clock.blocks.values())
    assert held == (65 * X.nbytes + 2 * outputs if transfers else outputs)
    batches = batches_of(once)
    for index in (0, 1, 63, 2, 1):
        once(index)
        found = batches[index].binding.copy_outputs_to_cpu()
        if transfers:
            sinks = [sink for sink, _ in batches[index].sinks]
            found = [sinks[0].view(np.float32).reshape(2, 10), sinks[1].view(np.int64).reshape(2, -1)]
        for array, name in zip(found, ("y", "z"), strict=True):
            np.testing.assert_array_equal(array, expected[index][name])


def addresses(call):
    """Where the outputs of a function of `timed` lie."""
    cells = dict(zip(call.__code__.co_freevars, call.__closure__, strict=True))
    return [value.data_ptr() for value in cells["binding"].cell_contents.get_outputs()]


def test_timed_calls_share_their_outputs_on_the_gpu_runner_and_on_the_cpu(simulated, net):
    runner, _ = simulated
    with OnnxRuntimeRunner(net, spec=SPEC) as host:
        for each in (runner, host):
            calls = [each.timed({"x": x}) for x in (*TURNS, X[:1])]
            for _ in range(2):
                for call in calls:
                    call()
            one, *others, single = [addresses(call) for call in calls]
            assert others == [one, one]
            assert single != one
            np.testing.assert_allclose(each.run({"x": X})["y"], host.run({"x": X})["y"])


@pytest.mark.parametrize("transfers", [False, True])
def test_an_output_on_another_device_is_an_error(simulated, monkeypatch, transfers):
    runner, clock = simulated
    feeds = [{"x": x} for x in TURNS]
    monkeypatch.setattr(onnxruntime.OrtValue, "device_name", lambda _: "webgpu")
    with pytest.raises(RunError, match="output 'y' lies on 'webgpu'; its copy can be timed from 'cpu' alone"):
        runner.region_timed(feeds, transfers=transfers, wait="spin")
    assert clock.blocks == {}


def test_an_output_on_the_host_is_left_in_one_array_and_not_copied(simulated):
    runner, _ = simulated
    clock = CountingMemory()
    own = Buffers(clock)
    made = [_Made("y", "cpu", np.float32, (rows, 10), rows * 40) for rows in (2, 4, 1)]
    runner._device = "cuda"
    address, host = runner._sink(made, own, transfers=True)
    assert host is None
    assert list(clock.blocks) == [address]
    assert clock.blocks[address].nbytes == 160
    with pytest.raises(RunError, match="output 'y' lies on cpu or cuda, by batch"):
        runner._sink([*made, _Made("y", "cuda", np.float32, (1, 10), 40)], own, transfers=True)


def test_host_sleeps_only_where_it_is_asked_to_block(simulated):
    runner, clock = simulated
    spin = runner.region_timed([{"x": X}], transfers=True, wait="spin")
    assert clock.slept == 0
    runner.region_timed([{"x": X}], transfers=True, wait="block")(0)
    slept = clock.slept
    assert slept > 0
    spin(0)
    assert clock.slept == slept


def test_batches_that_cannot_take_turns_are_refused(simulated):
    runner, clock = simulated
    with pytest.raises(RunError, match=r"input 'x' is \[2, 3, 16, 16\] in batch 0 and \[1, 3, 16, 16\] in batch 1"):
        runner.region_timed([{"x": X}, {"x": X[:1]}], transfers=True, wait="spin")
    with pytest.raises(RunError, match="there is no batch to time"):
        runner.region_timed([], transfers=False, wait="spin")
    with pytest.raises(RunError, match="missing"):
        runner.region_timed([{}], transfers=True, wait="spin")
    assert clock.blocks == {}


def test_timing_on_the_device_needs_a_library_for_events(net, monkeypatch):
    monkeypatch.setattr("gate.engines.onnxruntime.gpu._installed_memory", lambda: None)
    with (
        OnTheCpu(net, spec=SPEC, precision="fp32", options=SPEC.engines[0].options) as runner,
        pytest.raises(BackendUnavailable, match="timing on the device needs CUDA events"),
    ):
        runner.region_timed([{"x": X}], transfers=True, wait="spin")


def test_outputs_that_did_not_come_to_lie_on_the_device_are_arrays(simulated, net):
    runner, _ = simulated
    assert isinstance(runner, OutputsOnDevice)
    for x in (X, -X, X[:1]):
        left = runner.run_to_device({"x": x})
        np.testing.assert_array_equal(left["y"], runner.run({"x": x})["y"])
    with OnnxRuntimeRunner(net, spec=SPEC) as host:
        assert not isinstance(host, OutputsOnDevice)


class ValueOnDevice:
    """An OrtValue on a GPU."""

    def device_name(self):
        return "cuda"

    def data_ptr(self):
        return 4096

    def shape(self):
        return [2, 10]


def test_an_output_on_the_device_is_described_where_it_lies():
    current = True
    left = _left_by(ValueOnDevice(), "float16", is_current=lambda: current)
    assert left.__cuda_array_interface__ == {
        "shape": (2, 10), "typestr": "<f2", "data": (4096, False), "strides": None, "version": 3, "stream": None,
    }  # fmt: skip
    current = False
    with pytest.raises(RunError, match="the output is gone"):
        _ = left.__cuda_array_interface__


def test_closing_gives_stream_and_events_back_once(simulated):
    runner, clock = simulated
    once, wall = engine_alone(runner, {"x": X}), runner.timed({"x": X})
    regions = runner.region_timed([{"x": X}], transfers=True, wait="spin")
    assert len(clock.blocks) == 1 + 4
    runner.close()
    runner.close()
    assert clock.calls == ["stream", "drop 100", "drop 101", "drop 102", "drop 103", "close 5"]
    assert clock.blocks == {}
    for call in (once, wall, lambda: regions(0), lambda: runner.run({"x": X}), lambda: runner.run_to_device({"x": X})):
        with pytest.raises(RunError, match="closed"):
            call()


def test_wrong_feed_is_an_error_on_the_device_too(simulated):
    runner, _ = simulated
    for call in (runner.timed, lambda feed: engine_alone(runner, feed), runner.run_to_device):
        with pytest.raises(RunError, match="outside the profile's 1 to 4"):
            call({"x": np.zeros((5, 3, 16, 16), np.float32)})
        with pytest.raises(RunError, match="missing"):
            call({})


def test_stream_is_given_back_where_the_graph_is_refused(tmp_path):
    clock = CountingMemory()
    (tmp_path / "a.onnx").write_bytes(b"\xff no graph")
    make = functools.partial(OnTheCpu, spec=SPEC, precision="fp32", options=EngineOptions(), device_memory=clock)
    with pytest.raises(RunError, match="no such file"):
        make(tmp_path / "b.onnx")
    with pytest.raises(Exception, match="Load model"):
        make(tmp_path / "a.onnx")
    assert clock.calls == ["stream", "close 5"] * 2


def folders(runner, path, options):
    runner.told = {}
    return runner._cache_options(path, options)


def test_compiled_engines_are_kept_by_digest(simulated, net, tmp_path):
    runner, _ = simulated
    options = EngineOptions(
        provider="tensorrt",
        provider_options={"trt_engine_cache_path": str(tmp_path / "e"), "trt_timing_cache_path": str(tmp_path / "t")},
    )
    first = folders(runner, net, options)
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(net.read_bytes())
    assert folders(runner, copy, options) == first
    assert Path(first["trt_engine_cache_path"]).parent == tmp_path / "e"
    assert Path(first["trt_timing_cache_path"]).parent == tmp_path / "t"
    other = write_net(tmp_path / "other.onnx", extra=[helper.make_node("Neg", ["y"], ["z"], name="neg")])
    again = folders(runner, other, options)
    assert again["trt_engine_cache_path"] != first["trt_engine_cache_path"]
    assert again["trt_timing_cache_path"] == first["trt_timing_cache_path"]


def test_engines_that_nobody_keeps_are_one_file_and_one_process(simulated, net, tmp_path):
    runner, _ = simulated
    options = EngineOptions(provider="tensorrt")
    first = Path(folders(runner, net, options)["trt_engine_cache_path"])
    assert first.parent == _process_folder()
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(net.read_bytes())
    assert Path(folders(runner, copy, options)["trt_engine_cache_path"]) != first
    assert Path(folders(runner, net, options)["trt_engine_cache_path"]) == first


def test_engine_compiled_as_a_proof_is_thrown_away(net):
    options = EngineOptions(provider="tensorrt")
    with OnTheCpu(
        net, spec=SPEC, precision="fp32", options=options, keep=False, device_memory=CountingMemory()
    ) as runner:
        folder = Path(folders(runner, net, options)["trt_engine_cache_path"])
        assert folder.is_dir()
        assert folder.parent != _process_folder()
    assert not folder.parent.exists()


def test_build_without_the_provider_is_an_error(net, tmp_path):
    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("ONNX Runtime has CUDA here")
    with pytest.raises(BackendUnavailable, match="has no CUDAExecutionProvider"):
        backend("onnxruntime").build(onnx=net, out=tmp_path / "out" / "model.onnx", spec=SPEC, engine=SPEC.engines[0])
    assert not (tmp_path / "out").exists()


def require_cuda_provider():
    if CUDA not in onnxruntime.get_available_providers():
        pytest.fail(
            "a GPU is here, and the installed ONNX Runtime has no CUDAExecutionProvider: install onnxruntime-gpu"
        )


@pytest.mark.gpu
def test_cuda_runs_every_node_that_computes_and_agrees_with_the_cpu(net, tmp_path):
    require_cuda_provider()
    ours = backend("onnxruntime")
    engine = SPEC.engines[0]
    ours.require_supported(engine)
    assert ours.runs_here(engine) is Evidence.DEVICE
    out = tmp_path / "out" / "model.onnx"
    record = ours.build(onnx=net, out=out, spec=SPEC, engine=engine)
    assert record.options["provider"] == CUDA
    assert record.options["provider_options"] == {"use_tf32": "0"}
    assert record.options["nodes_per_provider"][CUDA] >= 4
    with OnnxRuntimeRunner(net, spec=SPEC) as host:
        expected = host.run({"x": X})["y"]
    with ours.open(out, spec=SPEC, engine=engine) as runner:
        np.testing.assert_allclose(runner.run({"x": X})["y"], expected, rtol=1e-5, atol=1e-5)
        runner.timed({"x": X})()
        times = [engine_alone(runner, {"x": X})() for _ in range(3)]
        assert not np.allclose(runner.run({"x": -X})["y"], expected)
    assert all(0 < each < 1_000_000_000 for each in times)


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_regions_of_batches_in_turn_on_the_gpu(net, provider):
    require_cuda_provider()
    if provider == "tensorrt" and not (
        importlib.util.find_spec("tensorrt_libs") or ctypes.util.find_library("nvinfer")
    ):
        pytest.skip("TensorRT is not installed")
    spec = make_spec("tf32", provider=provider)
    feeds = [{"x": x} for x in TURNS]
    with backend("onnxruntime").open(net, spec=spec, engine=spec.engines[0]) as runner:
        expected = [runner.run(feed)["y"] for feed in feeds]
        for wait in ("spin", "block"):
            once = runner.region_timed(feeds, transfers=True, wait=wait)
            for turn in range(12):
                batch = batches_of(once)[turn % 3]
                batch.sinks[0][0][...] = 0
                times = once(turn % 3)()
                assert min(times.h2d, times.gpu_compute, times.d2h, times.enqueue) > 0
                np.testing.assert_allclose(read(batch), expected[turn % 3], rtol=1e-3, atol=1e-3)
        once = runner.region_timed(feeds, transfers=False, wait="spin")
        for turn in range(6):
            times = once(turn % 3)()
            assert min(times.gpu_compute, times.enqueue) > 0
            assert (times.h2d, times.d2h) == (None, None)
            np.testing.assert_allclose(read(batches_of(once)[turn % 3]), expected[turn % 3], rtol=1e-3, atol=1e-3)
        call = engine_alone(runner, feeds[0])
        pairs = np.array([(call(), once(turn % 3)().gpu_compute) for turn in range(200)])
        alone, turns = np.median(pairs, axis=0)
        assert turns == pytest.approx(alone, rel=0.1)
        np.testing.assert_array_equal(runner.run(feeds[0])["y"], expected[0])


@pytest.mark.gpu
def test_outputs_that_stay_on_the_gpu_are_those_of_the_host(net):
    require_cuda_provider()
    if not has_cuda():
        pytest.skip("reading them takes PyTorch with CUDA")
    with backend("onnxruntime").open(net, spec=SPEC, engine=SPEC.engines[0]) as runner:
        for x in (X, -X, X[:1], X):
            before = runner.run_to_device({"x": -x})["y"]
            left = runner.run_to_device({"x": x})["y"]
            assert not isinstance(left, np.ndarray)
            with pytest.raises(RunError, match="the output is gone"):
                _ = before.__cuda_array_interface__
            np.testing.assert_array_equal(host_array(left), runner.run({"x": x})["y"])


@pytest.mark.gpu
def test_tf32_rounds_more_than_fp32_does(net):
    require_cuda_provider()
    with OnnxRuntimeRunner(net, spec=SPEC) as host:
        expected = host.run({"x": X})["y"]
    errors = {}
    for precision in ("fp32", "tf32"):
        spec = make_spec(precision)
        with backend("onnxruntime").open(net, spec=spec, engine=spec.engines[0]) as runner:
            errors[precision] = np.abs(runner.run({"x": X})["y"] - expected).max()
    assert errors["fp32"] < errors["tf32"] < 0.05


@pytest.mark.gpu
def test_node_without_a_cuda_kernel_is_a_failure(tmp_path):
    require_cuda_provider()
    half = helper.make_node("Det", ["d"], ["e"], name="determinant")
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["d"], name="relu"), half],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 16, 16])],
        [helper.make_tensor_value_info("e", TensorProto.FLOAT, ["n", 3])],
    )
    path = tmp_path / "a.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    with pytest.raises(BuildError, match=r"1 of 2 nodes \(50.0%\) do not run on CUDAExecutionProvider: determinant"):
        backend("onnxruntime").build(onnx=path, out=tmp_path / "b.onnx", spec=SPEC, engine=SPEC.engines[0])
    spec = make_spec(cpu_nodes_at_most=0.5)
    with backend("onnxruntime").open(path, spec=spec, engine=spec.engines[0]) as runner:
        assert runner.run({"x": X})["e"].shape == (2, 3)


@pytest.mark.gpu
def test_tensorrt_provider_runs_the_graph_or_names_the_missing_library(net):
    require_cuda_provider()
    spec = make_spec("tf32", provider="tensorrt")
    if importlib.util.find_spec("tensorrt_libs") or ctypes.util.find_library("nvinfer"):
        with backend("onnxruntime").open(net, spec=spec, engine=spec.engines[0]) as runner:
            assert runner.counts["TensorrtExecutionProvider"] >= 4
            assert engine_alone(runner, {"x": X})() > 0
        return
    with pytest.raises(BackendUnavailable, match=r"did not load TensorrtExecutionProvider.*libnvinfer"):
        backend("onnxruntime").open(net, spec=spec, engine=spec.engines[0])
