"""``batchshaping export``: the network of a run as an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from batchshaping.cli.command import app
from batchshaping.cli.errors import extras
from batchshaping.cli.output import FILES, prepare, write
from batchshaping.cli.runs import refused
from batchshaping.gates.inference import conditional_inference
from batchshaping.gates.static import prune_static_gates

__all__ = ["export"]


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.", readable=False)],
    batches: Annotated[
        bool,
        typer.Option("--batches", help="For batches of any size, without branches, instead of one image."),
    ] = False,
    prune: Annotated[
        bool,
        typer.Option("--prune", help="Leave out gates that do the same for every training image."),
    ] = False,
    data_folder: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", readable=False, help="Where the data is, if not where it was."),
    ] = None,
    output: Annotated[
        Path, typer.Option(metavar="FILE", readable=False, help="The file.", rich_help_panel=FILES)
    ] = Path("model.onnx"),
    force: Annotated[
        bool, typer.Option("--force", help="Replace an earlier file.", rich_help_panel=FILES)
    ] = False,
) -> None:
    """Write the trained network of a run as an ONNX file, whose closed gates save time.

    Its input, **images**, is one image of the size of the data, normalized as in training, of shape
    (1, C, H, W); or with **--batches** a batch of any size.

    Example: **batchshaping export outputs/train --prune --output digits.onnx**
    """
    with extras():
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401

        from batchshaping.gates.export import export_onnx
        from batchshaping.training.data.batching import batches as in_batches
        from batchshaping.training.run import load_run
    prepare(output.parent, [output.name], force)
    with extras(), refused():
        network, data = load_run(run, **({} if data_folder is None else {"data_folder": data_folder}))
        if prune:
            images = (data.normalize(images) for images, _ in in_batches(data.train, 256))
            network, static = prune_static_gates(network, images)
            print(static)
        fast = conditional_inference(network)
        example = torch.zeros(2 if batches else 1, *data.shape)
        write(output, lambda path: export_onnx(fast, path, example), force)
