"""A graph with branches gives the same, and computes in each branch what only that branch needs."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from batchshaping.gates.onnx_graph import make_branches, make_constants

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

SHAPE = (1, 4, 6, 6)
CONDITIONS = ("first", "second")


def node(operation: str, inputs: str, output: str) -> Any:
    return onnx.helper.make_node(operation, inputs.split(), [output])


def model_of(*nodes: Any, condition_shape: tuple[int, ...] = ()) -> Any:
    """A model of images and two conditions, with three weights, that gives ``y``."""
    info = onnx.helper.make_tensor_value_info
    random = np.random.default_rng(0)
    weights = [
        onnx.numpy_helper.from_array(random.normal(size=(4, 4, 1, 1)).astype(np.float32), name)
        for name in ("w", "v", "u")
    ]
    graph = onnx.helper.make_graph(
        [*nodes],
        "graph",
        [
            info("x", onnx.TensorProto.FLOAT, SHAPE),
            *[info(name, onnx.TensorProto.BOOL, condition_shape) for name in CONDITIONS],
        ],
        [info("y", onnx.TensorProto.FLOAT, SHAPE)],
        weights,
    )
    opset = onnx.helper.make_opsetid("", 20)
    return onnx.shape_inference.infer_shapes(
        onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    )


def with_branches(*nodes: Any, condition_shape: tuple[int, ...] = ()) -> Any:
    """The graph of these nodes with branches, which gives the same, whatever the conditions."""
    model = model_of(*nodes, condition_shape=condition_shape)
    rewritten = onnx.ModelProto()
    rewritten.CopyFrom(model)
    make_branches(rewritten.graph)
    make_constants(rewritten.graph)
    onnx.checker.check_model(rewritten, full_check=True)
    # Up to the order in which a runtime adds.
    x = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    sessions = [onnxruntime.InferenceSession(each.SerializeToString()) for each in (model, rewritten)]
    for values in itertools.product((True, False), repeat=len(CONDITIONS)):
        given = {
            name: np.full(condition_shape, value) for name, value in zip(CONDITIONS, values, strict=True)
        }
        before, after = (session.run(None, {"x": x, **given})[0] for session in sessions)
        np.testing.assert_allclose(before, after, rtol=1e-5, atol=1e-5)
    return rewritten.graph


def operations(graph: Any) -> list[Any]:
    """Names of the operations; of an ``If``, with those of its two branches."""
    return [
        ("If", *[operations(a.g) for a in sorted(each.attribute, key=lambda a: a.name, reverse=True)])
        if each.op_type == "If"
        else each.op_type
        for each in graph.node
    ]


def test_each_side_is_computed_only_when_it_is_chosen() -> None:
    graph = with_branches(
        node("Conv", "x w", "a0"),
        node("Conv", "x v", "b0"),
        node("Relu", "a0", "a"),
        node("Sigmoid", "b0", "b"),
        node("Where", "first a b", "y"),
    )
    assert operations(graph) == [("If", ["Conv", "Relu"], ["Conv", "Sigmoid"])]
    # Each weight is a constant of its branch, but the one that nothing uses.
    assert [tensor.name for tensor in graph.initializer] == ["u"]


def test_what_both_sides_need_or_others_too_stays_outside() -> None:
    graph = with_branches(
        node("Conv", "x w", "shared"),
        node("Conv", "shared v", "elsewhere"),
        node("Conv", "elsewhere u", "own"),
        node("Add", "own shared", "a"),
        node("Where", "first a shared", "chosen"),
        node("Add", "chosen elsewhere", "y"),
    )
    branch = ("If", ["Conv", "Add"], ["Identity"])
    found = [each for each in operations(graph) if each not in ("Constant", "Slice", "Concat")]
    assert found == ["Conv", "Conv", branch, "Add"]


def test_a_selection_within_a_side_is_a_branch_within_its_branch() -> None:
    graph = with_branches(
        node("Conv", "x w", "a"),
        node("Conv", "x v", "b0"),
        node("Where", "second b0 x", "b1"),
        node("Conv", "b1 u", "b2"),
        node("Add", "b1 b2", "b"),
        node("Where", "first a b", "y"),
    )
    inner = ("If", ["Conv"], ["Identity"])
    assert operations(graph) == [("If", ["Conv"], [inner, "Conv", "Add"])]


def test_selections_one_after_the_other_are_branches_one_after_the_other() -> None:
    graph = with_branches(
        node("Conv", "x w", "a0"),
        node("Add", "x a0", "a"),
        node("Where", "first a x", "b"),
        node("Conv", "b v", "c0"),
        node("Add", "b c0", "c"),
        node("Where", "second c b", "y"),
    )
    assert operations(graph) == [("If", ["Conv", "Add"], ["Identity"])] * 2


def test_what_a_branch_of_the_model_itself_takes_stays_outside() -> None:
    info = onnx.helper.make_tensor_value_info("inner", onnx.TensorProto.FLOAT, SHAPE)
    own = [onnx.helper.make_graph([node(name, "a", "inner")], name, [], [info]) for name in ("Relu", "Neg")]
    graph = with_branches(
        node("Conv", "x w", "a"),
        onnx.helper.make_node("If", ["second"], ["b"], then_branch=own[0], else_branch=own[1]),
        node("Conv", "a v", "c"),
        node("Where", "first c x", "d"),
        node("Add", "b d", "y"),
    )
    branches = [("If", ["Relu"], ["Neg"]), ("If", ["Conv"], ["Identity"])]
    assert operations(graph) == ["Conv", *branches, "Add"]


def test_a_weight_that_two_branches_use_is_in_the_file_once() -> None:
    graph = with_branches(
        node("Conv", "x w", "a0"),
        node("Relu", "a0", "a"),
        node("Conv", "x w", "b"),
        node("Where", "first a b", "y"),
    )
    assert [tensor.name for tensor in graph.initializer].count("w") == 1
    for branch in graph.node[0].attribute:
        assert [*branch.g.initializer] == []


@pytest.mark.parametrize(
    ("nodes", "condition_shape"),
    [
        # Values are chosen one by one.
        ((node("Conv", "x w", "a"), node("Where", "first a x", "y")), (6,)),
        # There is no convolution to save.
        ((node("Relu", "x", "a"), node("Where", "first a x", "y")), ()),
        # One side is repeated to the shape of the other.
        ((node("Conv", "x w", "a"), node("ReduceMean", "a", "m"), node("Where", "first m x", "y")), ()),
        # What is computed is needed in any case.
        ((node("Conv", "x w", "a"), node("Where", "first a a", "y")), ()),
    ],
)
def test_other_selections_stay(nodes: tuple[Any, ...], condition_shape: tuple[int, ...]) -> None:
    graph = with_branches(*nodes, condition_shape=condition_shape)
    assert operations(graph) == [each.op_type for each in nodes]
