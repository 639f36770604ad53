"""A graph on a GPU. Where there is none, the runner's own logic runs on the CPU provider, with a clock that counts."""

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
from gate.engines.interface import GpuTimed, OutputsOnDevice
from gate.engines.onnxruntime import OnnxRuntimeRunner
from gate.engines.onnxruntime.gpu import OnnxRuntimeGpuRunner, _left_by, _process_folder
from gate.engines.onnxruntime.placement import RECORD_ENTRY, placed_nodes, require_placement
from gate.errors import BackendUnavailable, BuildError, RunError
from gate.spec import EngineOptions, GateSpec
from gate.verdict import Evidence

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
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


def write_net(path, *, extra=()):
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
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])],
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
    """Streams and events whose time is how often something was recorded."""

    def __init__(self):
        self.calls = []
        self._ticks = 0
        self._times = {}

    def stream(self):
        self.calls.append("stream")
        return 5

    def event(self):
        self._times[len(self._times) + 100] = None
        return len(self._times) + 99

    def record(self, event, stream):
        assert stream == 5
        self._ticks += 1
        self._times[event] = self._ticks * 1000

    def elapsed_ns(self, start, end):
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
    assert isinstance(simulated[0], GpuTimed)
    with OnnxRuntimeRunner(net, spec=SPEC) as runner:
        assert not isinstance(runner, GpuTimed)


def test_simulated_device_gives_time_between_two_events(simulated):
    runner, _ = simulated
    once = runner.gpu_timed({"x": X})
    assert once() == 1000
    assert once() == 1000
    runner.timed({"x": X})()
    assert runner.run({"x": X})["y"].shape == (2, 10)


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
    once, wall = runner.gpu_timed({"x": X}), runner.timed({"x": X})
    runner.close()
    runner.close()
    assert clock.calls == ["stream", "drop 100", "drop 101", "close 5"]
    for call in (once, wall, lambda: runner.run({"x": X}), lambda: runner.run_to_device({"x": X})):
        with pytest.raises(RunError, match="closed"):
            call()


def test_wrong_feed_is_an_error_on_the_device_too(simulated):
    runner, _ = simulated
    for call in (runner.timed, runner.gpu_timed, runner.run_to_device):
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
        times = [runner.gpu_timed({"x": X})() for _ in range(3)]
        assert not np.allclose(runner.run({"x": -X})["y"], expected)
    assert all(0 < each < 1_000_000_000 for each in times)


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
            assert runner.gpu_timed({"x": X})() > 0
        return
    with pytest.raises(BackendUnavailable, match=r"did not load TensorrtExecutionProvider.*libnvinfer"):
        backend("onnxruntime").open(net, spec=spec, engine=spec.engines[0])
