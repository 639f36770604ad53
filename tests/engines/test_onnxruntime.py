"""ONNX Runtime: builds, runs and refuses."""

import os

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gate.engines import backend
from gate.engines.onnxruntime import OnnxRuntimeRunner, reference_runner
from gate.errors import BuildError, RunError
from gate.spec import EngineSpec, GateSpec

WEIGHT = np.arange(6, dtype=np.float32).reshape(3, 2)


def make_spec(**engine):
    return msgspec.convert(
        {
            "schema": 1,
            "model": {"id": "m", "factory": "a:b"},
            "inputs": {
                "x": {"dtype": "float32", "shape": ["n", 3], "axes": {"n": {"min": 1, "opt": 2, "max": 4}}},
            },
            "data": {"source": "a:b", "samples": 1},
            "engine": [{"name": "e", "backend": "onnxruntime", "precision": "fp32", "parity": {}, **engine}],
        },
        GateSpec,
    )


SPEC = make_spec()


def write_graph(path, *, element=TensorProto.FLOAT, external=False, nodes=None, batch="n"):
    kind = helper.tensor_dtype_to_np_dtype(element)
    graph = helper.make_graph(
        nodes or [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "g",
        [helper.make_tensor_value_info("x", element, [batch, 3])],
        [helper.make_tensor_value_info("y", element, [batch, None])],
        [numpy_helper.from_array(WEIGHT.astype(kind), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(model, path, save_as_external_data=external, location="weights.data", size_threshold=0)
    return path


def build(tmp_path, path, spec=SPEC):
    out = tmp_path / "built" / "model.onnx"
    return out, backend("onnxruntime").build(onnx=path, out=out, spec=spec, engine=spec.engines[0])


def test_built_engine_computes_the_graph(tmp_path):
    out, record = build(tmp_path, write_graph(tmp_path / "a.onnx"))
    x = np.ones((2, 3), np.float32)
    with backend("onnxruntime").open(out, spec=SPEC, engine=SPEC.engines[0]) as runner:
        assert np.array_equal(runner.run({"x": x})["y"], x @ WEIGHT)
        runner.timed({"x": x})()
        assert list(runner.inputs) == ["x"]
    assert [(layer.name, layer.type, layer.precision) for layer in record.layers] == [("product", "MatMul", "fp32")]
    assert record.profile == {"x": {"min": [1, 3], "opt": [2, 3], "max": [4, 3]}}
    assert record.options["provider"] == "CPUExecutionProvider"


def test_options_are_taken(tmp_path):
    spec = make_spec(options={"threads": 1, "optimization": "disabled"})
    _, record = build(tmp_path, write_graph(tmp_path / "a.onnx"), spec)
    assert record.options["threads"] == 1
    assert record.options["optimization"] == "disabled"


def test_external_data_goes_along(tmp_path):
    path = write_graph(tmp_path / "a.onnx", external=True)
    out, _ = build(tmp_path, path)
    assert sorted(each.name for each in out.parent.iterdir()) == ["model.onnx", "weights.data"]
    with OnnxRuntimeRunner(out, spec=SPEC) as runner:
        assert runner.run({"x": np.ones((1, 3), np.float32)})["y"].tolist() == [[6, 9]]


@pytest.mark.parametrize("how", ["outside", "symlink", "hardlink", "missing"])
def test_external_data_elsewhere_is_refused(tmp_path, how):
    folder = tmp_path / "a"
    folder.mkdir()
    path = write_graph(folder / "a.onnx", external=True)
    secret = tmp_path / "secret"
    secret.write_bytes((folder / "weights.data").read_bytes())
    if how == "outside":
        model = onnx.load(path, load_external_data=False)
        for entry in model.graph.initializer[0].external_data:
            if entry.key == "location":
                entry.value = "../secret"
        path.write_bytes(model.SerializeToString())
    else:
        (folder / "weights.data").unlink()
        if how != "missing":
            (os.symlink if how == "symlink" else os.link)(secret, folder / "weights.data")
    with pytest.raises(BuildError, match="external data"):
        build(tmp_path, path)
    with pytest.raises(RunError, match="external data"):
        OnnxRuntimeRunner(path, spec=SPEC)


def test_file_that_is_no_onnx_is_an_error(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"\xff\x00 no graph")
    with pytest.raises(BuildError, match="is not an ONNX file"):
        build(tmp_path, tmp_path / "a.onnx")
    with pytest.raises(RunError, match="ONNX Runtime refuses the graph"):
        OnnxRuntimeRunner(tmp_path / "a.onnx", spec=SPEC)


@pytest.mark.parametrize("content", [None, b""])
def test_missing_or_empty_file_is_an_error(tmp_path, content):
    if content is not None:
        (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(BuildError, match=r"no such file|refuses"):
        build(tmp_path, tmp_path / "a.onnx")
    with pytest.raises(RunError, match=r"no such file|refuses"):
        OnnxRuntimeRunner(tmp_path / "a.onnx", spec=SPEC)


def test_unknown_operator_is_an_error_with_its_node(tmp_path):
    path = write_graph(tmp_path / "a.onnx", nodes=[helper.make_node("Nonsense", ["x"], ["y"], name="odd")])
    with pytest.raises(BuildError, match="Nonsense"):
        build(tmp_path, path)


def test_bf16_graph_says_what_to_do(tmp_path):
    nodes = [
        helper.make_node("Cast", ["x"], ["b"], to=TensorProto.BFLOAT16),
        helper.make_node("Cast", ["w"], ["v"], to=TensorProto.BFLOAT16),
        helper.make_node("Reshape", ["b", "s"], ["c"]),
        helper.make_node("Gelu", ["c"], ["g"], name="gelu"),
        helper.make_node("Cast", ["g"], ["y"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", None])],
        [numpy_helper.from_array(WEIGHT, "w"), numpy_helper.from_array(np.array([-1, 3]), "s")],
    )
    path = tmp_path / "a.onnx"
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    with pytest.raises(BuildError, match=r"(?s)cannot run this bf16 graph.*tensorrt_rtx"):
        build(tmp_path, path)


def test_engine_with_another_input_name_is_an_error(tmp_path):
    path = write_graph(tmp_path / "a.onnx")
    other = msgspec.structs.replace(SPEC, inputs={"image": SPEC.inputs["x"]})
    with pytest.raises(RunError, match="no input 'image'.*an input 'x'"):
        OnnxRuntimeRunner(path, spec=other)


def test_fixed_batch_is_an_error_where_the_profile_is_wider(tmp_path):
    with pytest.raises(RunError, match="axis 0 is fixed at 2, the spec asks for 1 to 4"):
        OnnxRuntimeRunner(write_graph(tmp_path / "a.onnx", batch=2), spec=SPEC)


def test_half_graph_needs_cast_io(tmp_path):
    path = write_graph(tmp_path / "a.onnx", element=TensorProto.FLOAT16)
    with pytest.raises(RunError, match="cast_io"):
        OnnxRuntimeRunner(path, spec=SPEC)
    with OnnxRuntimeRunner(path, spec=SPEC, cast_io=True) as runner:
        assert runner.run({"x": np.ones((1, 3), np.float32)})["y"].dtype == np.float16


def test_wrong_feed_is_an_error(tmp_path):
    with OnnxRuntimeRunner(write_graph(tmp_path / "a.onnx"), spec=SPEC) as runner:
        with pytest.raises(RunError, match="missing"):
            runner.run({})
        with pytest.raises(RunError, match="outside the profile's 1 to 4"):
            runner.timed({"x": np.ones((5, 3), np.float32)})


def test_failure_while_running_is_an_error(tmp_path):
    nodes = [
        helper.make_node("Constant", [], ["s"], value=numpy_helper.from_array(np.array([7, -1]))),
        helper.make_node("Reshape", ["x", "s"], ["y"], name="reshape"),
    ]
    with (
        OnnxRuntimeRunner(write_graph(tmp_path / "a.onnx", nodes=nodes), spec=SPEC) as runner,
        pytest.raises(RunError, match="ONNX Runtime failed.*reshape"),
    ):
        runner.run({"x": np.ones((1, 3), np.float32)})


def test_closed_runner_does_not_run(tmp_path):
    runner = OnnxRuntimeRunner(write_graph(tmp_path / "a.onnx"), spec=SPEC)
    runner.close()
    runner.close()
    with pytest.raises(RunError, match="closed"):
        runner.run({"x": np.ones((1, 3), np.float32)})


def test_arrays_belong_to_the_caller(tmp_path):
    x = np.ones((1, 3), np.float32)
    with OnnxRuntimeRunner(write_graph(tmp_path / "a.onnx"), spec=SPEC) as runner:
        first = runner.run({"x": x})["y"]
        first += 100
        assert runner.run({"x": x})["y"].tolist() == [[6, 9]]


@pytest.mark.parametrize("cast_io", [False, True])
def test_timed_calls_of_one_runner_take_turns_each_on_its_own_feed(tmp_path, cast_io):
    element = TensorProto.FLOAT16 if cast_io else TensorProto.FLOAT
    path = write_graph(tmp_path / "a.onnx", element=element)
    with OnnxRuntimeRunner(path, spec=SPEC, cast_io=cast_io) as runner:
        # Nobody else holds the arrays; what is allocated afterwards would take their place.
        calls = [runner.timed({"x": np.full((2, 3), value, np.float32)}) for value in (1, 2, 3)]
        others = [np.full((2, 3), 77, np.float16 if cast_io else np.float32) for _ in range(100)]
        for index in (0, 1, 2, 1, 0):
            calls[index]()
            runner.run({"x": others[index].astype(np.float32)})
            cells = dict(zip(calls[index].__code__.co_freevars, calls[index].__closure__, strict=True))
            found = cells["binding"].cell_contents.copy_outputs_to_cpu()[0]
            np.testing.assert_array_equal(found, np.full((2, 3), index + 1, found.dtype) @ WEIGHT.astype(found.dtype))


def test_reference_is_run_from_an_onnx_file(tmp_path):
    with reference_runner(write_graph(tmp_path / "a.onnx"), spec=SPEC) as runner:
        assert runner.run({"x": np.ones((1, 3), np.float32)})["y"].tolist() == [[6, 9]]


def test_running_does_not_import_onnx(tmp_path):
    import subprocess
    import sys

    path = write_graph(tmp_path / "a.onnx")
    spec = tmp_path / "spec.json"
    spec.write_bytes(msgspec.json.encode(msgspec.to_builtins(SPEC)))
    code = (
        "import sys, msgspec, numpy, pathlib\n"
        "from gate.engines.onnxruntime import OnnxRuntimeRunner\n"
        "from gate.spec import GateSpec\n"
        f"spec = msgspec.json.decode(pathlib.Path({str(spec)!r}).read_bytes(), type=GateSpec)\n"
        f"OnnxRuntimeRunner(pathlib.Path({str(path)!r}), spec=spec).run({{'x': numpy.ones((1, 3), 'float32')}})\n"
        "bad = {'torch', 'onnx', 'modelopt'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_engine_spec_is_what_open_takes(tmp_path):
    path = write_graph(tmp_path / "a.onnx", element=TensorProto.FLOAT16)
    engine = msgspec.convert(
        {"name": "e", "backend": "onnxruntime", "precision": "fp16", "cast_io": True, "parity": {}}, EngineSpec
    )
    with backend("onnxruntime").open(path, spec=SPEC, engine=engine) as runner:
        assert runner.inputs["x"].dtype == "float16"
