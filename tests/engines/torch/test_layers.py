"""ATen's operators as layers."""

import pytest
import torch

from gate.engines.torch.arithmetic import deployed
from gate.engines.torch.layers import ONNX_TYPES, Operator, dispatched, layers_from_operators, tf32_of
from gate.precision import COMPUTE_TYPES


def test_what_multiplies_is_called_as_onnx_calls_it():
    assert set(ONNX_TYPES.values()) <= COMPUTE_TYPES
    layers = layers_from_operators([Operator("convolution", "stem", "float16"), Operator("relu", "", "float16")])
    assert [(each.name, each.type, each.precision) for each in layers] == [
        ("stem/convolution", "Conv", "fp16"),
        ("relu", "relu", "fp16"),
    ]


def test_names_are_distinct():
    layers = layers_from_operators([Operator("mm", "a", "float32")] * 3)
    assert [each.name for each in layers] == ["a/mm", "a/mm:2", "a/mm:3"]


def test_tf32_is_said_of_fp32_products_only():
    operators = [
        Operator("mm", "", "float32"),
        Operator("convolution", "", "float32"),
        Operator("bmm", "", "float16"),
        Operator("relu", "", "float32"),
    ]
    layers = layers_from_operators(operators, tf32=lambda kind: kind != "Conv")
    assert [each.precision for each in layers] == ["tf32", "fp32", "fp16", "fp32"]


def test_there_is_no_tf32_on_the_cpu():
    assert not tf32_of("cpu")("MatMul")


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (torch.nn.ConvTranspose2d(1, 1, 2), (1, 1, 4, 4), {"ConvTranspose"}),
        (torch.nn.Conv1d(1, 1, 2), (1, 1, 4), {"Conv"}),
        (torch.nn.Linear(4, 2, bias=False), (3, 4), {"MatMul"}),
        (torch.nn.LSTM(4, 2), (3, 1, 4), {"RNN", "LSTM"}),
        (torch.nn.TransformerEncoderLayer(4, 2, batch_first=True), (1, 3, 4), {"MultiHeadAttention"}),
    ],
)
def test_the_products_of_pytorchs_modules_are_counted(module, shape, expected):
    module = module.eval()
    layers = layers_from_operators(dispatched(module, lambda: module(torch.zeros(shape))))
    assert {each.type for each in layers} & expected


def test_hooks_are_gone_after_a_failure():
    module = torch.nn.Linear(4, 2).eval()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        dispatched(module, lambda: module(torch.zeros(1, 3)))
    assert not module._forward_pre_hooks
    assert not module._forward_hooks


@pytest.mark.parametrize(("override", "expected"), [("0", False), ("1", True), ("", True), (None, True)])
def test_the_environment_stands_above_the_switches(override, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    environment = {} if override is None else {"NVIDIA_TF32_OVERRIDE": override}
    restore = deployed(tf32=True)
    try:
        found = tf32_of("cuda", environment=environment)
        assert {found(kind) for kind in ("Conv", "MatMul")} == {expected}
    finally:
        restore()


def test_tf32_that_the_environment_switches_on_is_seen_where_pytorch_has_it_off(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    restore = deployed(tf32=False)
    try:
        assert tf32_of("cuda")("MatMul")
        monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
        assert not tf32_of("cuda")("MatMul")
    finally:
        restore()
