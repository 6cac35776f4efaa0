"""The graph of an ONNX file, rewritten so that a runtime computes no more than it must.

:func:`make_branches` makes an ``If`` of each ``Where`` that chooses between two computations by one number.
:func:`make_constants` then arranges the weights in these branches as ONNX Runtime wants them: it packs
weights that are constants within a branch, and none from outside.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["make_branches", "make_constants"]


def make_branches(graph: Any) -> None:
    """Make an ``If`` of each ``Where`` whose condition is one number, in place.

    What only one of its two sides needs moves into the branch of that side, and so on within it. A ``Where``
    stays what it is if no convolution would move, or if a side does not have the shape of the result.
    """
    known = {info.name: info for info in (*graph.input, *graph.value_info, *graph.output)}
    nodes = _with_branches([*graph.node], [output.name for output in graph.output], known)
    _replace(graph.node, nodes)
    outside = {name for node in nodes for name in node.output}
    _replace(graph.value_info, [info for info in graph.value_info if info.name in outside])


def _with_branches(nodes: Sequence[Any], results: Sequence[str], known: dict[str, Any]) -> list[Any]:
    """The nodes of a graph, in their order.

    Args:
        nodes: each after those whose outputs it takes.
        results: names of what the graph gives.
        known: types and shapes by name.
    """
    users = defaultdict(set, {name: {(len(nodes), k)} for k, name in enumerate(results)})
    for k, node in enumerate(nodes):
        for position, name in enumerate([*node.input, *_captured(node)]):
            users[name].add((k, position))

    def needed_only_for(selection: int, position: int) -> list[int]:
        found: set[int] = set()
        for k in reversed(range(selection)):
            used = set().union(*(users[name] for name in nodes[k].output))
            if used and all(user in found or (user, at) == (selection, position) for user, at in used):
                found.add(k)
        return sorted(found)

    left = dict(enumerate(nodes))
    for k in reversed(range(len(nodes))):
        if k not in left or not _is_selection(nodes[k], known):
            continue
        moved = [needed_only_for(k, position) for position in (1, 2)]
        if all(nodes[j].op_type != "Conv" for j in itertools.chain(*moved)):
            continue
        left[k] = _if(nodes[k], [[nodes[j] for j in side] for side in moved], known)
        for j in itertools.chain(*moved):
            del left[j]
    return [*left.values()]


def _is_selection(node: Any, known: dict[str, Any]) -> bool:
    """Whether a node gives one of its two sides, all of it."""
    if node.op_type != "Where" or not {*node.input, *node.output} <= known.keys():
        return False
    condition, first, second, result = (known[name].type.tensor_type for name in (*node.input, *node.output))
    is_one_number = condition.HasField("shape") and len(condition.shape.dim) == 0
    return is_one_number and first == second == result


def _captured(node: Any) -> list[str]:
    """The names that the branches of a node take from around it, among others."""
    return [name for branch in _branches_of(node) for inner in branch.node for name in inner.input]


def _if(selection: Any, sides: Sequence[Sequence[Any]], known: dict[str, Any]) -> Any:
    """A node that computes one of two sides of a selection."""
    from onnx import ValueInfoProto, helper

    (result,) = selection.output
    condition, *given = selection.input
    branches = []
    for name, nodes, side in zip(given, sides, ("then", "else"), strict=True):
        inside = {output for node in nodes for output in node.output}
        # A branch gives nothing that it has not computed itself.
        copied = [] if name in inside else [helper.make_node("Identity", [name], [f"{result}.{side}"])]
        output = ValueInfoProto()
        output.CopyFrom(known[result])
        output.name = name if name in inside else f"{result}.{side}"
        computed = [*_with_branches(nodes, [name], known), *copied]
        there = {each for node in computed for each in node.output} - {output.name}
        info = [known[each] for each in sorted(there & known.keys())]
        branches.append(helper.make_graph(computed, f"{result}.{side}", [], [output], value_info=info))
    return helper.make_node("If", [condition], [result], then_branch=branches[0], else_branch=branches[1])


def make_constants(graph: Any) -> None:
    """Let the weights of convolutions in branches be constants there, in place.

    One that nothing else uses moves into the branch. Of one that others take slices of, the branch gets two
    slices and puts them together, which a runtime does once: so a large weight is in the file once.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    uses = Counter(name for inner in (graph, *_branches(graph)) for node in inner.node for name in node.input)
    moved = set()
    for branch in _branches(graph):
        nodes, put_together = [*branch.node], {}
        for node in nodes:
            for k, name in enumerate(node.input):
                if node.op_type != "Conv" or name not in weights:
                    continue
                if uses[name] == 1:
                    branch.initializer.append(weights[name])
                    moved.add(name)
                else:
                    node.input[k] = f"{name}.whole"
                    put_together[name] = weights[name]
        first = itertools.chain.from_iterable(map(_of_slices, put_together.values()))
        _replace(branch.node, [*first, *nodes])
    _replace(graph.initializer, [tensor for name, tensor in weights.items() if name not in moved])


def _branches(graph: Any) -> Iterator[Any]:
    """The graphs of all branches, also of those within others."""
    for node in graph.node:
        yield from _branches_of(node)


def _branches_of(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
            yield from _branches(attribute.g)


def _replace(repeated: Any, items: Sequence[Any]) -> None:
    """Give a list of a message other items."""
    del repeated[:]
    repeated.extend(items)


def _of_slices(weight: Any) -> list[Any]:
    """Nodes that put a weight together of two slices of it."""
    from onnx import TensorProto, helper

    def number(name: str, value: int) -> Any:
        tensor = helper.make_tensor(name, TensorProto.INT64, [1], [value])
        return helper.make_node("Constant", [], [name], value=tensor)

    start, cut, end, first, second = (
        f"{weight.name}.{part}" for part in ("start", "cut", "end", "first", "second")
    )
    return [
        number(start, 0),
        number(cut, 1),
        number(end, weight.dims[0]),
        helper.make_node("Slice", [weight.name, start, cut], [first]),
        helper.make_node("Slice", [weight.name, cut, end], [second]),
        helper.make_node("Concat", [first, second], [f"{weight.name}.whole"], axis=0),
    ]
