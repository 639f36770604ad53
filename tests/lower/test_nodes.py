"""What a spec excludes, by name and by operator."""

import pytest
from onnx import TensorProto, helper

from gate.engines.interface import Layer
from gate.errors import LoweringError
from gate.lower.nodes import exactly, excluded, named, precision_notes, quantisers
from gate.spec import LoweringSpec


def model(*nodes):
    value = helper.make_tensor_value_info
    made = [helper.make_node(kind, ["x"], [f"out{index}"], name=name) for index, (kind, name) in enumerate(nodes)]
    graph = helper.make_graph(made, "g", [value("x", TensorProto.FLOAT, [1])], [value("out0", TensorProto.FLOAT, [1])])
    return named(helper.make_model(graph))


GRAPH = model(("Relu", "/a/Relu"), ("Abs", "/b/Abs"), ("Relu", "/c.1/Relu"), ("Neg", ""))


def test_names_come_in_graph_order_and_once():
    lowering = LoweringSpec(exclude_nodes=("/c.*", "/.*/Relu"), exclude_ops=("Relu", "Abs"))
    assert excluded(GRAPH, lowering) == ("/a/Relu", "/b/Abs", "/c.1/Relu")
    assert excluded(GRAPH, LoweringSpec()) == ()


def test_unnamed_node_has_the_name_of_its_output():
    assert excluded(GRAPH, LoweringSpec(exclude_nodes=("out3",))) == ("out3",)


def test_pattern_without_a_match_names_what_is_near():
    with pytest.raises(LoweringError, match=r"'/b/Abz' matches no node") as caught:
        excluded(GRAPH, LoweringSpec(exclude_nodes=("/b/Abz",)))
    assert "/b/Abs" in (caught.value.hint or "")


def test_operator_without_a_match_names_those_there_are():
    with pytest.raises(LoweringError, match="exclude_ops 'Conv' is no operator of the graph") as caught:
        excluded(GRAPH, LoweringSpec(exclude_ops=("Conv",)))
    assert caught.value.hint == "It has Abs, Neg, Relu."


def test_broken_pattern_is_an_error():
    with pytest.raises(LoweringError, match="is no regular expression"):
        excluded(GRAPH, LoweringSpec(exclude_nodes=("(",)))


def test_expression_for_a_name_matches_it_alone():
    import re

    (pattern,) = exactly(("/c.1/Relu",))
    assert re.match(pattern, "/c.1/Relu")
    assert not re.match(pattern, "/cx1/Relu")
    assert not re.match(pattern, "/c.1/Relu_1")


def test_tool_that_lowers_an_excluded_node_is_an_error():
    with pytest.raises(LoweringError, match="T made fp16 of nodes that the spec excludes: conv"):
        precision_notes((Layer("conv", "Conv", "fp16"),), precision="fp16", kept=("conv",), tool="T", why="")


def test_q_dq_nodes_are_counted():
    assert quantisers(GRAPH) == 0
    assert quantisers(model(("QuantizeLinear", "q"), ("DequantizeLinear", "d"))) == 2
