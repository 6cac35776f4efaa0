"""An inference copy as an ONNX file, with a branch for each gate around what it switches.

``torch.export`` follows an inference copy made by
:func:`~batchshaping.gates.inference.conditional_inference`, and for one image makes branches of its gates
(:func:`torch.cond`). Writing these as ONNX would take half a second or more for each. So for a file they are
selections at first, of which :func:`~batchshaping.gates.onnx_graph.make_branches` makes branches.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from batchshaping.gates.onnx_graph import make_branches, make_constants

__all__ = ["choose", "export_onnx"]

_selects: ContextVar[bool] = ContextVar("selects", default=False)
"""Whether a choice is exported as a selection between two results."""


def choose(
    condition: Tensor,
    first: Callable[..., Tensor],
    second: Callable[..., Tensor],
    operands: Sequence[Tensor],
) -> Tensor:
    """One of two computations, as a branch of an exported program.

    Args:
        condition: whether it is the first, of no dimensions.
        first: one computation.
        second: the other one, which gives a tensor of the same shape.
        operands: what both of them take.
    """
    if _selects.get():
        return torch.where(condition, first(*operands), second(*operands))
    result: Tensor = torch.cond(condition, first, second, tuple(operands))
    return result


def export_onnx(model: nn.Module, path: str | os.PathLike[str], example: Tensor) -> None:
    """Write an inference copy as an ONNX file, whose closed gates save time for one image.

    It needs ``pip install 'batchshaping[onnx]'``, and takes a second or two for each block. The file has one
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
    selects = _selects.set(True)
    try:
        with torch.no_grad():
            program = torch.export.export(model, (example,), dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"model must be one that torch.export can follow, received a {type(model).__name__}: {reason}"
        ) from error
    finally:
        _selects.reset(selects)
        model.train(training)
    written: Any = torch.onnx.export(program, dynamo=True, input_names=["images"], verbose=False)
    proto = written.model_proto
    make_branches(proto.graph)
    make_constants(proto.graph)
    onnx.save(proto, os.fspath(path))
