"""TensorRT-RTX compiles here for real. What only TensorRT 8.6 and 10 have runs on a simulator, and for real on a GPU."""

import ctypes
import hashlib
import shutil
import signal
import struct
import subprocess
import sys
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gate.device import gpu
from gate.engines import backend
from gate.engines.interface import Resources
from gate.engines.tensorrt import api
from gate.engines.tensorrt import build as build_module
from gate.engines.tensorrt.build import build_plan
from gate.engines.tensorrt.calibrate import CacheKey, read_cache
from gate.errors import BuildError
from gate.spec import GateSpec
from gate.verdict import Evidence

WEIGHT = np.arange(6, dtype=np.float32).reshape(3, 2)
PROFILES = [{"n": {"min": 1, "opt": 1, "max": 1}}, {"n": {"min": 2, "opt": 3, "max": 4}}]


def make_spec(backend_name="tensorrt_rtx", precision="fp32", **engine):
    return msgspec.convert(
        {
            "schema": 1,
            "model": {"id": "m", "factory": "a:b"},
            "inputs": {"x": {"dtype": "float32", "shape": ["n", 3], "axes": {"n": {"min": 1, "opt": 2, "max": 4}}}},
            "data": {"source": "a:b", "samples": 1},
            "engine": [{"name": "e", "backend": backend_name, "precision": precision, "parity": {}, **engine}],
        },
        GateSpec,
    )


def write_graph(path, nodes=None, *, external=False, name="x", outputs=("y",), more=(), shape=("n", 3)):
    graph = helper.make_graph(
        nodes or [helper.make_node("MatMul", [name, "w"], ["y"], name="product")],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info(each, TensorProto.FLOAT, None) for each in outputs],
        [numpy_helper.from_array(WEIGHT, "w"), *more],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(model, path, save_as_external_data=external, location="w.data", size_threshold=0)
    return path


def direct(tmp_path, path, spec, *, name="tensorrt_rtx", runs_here=False, **resources):
    """As the backend does, past its question for a GPU."""
    return build_plan(
        name,
        onnx=path,
        out=tmp_path / "model.plan",
        spec=spec,
        engine=spec.engines[0],
        resources=Resources(**resources),
        runs_here=runs_here,
    )


def build(tmp_path, path, spec=None):
    spec = spec or make_spec()
    return backend("tensorrt_rtx").build(onnx=path, out=tmp_path / "model.plan", spec=spec, engine=spec.engines[0])


def test_graph_is_compiled_and_its_layers_listed(tmp_path):
    record = build(tmp_path, write_graph(tmp_path / "a.onnx"), make_spec(options={"workspace_mib": 64}))
    assert (tmp_path / "model.plan").stat().st_size > 1000
    assert [layer.precision for layer in record.layers if layer.type == "MATRIX_MULTIPLY"] == ["fp32"]
    assert record.options["tf32"] is False
    assert record.options["strongly_typed"] is True
    assert record.backend_version == backend("tensorrt_rtx").version()
    assert record.command == (
        "tensorrt_rtx --onnx=a.onnx --saveEngine=model.plan --skipInference --minShapes=x:1x3 --optShapes=x:2x3 --maxShapes=x:4x3 "
        "--memPoolSize=workspace:64"
    )


def test_tf32_is_on_only_where_asked(tmp_path):
    record = build(tmp_path, write_graph(tmp_path / "a.onnx"), make_spec(precision="tf32"))
    assert record.options["tf32"] is True
    assert [layer.precision for layer in record.layers if layer.type == "MATRIX_MULTIPLY"] == ["tf32"]


def test_external_data_is_read(tmp_path):
    build(tmp_path, write_graph(tmp_path / "a.onnx", external=True))
    assert (tmp_path / "model.plan").exists()


def test_several_outputs_are_compiled(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="product"),
        helper.make_node("Relu", ["y"], ["z"], name="relu"),
    ]
    record = build(tmp_path, write_graph(tmp_path / "a.onnx", nodes, outputs=("y", "z")))
    assert {layer.type for layer in record.layers} >= {"MATRIX_MULTIPLY", "ACTIVATION"}


def test_operator_that_the_parser_does_not_know_is_named(tmp_path):
    path = write_graph(tmp_path / "a.onnx", [helper.make_node("Nonsense", ["x"], ["y"], name="odd")])
    with pytest.raises(BuildError, match="cannot parse the graph") as caught:
        build(tmp_path, path)
    assert "odd" in (caught.value.node or "")
    assert "Nonsense" in str(caught.value)
    assert caught.value.log
    assert not (tmp_path / "model.plan").exists()


def test_int32_bias_that_tensorrt_refuses_is_a_build_error(tmp_path):
    nodes = [
        helper.make_node("DequantizeLinear", ["b", "s"], ["bias"], name="bias"),
        helper.make_node("Gemm", ["x", "w", "bias"], ["y"], name="product"),
    ]
    more = [
        numpy_helper.from_array(np.array([1, 2], np.int32), "b"),
        numpy_helper.from_array(np.array(0.5, np.float32), "s"),
    ]
    with pytest.raises(BuildError, match="bias"):
        build(tmp_path, write_graph(tmp_path / "a.onnx", nodes, more=more))


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "no input 'x'"), (b"\xff no graph", "tensorrt_rtx cannot parse")]
)
def test_file_that_is_no_onnx_is_a_build_error(tmp_path, content, message):
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(BuildError, match=message):
        build(tmp_path, tmp_path / "a.onnx")


def test_missing_file_is_a_build_error(tmp_path):
    with pytest.raises(BuildError, match="no such file"):
        build(tmp_path, tmp_path / "a.onnx")


def test_input_of_another_name_is_a_build_error(tmp_path):
    with pytest.raises(BuildError, match="no input 'x'.*an input 'image'"):
        build(tmp_path, write_graph(tmp_path / "a.onnx", name="image"))


def test_nothing_is_printed(tmp_path, capfd):
    build(tmp_path, write_graph(tmp_path / "a.onnx"))
    assert capfd.readouterr() == ("", "")


def test_every_parse_error_is_told(tmp_path):
    nodes = [
        helper.make_node("Nonsense", ["x"], ["a"], name="odd"),
        helper.make_node("Folly", ["a"], ["y"], name="odder"),
    ]
    with pytest.raises(BuildError, match=r"cannot parse the graph: .*1 more error") as caught:
        build(tmp_path, write_graph(tmp_path / "a.onnx", nodes))
    told = f"{caught.value.node} {caught.value.log}"
    assert "odd (Nonsense)" in told
    assert "odder (Folly)" in told


def test_node_that_the_parser_only_numbers_is_looked_up(tmp_path):
    path = write_graph(tmp_path / "a.onnx", [helper.make_node("Nonsense", ["x"], ["y"], name="odd")])
    old = SimpleNamespace(node=lambda: 0, desc=lambda: "no such operator")
    assert build_module._node(old, path) == "odd (Nonsense)"
    assert build_module._node(SimpleNamespace(node=lambda: 7), path) == "node 7"
    assert build_module._node(SimpleNamespace(node=lambda: -1), path) is None


def test_several_profiles_are_compiled_and_recorded(tmp_path):
    record = build(tmp_path, write_graph(tmp_path / "a.onnx"), make_spec(options={"profiles": PROFILES}))
    assert record.options["profiles"] == [
        {"x": {"min": [1, 3], "opt": [1, 3], "max": [1, 3]}},
        {"x": {"min": [2, 3], "opt": [3, 3], "max": [4, 3]}},
    ]
    assert record.profile == {"x": {"min": [1, 3], "opt": [2, 3], "max": [4, 3]}}
    assert "--profile=1 --minShapes=x:2x3 --optShapes=x:3x3 --maxShapes=x:4x3" in record.command


def test_options_are_recorded_with_their_defaults(tmp_path):
    options = build(tmp_path, write_graph(tmp_path / "a.onnx")).options
    assert options["typing"] == "strong"
    assert options["builder_flags"] == []
    assert options["builder_optimization_level"] == 3
    assert options["workspace_mib"] > 0
    assert options["hardware_compatible"] == "none"
    assert options["version_compatible"] is options["strip_weights"] is options["cuda_graph"] is False
    assert options["timing_cache"] is options["calibrator"] is options["calibration_cache"] is None
    assert options["plugins"] == options["layer_precisions"] == {}
    assert set(options["tactic_sources"]) <= {"edge_mask_convolutions", "jit_convolutions"}


def test_tf32_beside_a_lower_precision_is_on_only_where_asked(tmp_path):
    path = write_graph(tmp_path / "a.onnx")
    on = direct(tmp_path, path, make_spec(precision="fp16", options={"tf32": True}))
    off = direct(tmp_path, path, make_spec(precision="fp16"))
    assert (on.options["tf32"], off.options["tf32"]) == (True, False)
    assert [layer.precision for layer in on.layers if layer.type == "MATRIX_MULTIPLY"] == ["tf32"]


@pytest.mark.skipif(gpu() is not None, reason="there is a GPU here")
def test_weights_that_cannot_be_stripped_without_a_gpu_say_so(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "big"], ["y"], name="product")]
    more = [numpy_helper.from_array(np.random.default_rng(0).standard_normal((3, 20000)).astype(np.float32), "big")]
    path = write_graph(tmp_path / "a.onnx", nodes, more=more)
    with pytest.raises(BuildError, match="cannot compile the graph") as caught:
        build(tmp_path, path, make_spec(options={"strip_weights": True}))
    assert "strips weights only where there is a GPU" in caught.value.hint


def test_version_compatible_plan_without_the_lean_runtime_says_what_to_install(tmp_path):
    spec = make_spec(options={"version_compatible": True})
    with pytest.raises(BuildError, match="cannot compile the graph") as caught:
        direct(tmp_path, write_graph(tmp_path / "a.onnx"), spec)
    assert "pip install tensorrt-lean==" in caught.value.hint


@pytest.mark.filterwarnings("ignore:.*iming cache:DeprecationWarning")
def test_timing_cache_is_written_and_a_broken_one_replaced(tmp_path):
    cache = tmp_path / "timing.cache"
    spec = make_spec(options={"timing_cache": str(cache)})
    record = direct(tmp_path, write_graph(tmp_path / "a.onnx"), spec)
    assert record.digests == {"timing_cache": hashlib.sha256(cache.read_bytes()).hexdigest()}
    assert not any("timing cache" in line for line in record.log)
    cache.write_bytes(b"garbage")
    record = direct(tmp_path, tmp_path / "a.onnx", spec)
    assert any("timing.cache is not usable" in line for line in record.log)
    assert cache.read_bytes() != b"garbage"
    assert record.options["timing_cache"] == "timing.cache"


def test_progress_is_told(tmp_path):
    told = []
    direct(
        tmp_path, write_graph(tmp_path / "a.onnx"), make_spec(), progress=lambda name, done: told.append((name, done))
    )
    assert ("Building engine", 0.0) in told
    assert ("Building engine", 1.0) in told
    assert all(done is not None and 0 <= done <= 1 for _, done in told)


def test_ctrl_c_stops_a_build(tmp_path):
    def interrupt(name, done):
        if done:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        direct(tmp_path, write_graph(tmp_path / "a.onnx"), make_spec(), progress=interrupt)
    assert not (tmp_path / "model.plan").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_second_ctrl_c_ends_the_process(tmp_path):
    code = (
        "import signal\n"
        "from gate.engines.tensorrt.log import Interruption\n"
        "with Interruption().noting_ctrl_c():\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    print('noted', flush=True)\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    print('still here', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "noted\n")


def test_exception_in_a_progress_callback_stops_a_build(tmp_path):
    def fail(name, done):
        raise OSError("the terminal is gone")

    with pytest.raises(OSError, match="the terminal is gone"):
        direct(tmp_path, write_graph(tmp_path / "a.onnx"), make_spec(), progress=fail)
    assert not (tmp_path / "model.plan").exists()


def test_missing_plugin_library_is_named(tmp_path):
    spec = make_spec(options={"plugins": [str(tmp_path / "gone.so")]})
    with pytest.raises(BuildError, match=r"gone\.so: the plugin library cannot be read: No such file"):
        direct(tmp_path, write_graph(tmp_path / "a.onnx"), spec)


def test_plugin_library_that_cannot_be_loaded_is_named(tmp_path):
    (tmp_path / "bad.so").write_bytes(b"no library")
    spec = make_spec(options={"plugins": [str(tmp_path / "bad.so")]})
    with pytest.raises(BuildError, match=r"bad\.so: the plugin library cannot be loaded: .*too short"):
        direct(tmp_path, write_graph(tmp_path / "a.onnx"), spec)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_plugin_library_is_loaded_and_digested(tmp_path):
    (tmp_path / "p.c").write_text("int gate_test_plugin(void) { return 7; }\n", encoding="utf-8")
    library = tmp_path / "p.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "p.c")], check=True)
    spec = make_spec(options={"plugins": [str(library)]})
    for _ in range(2):  # a second build in the same process finds it loaded
        record = direct(tmp_path, write_graph(tmp_path / "a.onnx"), spec)
        assert record.digests == {"p.so": hashlib.sha256(library.read_bytes()).hexdigest()}
        assert record.options["plugins"] == {"p.so": "static"}
    assert ctypes.CDLL(None).gate_test_plugin() == 7


def test_shape_tensor_input_is_refused(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "s"], ["y"], name="reshape")],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3]),
            helper.make_tensor_value_info("s", TensorProto.INT64, [2]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    onnx.save_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "a.onnx"
    )
    with pytest.raises(BuildError, match="'s' is a shape tensor"):
        build(tmp_path, tmp_path / "a.onnx")


# What follows needs the API of weak typing, which is simulated.


def enum(name, *members):
    return IntEnum(name, {member: index for index, member in enumerate(members)})


DTYPES = enum("DataType", "FLOAT", "HALF", "INT8", "INT32", "BOOL", "BF16")


class Tensor:
    def __init__(self, name, shape=(-1, 3), kind=DTYPES.FLOAT):
        self.name, self.shape, self.dtype = name, shape, kind
        self.is_shape_tensor = self.is_network_output = False


class SimulatedLayer:
    def __init__(self, node, tensors):
        self.name = node.name
        kind = {"QuantizeLinear": "QUANTIZE", "Shape": "SHAPE", "MatMul": "MATRIX_MULTIPLY"}.get(node.op_type, "ANY")
        self.type = SimpleNamespace(name=kind)
        self.inputs = [tensors.get(each) for each in node.input if each in tensors]
        self.outputs = [tensors.setdefault(each, Tensor(each)) for each in node.output]
        self.num_inputs, self.num_outputs = len(self.inputs), len(self.outputs)
        self.precision, self.output_types = None, {}

    def get_input(self, index):
        return self.inputs[index]

    def get_output(self, index):
        return self.outputs[index]

    def set_output_type(self, index, kind):
        self.output_types[index] = kind


class SimulatedConfig:
    def __init__(self, sources):
        self.set, self.profiles, self.limits = {"TF32"}, [], {}
        self.builder_optimization_level, self.int8_calibrator = 3, None
        self.sources, self.calibration_profile, self.timing = sources, None, b""

    def set_flag(self, flag):
        self.set.add(flag.name)

    def clear_flag(self, flag):
        self.set.discard(flag.name)

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def set_calibration_profile(self, profile):
        self.calibration_profile = profile
        return True

    def set_memory_pool_limit(self, pool, size):
        self.limits[pool] = size

    def get_memory_pool_limit(self, pool):
        return self.limits.get(pool, 1 << 30)

    def get_tactic_sources(self):
        return self.sources

    def set_tactic_sources(self, bits):
        self.sources = bits
        return True

    def create_timing_cache(self, data):
        if data and not data.startswith(b"timing"):
            return None
        return SimpleNamespace(data=data, serialize=lambda: b"timing more")

    def set_timing_cache(self, cache, ignore):
        self.timing = cache
        return cache.data != b"timing of another version"

    def get_timing_cache(self):
        return self.timing


class SimulatedMemory:
    """Device memory is a dict of bytes."""

    def __init__(self):
        self.blocks, self.closed = {}, False

    def stream(self):
        return 1

    def allocate(self, nbytes):
        address = 1000 + len(self.blocks)
        self.blocks[address] = b""
        return address

    def free(self, address):
        del self.blocks[address]

    def to_device(self, address, array, stream):
        self.blocks[address] = array.tobytes()

    def synchronize(self, stream):
        pass

    def close(self, stream):
        self.closed = True


def simulate(monkeypatch, version="8.6.0"):
    """A module `tensorrt` whose builder records what it is told, and calibrates to the largest absolute value."""
    old = version.startswith("8.")
    trt, memory = ModuleType("tensorrt"), SimulatedMemory()
    trt.__version__ = version
    trt.seen = SimpleNamespace(config=None, network=None, batches=[], memory=memory)
    flags = ["FP16", "INT8", "TF32", "OBEY_PRECISION_CONSTRAINTS", "VERSION_COMPATIBLE"]
    trt.BuilderFlag = enum("BuilderFlag", *flags, *([] if old else ["BF16", "STRIP_PLAN"]))
    trt.NetworkDefinitionCreationFlag = enum("N", "EXPLICIT_BATCH", *([] if old else ["STRONGLY_TYPED"]))
    trt.TacticSource = enum("T", "CUBLAS", "CUBLAS_LT", "CUDNN", "EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
    trt.HardwareCompatibilityLevel = enum("H", "NONE", "AMPERE_PLUS")
    trt.ProfilingVerbosity = enum("P", "LAYER_NAMES_ONLY", "DETAILED")
    trt.MemoryPoolType = enum("M", "WORKSPACE")
    trt.DataType = DTYPES

    class Base:
        def __init__(self):
            self.ready = True

    class ILogger(Base):
        pass

    trt.ILogger = ILogger
    for name in api.CALIBRATORS.values():
        setattr(trt, name, type(name, (Base,), {}))

    class Network:
        def __init__(self, network_flags):
            self.flags, self.layers, self.inputs = network_flags, [], []

        num_layers = property(lambda self: len(self.layers))
        num_inputs = property(lambda self: len(self.inputs))

        def get_layer(self, index):
            return self.layers[index]

        def get_input(self, index):
            return self.inputs[index]

    class OnnxParser:
        num_errors = 0

        def __init__(self, network, logger):
            self.network = network

        def parse_from_file(self, path):
            graph = onnx.load(path).graph
            tensors = {each.name: Tensor(each.name) for each in graph.input}
            self.network.inputs = list(tensors.values())
            self.network.layers = [SimulatedLayer(node, tensors) for node in graph.node]
            for each in graph.output:
                tensors[each.name].is_network_output = True
            return True

    class Builder:
        def __init__(self, logger):
            self.logger = logger

        def create_network(self, network_flags):
            trt.seen.network = Network(network_flags)
            return trt.seen.network

        def create_builder_config(self):
            trt.seen.config = SimulatedConfig(0b11111 if old else 0b11000)
            return trt.seen.config

        def create_optimization_profile(self):
            shapes = {}
            return SimpleNamespace(shapes=shapes, set_shape=lambda name, *each: shapes.update({name: each}))

        def build_serialized_network(self, network, config):
            calibrator = config.int8_calibrator
            if calibrator is not None and calibrator.ready and calibrator.read_calibration_cache() is None:
                largest = 0.0
                while addresses := calibrator.get_batch([each.name for each in network.inputs]):
                    values = np.frombuffer(memory.blocks[addresses[0]], np.float32)
                    trt.seen.batches.append(values)
                    largest = max(largest, float(np.abs(values).max()))
                scale = struct.pack(">f", largest / 127).hex()
                calibrator.write_calibration_cache(f"TRT-8600-Simulated\nx: {scale}\n".encode())
            return b"plan"

    trt.OnnxParser, trt.Builder, trt.IBuilderConfig = OnnxParser, Builder, SimulatedConfig
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(api, "_DISTRIBUTIONS", {"tensorrt": (), "tensorrt_rtx": ()})
    monkeypatch.setattr(build_module, "memory", lambda: memory)
    return trt


CHAIN = [
    helper.make_node("MatMul", ["x", "w"], ["h"], name="/head/product"),
    helper.make_node("Shape", ["h"], ["s"], name="/head/shape"),
    helper.make_node("Relu", ["h"], ["y"], name="/tail/relu"),
]


def batches(*sizes, scale=1.0):
    rng = np.random.default_rng(0)
    made = [{"x": (rng.standard_normal((size, 3)) * scale).astype(np.float32)} for size in sizes]
    return lambda: iter(made)


def weak(tmp_path, precision="int8", *, sizes=(4, 3), sha="c" * 64, model="a" * 64, **options):
    spec = make_spec("tensorrt", precision, task={}, options={"typing": "weak", **options})
    path = write_graph(tmp_path / "a.onnx", CHAIN)
    if precision != "int8":
        return direct(tmp_path, path, spec, name="tensorrt")
    return direct(
        tmp_path,
        path,
        spec,
        name="tensorrt",
        calibration=batches(*sizes),
        calibration_sha256=sha,
        onnx_sha256=model,
    )


@pytest.mark.parametrize(
    ("version", "precision", "flags"),
    [
        ("8.6.0", "fp32", set()),
        ("8.6.0", "tf32", {"TF32"}),
        ("8.6.0", "fp16", {"FP16"}),
        ("10.13.0.35", "bf16", {"BF16"}),
        ("10.13.0.35", "int8", {"INT8", "FP16"}),
    ],
)
def test_weak_typing_sets_the_flags_of_the_precision(tmp_path, monkeypatch, version, precision, flags):
    trt = simulate(monkeypatch, version)
    record = weak(tmp_path, precision)
    assert trt.seen.config.set == flags
    assert trt.seen.network.flags == (1 if version.startswith("8") else 0)
    assert record.options["typing"] == "weak"
    assert set(record.options["builder_flags"]) == flags - {"TF32"}


def test_strong_typing_is_the_default_where_the_version_has_it(tmp_path, monkeypatch):
    trt = simulate(monkeypatch, "10.13.0.35")
    record = direct(tmp_path, write_graph(tmp_path / "a.onnx"), make_spec("tensorrt", "fp16"), name="tensorrt")
    assert trt.seen.network.flags == 1 << 1
    assert trt.seen.config.set == set()
    assert record.options["typing"] == "strong"
    assert "--stronglyTyped" in record.command


def test_lowered_graph_gets_the_flags_it_needs_on_8(tmp_path, monkeypatch):
    trt = simulate(monkeypatch)
    spec = make_spec("tensorrt", "int8", task={})
    record = direct(tmp_path, write_graph(tmp_path / "a.onnx"), spec, name="tensorrt")
    assert trt.seen.config.set == {"INT8", "FP16"}
    assert record.options["typing"] == "lowered"
    assert trt.seen.config.int8_calibrator is None


def test_tactic_sources_leave_out_cublas_and_cudnn_on_8(tmp_path, monkeypatch):
    trt = simulate(monkeypatch)
    record = weak(tmp_path, "fp16")
    assert trt.seen.config.sources == 0b11000
    assert record.options["tactic_sources"] == ["edge_mask_convolutions", "jit_convolutions"]
    assert "--tacticSources=-CUBLAS,-CUBLAS_LT,-CUDNN,+EDGE_MASK_CONVOLUTIONS,+JIT_CONVOLUTIONS" in record.command
    record = weak(tmp_path, "fp16", tactic_sources=["cudnn"])
    assert trt.seen.config.sources == 0b00100
    assert record.options["tactic_sources"] == ["cudnn"]


def test_tactic_sources_of_10_are_left_alone(tmp_path, monkeypatch):
    trt = simulate(monkeypatch, "10.13.0.35")
    record = weak(tmp_path, "fp16")
    assert trt.seen.config.sources == 0b11000
    assert "--tacticSources" not in record.command


def test_levels_and_limits_are_set(tmp_path, monkeypatch):
    trt = simulate(monkeypatch)
    weak(
        tmp_path,
        "fp16",
        workspace_mib=64,
        builder_optimization_level=1,
        hardware_compatible="ampere_plus",
        version_compatible=True,
    )
    config = trt.seen.config
    assert config.limits == {trt.MemoryPoolType.WORKSPACE: 64 << 20}
    assert config.builder_optimization_level == 1
    assert config.hardware_compatibility_level == trt.HardwareCompatibilityLevel.AMPERE_PLUS
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    assert config.set == {"FP16", "VERSION_COMPATIBLE"}


@pytest.mark.parametrize(
    ("content", "replaced"), [(b"timing", False), (b"junk", True), (b"timing of another version", True)]
)
def test_timing_cache_that_the_builder_refuses_is_noted(tmp_path, monkeypatch, content, replaced):
    simulate(monkeypatch)
    monkeypatch.setattr(build_module, "_CUDNN", "libc.so.6")
    cache = tmp_path / "t.cache"
    cache.write_bytes(content)
    record = weak(tmp_path, "fp16", timing_cache=str(cache))
    assert any("t.cache is not usable by tensorrt 8.6.0" in line for line in record.log) is replaced
    assert cache.read_bytes() == b"timing more"


def test_timing_cache_that_would_end_the_process_is_refused_before_the_build(tmp_path, monkeypatch):
    simulate(monkeypatch)
    monkeypatch.setattr(build_module, "_CUDNN", "libcudnn_that_is_not_here.so.8")
    with pytest.raises(BuildError, match=r"t\.cache: .*with cuDNN 8, which is not here \(libcudnn_that") as caught:
        weak(tmp_path, "fp16", timing_cache=str(tmp_path / "t.cache"))
    assert "leave timing_cache out" in (caught.value.hint or "")
    assert not (tmp_path / "t.cache").exists()
    assert not (tmp_path / "model.plan").exists()


def test_later_versions_need_no_cudnn_for_their_timing_cache(tmp_path, monkeypatch):
    simulate(monkeypatch, "10.9.0.34")
    monkeypatch.setattr(build_module, "_CUDNN", "libcudnn_that_is_not_here.so.8")
    weak(tmp_path, "fp16", timing_cache=str(tmp_path / "t.cache"))
    assert (tmp_path / "t.cache").exists()


def test_weights_are_stripped_where_asked(tmp_path, monkeypatch):
    trt = simulate(monkeypatch, "10.13.0.35")
    record = direct(
        tmp_path,
        write_graph(tmp_path / "a.onnx"),
        make_spec("tensorrt", "fp16", options={"strip_weights": True}),
        name="tensorrt",
    )
    assert trt.seen.config.set == {"STRIP_PLAN"}
    assert record.options["strip_weights"] is True
    assert "--stripWeights" in record.command


def test_layers_are_constrained_by_pattern(tmp_path, monkeypatch):
    trt = simulate(monkeypatch)
    record = weak(tmp_path, "fp16", layer_precisions={"*": "fp16", "/head/*": "fp32"})
    product, shape, relu = trt.seen.network.layers
    assert (product.precision, product.output_types) == (DTYPES.FLOAT, {0: DTYPES.FLOAT})
    assert (relu.precision, relu.output_types) == (DTYPES.HALF, {})  # its output is the engine's
    assert shape.precision is None
    assert "OBEY_PRECISION_CONSTRAINTS" in trt.seen.config.set
    assert record.options["constrained_layers"] == 2
    assert "--layerPrecisions=/head/product:fp32,/tail/relu:fp16" in record.command
    assert "--precisionConstraints=obey" in record.command


def test_constraint_that_matches_no_layer_names_near_ones(tmp_path, monkeypatch):
    simulate(monkeypatch)
    with pytest.raises(BuildError, match=r"'/head/produkt\*' matches no layer") as caught:
        weak(tmp_path, "fp16", layer_precisions={"/head/produkt*": "fp32"})
    assert "/head/product" in caught.value.hint
    with pytest.raises(BuildError, match="matches no layer that computes"):
        weak(tmp_path, "fp16", layer_precisions={"/head/shape": "fp32"})


def test_calibration_takes_whole_batches_of_the_opt_shape(tmp_path, monkeypatch):
    trt = simulate(monkeypatch)
    record = weak(tmp_path, sizes=(1, 4, 2), profiles=PROFILES[1:])
    everything = np.concatenate([each["x"] for each in batches(1, 4, 2)()])
    assert trt.seen.config.calibration_profile.shapes == {"x": ((3, 3), (3, 3), (3, 3))}
    np.testing.assert_array_equal(np.concatenate(trt.seen.batches).reshape(-1, 3), everything[:6])
    calibration = record.calibration
    assert (calibration.tool, calibration.method, calibration.samples) == ("tensorrt 8.6.0", "entropy", 6)
    assert calibration.sha256 == "c" * 64
    assert calibration.notes == (
        "1 of 7 calibration samples were left out: they do not fill a batch of 3, the profile's opt",
    )
    (found,) = calibration.ranges
    assert (found.name, found.high) == ("x", pytest.approx(float(np.abs(everything[:6]).max())))
    assert found.low == -found.high
    assert trt.seen.memory.blocks == {}
    assert trt.seen.memory.closed


def test_calibrator_is_the_one_asked_for(tmp_path, monkeypatch):
    trt = simulate(monkeypatch)
    assert weak(tmp_path, calibrator="minmax").calibration.method == "minmax"
    assert isinstance(trt.seen.config.int8_calibrator, trt.IInt8MinMaxCalibrator)
    assert weak(tmp_path).calibration.method == "entropy"
    assert isinstance(trt.seen.config.int8_calibrator, trt.IInt8EntropyCalibrator2)


def test_calibration_cache_is_written_and_read_again(tmp_path, monkeypatch):
    trt = simulate(monkeypatch)
    cache = tmp_path / "int8.cache"
    first = weak(tmp_path, calibration_cache=str(cache))
    seen = len(trt.seen.batches)
    key = CacheKey(model_sha256="a" * 64, calibration_sha256="c" * 64, tensorrt_version="8.6.0", method="entropy")
    payload = read_cache(cache, key).payload
    assert first.digests["calibration_cache"] == hashlib.sha256(payload).hexdigest()
    again = weak(tmp_path, calibration_cache=str(cache))
    assert len(trt.seen.batches) == seen
    assert again.calibration.ranges == first.calibration.ranges
    assert again.calibration.samples == first.calibration.samples
    assert again.calibration.notes == ("ranges were read from int8.cache",)
    assert again.digests == first.digests
    assert "tail -n +2 int8.cache > int8.cache.raw && trtexec" in again.command
    assert "--calib=int8.cache.raw" in again.command


@pytest.mark.parametrize(
    ("changed", "what"),
    [({"model": "b" * 64}, "model"), ({"sha": "d" * 64}, "samples"), ({"calibrator": "minmax"}, "calibrator")],
)
def test_calibration_cache_of_something_else_is_refused(tmp_path, monkeypatch, changed, what):
    simulate(monkeypatch)
    cache = tmp_path / "int8.cache"
    weak(tmp_path, calibration_cache=str(cache))
    before = cache.read_bytes()
    with pytest.raises(BuildError, match=f"belongs to another .*{what}"):
        weak(tmp_path, calibration_cache=str(cache), **changed)
    assert cache.read_bytes() == before


def test_calibration_cache_of_another_version_is_refused(tmp_path, monkeypatch):
    simulate(monkeypatch)
    weak(tmp_path, calibration_cache=str(tmp_path / "int8.cache"))
    simulate(monkeypatch, "8.6.1")
    with pytest.raises(BuildError, match=r"another version of TensorRT: it has 8\.6\.0, here is 8\.6\.1"):
        weak(tmp_path, calibration_cache=str(tmp_path / "int8.cache"))


def test_too_few_calibration_samples_are_an_error(tmp_path, monkeypatch):
    simulate(monkeypatch)
    with pytest.raises(BuildError, match="1 calibration samples do not fill one batch of 2"):
        weak(tmp_path, sizes=(1,))


def test_no_calibration_samples_are_an_error(tmp_path, monkeypatch):
    simulate(monkeypatch)
    spec = make_spec("tensorrt", "int8", task={}, options={"typing": "weak"})
    with pytest.raises(BuildError, match="needs calibration samples"):
        direct(tmp_path, write_graph(tmp_path / "a.onnx"), spec, name="tensorrt")


def test_device_memory_that_fails_while_calibrating_stops_the_build(tmp_path, monkeypatch):
    trt = simulate(monkeypatch)

    def fail(address, array, stream):
        raise MemoryError("no device memory")

    monkeypatch.setattr(trt.seen.memory, "to_device", fail)
    with pytest.raises(MemoryError, match="no device memory"):
        weak(tmp_path)
    assert not (tmp_path / "model.plan").exists()
    assert trt.seen.memory.blocks == {}


def test_own_int8_graph_without_scales_is_refused_in_weak_typing(tmp_path, monkeypatch):
    trt = simulate(monkeypatch)
    spec = make_spec("tensorrt", "int8", task={}, onnx="a.onnx", options={"typing": "weak"})
    with pytest.raises(BuildError, match="carries no Q/DQ"):
        direct(tmp_path, write_graph(tmp_path / "a.onnx"), spec, name="tensorrt")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="product"),
    ]
    assert direct(tmp_path, write_graph(tmp_path / "a.onnx", nodes), spec, name="tensorrt").calibration is None
    assert trt.seen.config.int8_calibrator is None


def test_builder_that_cannot_be_started_is_a_build_error(tmp_path, monkeypatch):
    trt = simulate(monkeypatch)

    def refuse(logger):
        logger.log(SimpleNamespace(name="ERROR"), "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    trt.Builder = refuse
    with pytest.raises(BuildError, match=r"tensorrt 8\.6\.0 cannot be started: pybind11") as caught:
        weak(tmp_path, "fp16")
    assert caught.value.log == ("ERROR: CUDA initialization failure with error: 35",)


def test_timing_cache_that_is_a_link_is_refused(tmp_path, monkeypatch):
    simulate(monkeypatch)
    (tmp_path / "real").write_bytes(b"timing")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(BuildError, match="the timing cache is a symbolic link"):
        weak(tmp_path, "fp16", timing_cache=str(tmp_path / "link"))


def test_several_profiles_on_8_have_no_command(tmp_path, monkeypatch):
    simulate(monkeypatch)
    assert weak(tmp_path, "fp16", profiles=PROFILES).command is None


# For real, on a GPU with TensorRT 8 to 10.


def real(precision="fp16", **options):
    found = backend("tensorrt")
    spec = make_spec("tensorrt", precision, task={}, options={"typing": "weak", **options})
    if found.runs_here(spec.engines[0]) is not Evidence.DEVICE:
        pytest.skip("tensorrt does not run on this GPU")
    if not api.is_weakly_typed(api.module("tensorrt")):
        pytest.skip("this TensorRT has no weak typing")
    return spec


DEEP = [
    helper.make_node("MatMul", ["x", "w"], ["h"], name="/head/product"),
    helper.make_node("Relu", ["h"], ["r"], name="/head/relu"),
    helper.make_node("MatMul", ["r", "v"], ["y"], name="/tail/product"),
]


def build_real(tmp_path, spec, *, scale=1.0, sha="c" * 64, sizes=(3, 4, 2)):
    more = [numpy_helper.from_array(np.array([[1, 0.5], [-0.5, 2]], np.float32), "v")]
    path = write_graph(tmp_path / "a.onnx", DEEP, more=more)
    return direct(
        tmp_path,
        path,
        spec,
        name="tensorrt",
        runs_here=True,
        calibration=batches(*sizes, scale=scale),
        calibration_sha256=sha,
        onnx_sha256=hashlib.sha256(Path(path).read_bytes()).hexdigest(),
    )


@pytest.mark.gpu
def test_weak_fp16_is_built_and_its_caches_written(tmp_path):
    timing = tmp_path / "timing.cache"
    options = {"layer_precisions": {"/tail/*": "fp32"}, "timing_cache": str(timing)}
    try:
        ctypes.CDLL("libcudnn_ops_infer.so.8")
    except OSError:
        if backend("tensorrt").version().startswith("8."):
            with pytest.raises(BuildError, match="with cuDNN 8, which is not here"):
                build_real(tmp_path, real(**options, profiles=PROFILES))
            del options["timing_cache"]
    record = build_real(tmp_path, real(**options, profiles=PROFILES))
    assert record.options["builder_flags"] == ["FP16", "OBEY_PRECISION_CONSTRAINTS"]
    assert record.options["constrained_layers"] >= 1
    assert record.layers
    if "timing_cache" not in options:
        return
    assert timing.stat().st_size > 0
    again = build_real(tmp_path, real(**options, profiles=PROFILES))
    assert not any("not usable" in line for line in again.log)
    timing.write_bytes(b"garbage")
    assert any("not usable" in line for line in build_real(tmp_path, real(**options)).log)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["entropy", "minmax"])
def test_weak_int8_is_calibrated_and_computes(tmp_path, method):
    spec = real("int8", calibrator=method)
    record = build_real(tmp_path, spec, sizes=(64, 64, 65))
    assert record.calibration.method == method
    assert record.calibration.samples == 192
    assert record.calibration.notes[0].startswith("1 of 193")
    ranges = {each.name: each for each in record.calibration.ranges}
    largest = max(float(np.abs(each["x"]).max()) for each in batches(64, 64, 65)())
    assert 0 < ranges["x"].high <= largest * 1.1
    (feed,) = batches(4)()
    expected = np.maximum(feed["x"] @ WEIGHT, 0) @ np.array([[1, 0.5], [-0.5, 2]], np.float32)
    with backend("tensorrt").open(tmp_path / "model.plan", spec=spec, engine=spec.engines[0]) as runner:
        answer = runner.run(feed)["y"]
    assert np.sqrt(np.mean((answer - expected) ** 2)) <= 0.2 * np.sqrt(np.mean(expected**2))


@pytest.mark.gpu
def test_calibration_cache_is_reused_and_refused_for_real(tmp_path):
    cache = tmp_path / "int8.cache"
    spec = real("int8", calibration_cache=str(cache))
    first = build_real(tmp_path, spec)
    again = build_real(tmp_path, spec)
    assert again.calibration.notes == ("ranges were read from int8.cache",)
    assert again.calibration.ranges == first.calibration.ranges
    assert again.digests == first.digests
    with pytest.raises(BuildError, match="belongs to another set of calibration samples"):
        build_real(tmp_path, spec, sha="d" * 64)
    cache.write_bytes(cache.read_bytes()[:-1] + b"?")
    with pytest.raises(BuildError, match="is damaged"):
        build_real(tmp_path, spec)


@pytest.mark.gpu
def test_portable_plan_is_built(tmp_path):
    record = build_real(tmp_path, real(hardware_compatible="ampere_plus"))
    assert record.options["hardware_compatible"] == "ampere_plus"
    assert record.layers


@pytest.mark.gpu
def test_version_compatible_plan_is_built(tmp_path):
    spec = real(version_compatible=True)
    try:
        record = build_real(tmp_path, spec)
    except BuildError as err:
        if "nvinfer_lean" in str(err):
            pytest.skip("the lean runtime is not installed")
        raise
    assert record.options["builder_flags"] == ["FP16", "VERSION_COMPATIBLE"]
    assert record.layers
