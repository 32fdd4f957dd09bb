"""How does a run become a graph that onnxruntime computes? Any batch, at the size of pre-training."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.export.agreement import Agreement, NotProven, compare, random_images
from pretrain.export.keys import Keys
from pretrain.export.remote_code.internimage_network import InternImageNetwork
from pretrain.export.remote_code.vit_network import ViTNetwork
from pretrain.export.torchvision_folder import internimage_arguments, vit_arguments
from pretrain.export.trained import Trained
from pretrain.models.internimage import stride_tokens

GRAPH = "model.onnx"
OPSET = 20  # the first with GridSample of more than images
OURS = {"internimage": ("encoder.dcnv3.", "encoder.heads."), "vit": ("encoder.vit.",)}


class InternImageGraph(nn.Module):
    """Images [b, 3, s, s] -> maps [b, c_i, h_i, w_i] of the stages, then tokens [b, l, d], row by row."""

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        with torch.device("meta"):
            self.network = InternImageNetwork(**internimage_arguments(trained))
        encoder = trained.towers.encoder
        self.network.load_state_dict(encoder.dcnv3.state_dict(), strict=True, assign=True)
        self.x3, self.x4 = encoder.heads.dcnv3_head_x3, encoder.heads.dcnv3_head_x4
        self.names = [f"stage_{index + 1}" for index in range(len(self.network.widths))] + ["tokens"]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.network(images)
        tokens = self.x3(maps[-2]) + self.x4(maps[-1])
        return (*maps, tokens.flatten(2).transpose(1, 2))


class ViTGraph(nn.Module):
    """Images [b, 3, s, s] of the run's size -> class token [b, d] and patch tokens [b, l, d], normalised."""

    names = ("class_token", "tokens")

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        with torch.device("meta"):
            self.network = ViTNetwork(**vit_arguments(trained))
        self.network.load_state_dict(trained.towers.encoder.vit.state_dict(), strict=True, assign=True)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        tokens = self.network(images)
        return tokens[:, 0], tokens[:, 1:]


# By backbone.family.
GRAPHS: dict[str, Callable[[Trained], nn.Module]] = {"internimage": InternImageGraph, "vit": ViTGraph}
BATCHES = (2, 3)  # that the graph is compared on; it is traced with the first


def write(trained: Trained, folder: Path) -> dict[str, Keys]:
    """Writes the graph, its weights beside it where they are too many for one file, and config.json."""
    family = trained.run.backbone.family
    module, views = GRAPHS[family](trained).eval(), trained.run.views
    names = list(module.names)
    write_graph(module, names, views.size, folder / GRAPH)
    told = {
        "inputs": {"images": ["batch", 3, views.size, views.size]},
        "outputs": names,
        "image_mean": list(views.mean),
        "image_std": list(views.std),
        "opset": OPSET,
    }
    (folder / "config.json").write_text(json.dumps(told, indent=1) + "\n")
    state = trained.towers.state_dict()
    written = {name: name for name in state if name.startswith(OURS[family])}
    skipped = {name: "no part of the graph" for name in state if name not in written}
    return {GRAPH: Keys(written, skipped).require_whole(state, written.values())}


def write_graph(module: nn.Module, names: list[str], size: int, path: Path) -> None:
    """The graph of a module that gives a tuple for images [batch, 3, size, size]."""
    with torch.inference_mode(False), warnings.catch_warnings(), open(os.devnull, "w") as nowhere:
        warnings.simplefilter("ignore")  # of torch.export and onnxscript about themselves
        with contextlib.redirect_stdout(nowhere):
            program = torch.onnx.export(
                module,
                (torch.randn(BATCHES[0], 3, size, size),),
                dynamo=True,
                input_names=["images"],
                output_names=names,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=OPSET,
                verbose=False,
                optimize=False,
            )
            _simplify(program.model)
            program.save(str(path), external_data=True)


def _simplify(model: Any) -> None:
    """What needs no image is computed, and what is computed twice once, in a model of onnx_ir.

    The exporter's own optimisation tries each rule of rewriting on each node besides: forty times as long for 7 %
    fewer nodes, which onnxruntime computes no faster.
    """
    from onnx_ir.passes import common
    from onnxscript import optimizer

    common.InlinePass()(model)
    optimizer.fold_constants(model)
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.OutputFixPass()(model)


def prove(trained: Trained, folder: Path) -> list[Agreement]:
    """Computes the graph in onnxruntime, on two batches, and compares every output.

    Raises NotProven.
    """
    session = open_graph(folder / GRAPH)
    agreements = []
    size = trained.run.views.size
    for number in BATCHES:
        images = random_images(size).repeat(2, 1, 1, 1)[:number]
        with torch.inference_mode():
            ours = own_outputs(trained, images)
        found = session.run(list(ours), {"images": images.numpy()})
        for (name, own), values in zip(ours.items(), found, strict=True):
            output = f"{name} of {number} images"
            agreements.append(compare(GRAPH, output, size, own, last_axis(name, torch.from_numpy(values))))
    return agreements


def open_graph(path: Path) -> Any:
    """The session of onnxruntime on the CPU, with the weights once in memory; NotProven when it does not load."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.disable_prepacking", "1")  # which copies the weights
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has classes of its own
        raise NotProven(f"onnxruntime does not load {path.name}: {error}") from error


def own_outputs(trained: Trained, images: Tensor) -> dict[str, Tensor]:
    """By the towers as pre-training calls them, channels last."""
    encoder = trained.towers.encoder
    if trained.run.backbone.family == "vit":
        tokens = encoder(images, summary=True)
        return {"class_token": tokens[:, 0], "tokens": tokens[:, 1:]}
    maps = encoder.dcnv3(images)
    tokens = stride_tokens(encoder.heads.dcnv3_head_x3, encoder.heads.dcnv3_head_x4, maps).flatten(1, 2)
    return {f"stage_{index + 1}": one for index, one in enumerate(maps)} | {"tokens": tokens}


def last_axis(name: str, values: Tensor) -> Tensor:
    """Maps with their channels last, as ours."""
    return values.permute(0, 2, 3, 1) if name.startswith("stage") else values


def how_to_load(trained: Trained) -> str:
    """For the model card."""
    side = trained.run.views.size
    return "\n".join(
        (
            "```python",
            "import onnxruntime",
            "",
            f'session = onnxruntime.InferenceSession("{GRAPH}")',
            'outputs = session.run(None, {"images": images})     # float32 [b, 3, s, s], normalised',
            "```",
            "",
            f"Any batch, images of {side} x {side} pixels; operator set {OPSET}. Large weights lie beside the graph,",
            f"in `{GRAPH}.data`. Outputs and pixel statistics: `config.json`.",
        )
    )
