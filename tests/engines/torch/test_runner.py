"""The reference runner."""

import dataclasses
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
import torch

from gate.engines.torch.runner import TorchRunner, named_outputs, require_module
from gate.errors import BackendUnavailable, ExportError, RunError
from gate.spec import GateSpec

ONE, TWO = torch.zeros(2, 3), torch.ones(2)


def make_spec(names=()):
    axes = {"batch": {"min": 1, "opt": 2, "max": 4}}
    return msgspec.convert(
        {
            "schema": 1,
            "model": {"id": "m", "factory": "a:b", "output_names": list(names)},
            "inputs": {
                "x": {"dtype": "float32", "shape": ["batch", 3], "axes": axes},
                "y": {"dtype": "float32", "shape": ["batch", 3], "axes": axes},
            },
            "data": {"source": "a:b", "samples": 1},
            "engine": [{"name": "e", "backend": "onnxruntime", "precision": "fp32", "parity": {}}],
        },
        GateSpec,
    )


class Subtract(torch.nn.Module):
    def forward(self, y, x):
        return {"difference": x - y, "sign": (x > y)}


@dataclasses.dataclass
class Data:
    first: torch.Tensor
    none: None
    second: torch.Tensor


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


@pytest.mark.parametrize(
    ("result", "names"),
    [
        (ONE, ["output"]),
        ([ONE], ["output"]),
        ((ONE, TWO), ["output_0", "output_1"]),
        ({"a": ONE, "b": TWO}, ["a", "b"]),
        (Data(ONE, None, TWO), ["first", "second"]),
        (Pair(ONE, TWO), ["left", "right"]),
    ],
)
def test_outputs_take_their_names_from_the_result(result, names):
    assert list(named_outputs(result)) == names


def test_given_names_name_outputs_in_order():
    found = named_outputs((ONE, TWO), ("a", "b"))
    assert found["a"] is ONE
    assert found["b"] is TWO


def test_given_names_order_a_dict_by_its_keys():
    found = named_outputs({"a": ONE, "b": TWO}, ("b", "a"))
    assert list(found) == ["b", "a"]
    assert found["a"] is ONE


@pytest.mark.parametrize(
    ("result", "names", "message"),
    [
        (3, (), "returns a int"),
        ({}, (), "returns no output"),
        ({"a": None}, (), "returns no output"),
        ((ONE, (TWO,)), (), "output 'output_1' is a tuple, not a tensor"),
        ((ONE, TWO), ("a",), "has 1 names"),
        ({"a": ONE, "b": TWO}, ("a", "c"), "the model returns no c"),
    ],
)
def test_what_has_no_names_is_an_error(result, names, message):
    with pytest.raises(RunError, match=message):
        named_outputs(result, names)


def test_inputs_go_by_keyword_where_forward_has_their_names():
    feed = {"x": np.full((2, 3), 5, np.float32), "y": np.full((2, 3), 3, np.float32)}
    with TorchRunner(Subtract().eval(), spec=make_spec()) as runner:
        found = runner.run(feed)
        assert runner.outputs["difference"].shape == ("batch", None)
    assert found["difference"].tolist() == [[2, 2, 2]] * 2
    assert found["sign"].dtype == bool


def test_outputs_are_known_before_the_first_run():
    with TorchRunner(Subtract().eval(), spec=make_spec()) as runner:
        assert [meta.dtype for meta in runner.outputs.values()] == ["float32", "bool"]


def test_arrays_belong_to_the_caller():
    class Same(torch.nn.Module):
        def forward(self, x, y):
            return x

    feed = {"x": np.ones((1, 3), np.float32), "y": np.ones((1, 3), np.float32)}
    feed["x"].flags.writeable = False
    with TorchRunner(Same().eval(), spec=make_spec()) as runner:
        found = runner.run(feed)["output"]
    found += 1
    assert feed["x"].max() == 1


def test_switches_of_pytorch_are_put_back():
    before = (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision())
    torch.set_float32_matmul_precision("high")
    try:
        runner = TorchRunner(Subtract().eval(), spec=make_spec())
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.get_float32_matmul_precision() == "highest"
        runner.close()
        runner.close()
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.are_deterministic_algorithms_enabled() == before[0]
    finally:
        torch.set_float32_matmul_precision(before[1])


def test_closed_runner_does_not_run():
    runner = TorchRunner(Subtract().eval(), spec=make_spec())
    runner.close()
    with pytest.raises(RunError, match="closed"):
        runner.run({})


def test_failure_in_forward_shows_the_users_line():
    class Broken(torch.nn.Module):
        def forward(self, x, y):
            return x @ y

    feed = {"x": np.ones((2, 3), np.float32), "y": np.ones((2, 3), np.float32)}
    with (
        TorchRunner(Broken().eval(), spec=make_spec()) as runner,
        pytest.raises(RunError, match=r"(?s)its forward failed with RuntimeError: mat1.*return x @ y"),
    ):
        runner.run(feed)


def test_train_mode_is_refused_and_the_part_named():
    module = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout()).eval()
    module[1].train()
    with pytest.raises(ExportError, match="train mode: 1\n"):
        require_module(module, error=ExportError)


def test_what_is_no_module_is_refused():
    with pytest.raises(RunError, match=r"expected a torch.nn.Module, the factory returned a dict"):
        TorchRunner({}, spec=make_spec())


def test_bfloat16_output_becomes_the_equal_float32():
    class Half(torch.nn.Module):
        def forward(self, x, y):
            return x.to(torch.bfloat16)

    feed = {"x": np.full((1, 3), 1.5, np.float32), "y": np.ones((1, 3), np.float32)}
    with TorchRunner(Half().eval(), spec=make_spec()) as runner:
        found = runner.run(feed)["output"]
    assert found.dtype == np.float32
    assert found.tolist() == [[1.5] * 3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_reference_on_it_is_unavailable():
    with pytest.raises(BackendUnavailable, match="finds no GPU here"):
        TorchRunner(Subtract().eval(), spec=make_spec(), device="cuda")


@pytest.mark.gpu
def test_a_model_that_ran_on_the_gpu_is_on_the_cpu_afterwards():
    module = torch.nn.Sequential(torch.nn.Linear(3, 2)).eval()
    spec = msgspec.structs.replace(make_spec(), inputs={"x": make_spec().inputs["x"]})
    with TorchRunner(module, spec=spec, device="cuda") as runner:
        assert runner.run({"x": np.ones((2, 3), np.float32)})["output"].shape == (2, 2)
        assert module[0].weight.device.type == "cuda"
    assert module[0].weight.device.type == "cpu"
