"""An inference copy as an ONNX file, with a branch for each gate around what it switches.

``torch.export`` follows an inference copy made by
:func:`~batchshaping.gates.inference.conditional_inference`, and for one image makes branches of its gates.
``torch.onnx`` writes them as ``If`` nodes. Here their weights are arranged as ONNX Runtime wants them: it
packs weights that are constants within a branch, and none from outside.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["export_onnx"]


def export_onnx(model: nn.Module, path: str | os.PathLike[str], example: Tensor) -> None:
    """Write an inference copy as an ONNX file, whose closed gates save time for one image.

    It needs ``pip install 'batchshaping[onnx]'``, and takes some seconds for each block. The file has one
    input, ``images``, and gives what the copy gives up to rounding. Large weights are in it once.

    An example of one image makes a file for one image. In it there is an ``If`` for each gate, around the
    slices of convolutions that it switches, and one for each block, which computes all channels where most
    gates are open. A bottleneck's middle convolution reads closed channels as zeros. Blocks with more than 16
    gates in a layer, such as a gate for each channel, and those with grouped convolutions (ResNeXt) compute
    all channels and set closed ones to zero.

    An example of several images makes a file for batches of any size, which computes all channels everywhere.

    Args:
        model: the copy, made by :func:`~batchshaping.gates.inference.conditional_inference`. Any other
            network is written as it is, without branches.
        path: the file; an earlier one is replaced.
        example: a batch of images, of shape (N, ...): the file takes images of this size.

    Raises:
        ValueError: if there is no image; or if the model is one whose computation ``torch.export`` cannot
            follow, such as the inference copy of a vision transformer of two scales.
        ImportError: if onnx or onnxscript is not installed.

    Example:
        >>> import batchshaping as bs, tempfile
        >>> from torchvision.models.resnet import BasicBlock
        >>> network = bs.gate_resnet(BasicBlock(32, 32), gates_per_layer=2)
        >>> file = os.path.join(tempfile.mkdtemp(), "block.onnx")
        >>> export_onnx(bs.conditional_inference(network), file, torch.randn(1, 32, 8, 8))
    """
    import onnx
    import onnxscript  # noqa: F401  What torch.onnx needs; it would say so in many lines.

    if len(example) == 0:
        raise ValueError(f"example must hold at least one image, received shape {tuple(example.shape)}")
    dynamic = None if len(example) == 1 else ({0: torch.export.Dim("batch", min=1)},)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            program = torch.export.export(model, (example,), dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"model must be one that torch.export can follow, received a {type(model).__name__}: {reason}"
        ) from error
    finally:
        model.train(training)
    written: Any = torch.onnx.export(program, dynamo=True, input_names=["images"], verbose=False)
    proto = written.model_proto
    _make_constant_within_branches(proto.graph)
    onnx.save(proto, os.fspath(path))


def _make_constant_within_branches(graph: Any) -> None:
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
        del branch.node[:]
        branch.node.extend([*itertools.chain.from_iterable(map(_of_slices, put_together.values())), *nodes])
    kept = [tensor for name, tensor in weights.items() if name not in moved]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _branches(graph: Any) -> Iterator[Any]:
    """The graphs of all branches, also of those within others."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g
                yield from _branches(attribute.g)


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
