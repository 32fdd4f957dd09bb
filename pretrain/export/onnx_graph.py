"""How does a run become a graph that onnxruntime computes, for any batch, height and width?"""

from __future__ import annotations

import ctypes
import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.export.agreement import Agreement, compare, random_images
from pretrain.export.described import internimage_arguments, vit_arguments
from pretrain.export.keys import Keys
from pretrain.export.names import NotProven
from pretrain.export.own_features import own_features
from pretrain.export.remote_code.internimage_network import InternImageNetwork
from pretrain.export.remote_code.vit_network import ViTNetwork
from pretrain.export.trained import Trained
from pretrain.models.internimage import INTERNIMAGE

if TYPE_CHECKING:  # its packages take seconds to load, and no other format needs them
    from pretrain.export.onnx_parts import Parts

GRAPH = "model.onnx"
OPSET = 20  # the first with GridSample of more than images


@dataclass(frozen=True)
class Family:
    """What the backbones of one family differ in."""

    prefixes: tuple[str, ...]  # of the tensors in our towers that are part of the graph
    multiple: Callable[[Trained], int]  # pixels, of which an image's sides are multiples
    add: Callable[[Trained, Parts], None]
    # Positions of the coarsest map in what is traced: lengths that are 1, or equal, would not stay open.
    example: Callable[[Trained], tuple[int, int]]
    outputs: Callable[[dict[str, Tensor]], dict[str, Tensor]]  # of our features those of the graph
    remark: str  # for the model card


def _internimage(trained: Trained, parts: Parts) -> None:
    from pretrain.export.onnx_networks import add_internimage, add_tokens

    with torch.device("meta"):
        network = InternImageNetwork(**internimage_arguments(trained))
    encoder, config = trained.towers.encoder, INTERNIMAGE[trained.run.backbone.size]
    network.load_state_dict(encoder.dcnv3.state_dict(), strict=True, assign=True)
    maps, heads = add_internimage(parts, network, "encoder.dcnv3."), encoder.heads
    for index, (one, width, stride) in enumerate(zip(maps, config.widths, config.strides, strict=True)):
        parts.output(f"stage_{index + 1}", one, ["batch", width, f"height/{stride}", f"width/{stride}"])
    tokens = add_tokens(parts, maps, heads.dcnv3_head_x3, heads.dcnv3_head_x4, "encoder.heads.")
    parts.output("tokens", tokens, ["batch", "number of tokens", encoder.width])


def _internimage_outputs(features: dict[str, Tensor]) -> dict[str, Tensor]:
    maps = {name.replace(" ", "_"): one for name, one in features.items() if name.startswith("stage ")}
    return {name: one.permute(0, 3, 1, 2) for name, one in maps.items()} | {"tokens": features["tokens"]}


def _vit(trained: Trained, parts: Parts) -> None:
    from pretrain.export.onnx_networks import add_vit

    with torch.device("meta"):
        network = ViTNetwork(**vit_arguments(trained))
    encoder = trained.towers.encoder
    network.load_state_dict(encoder.vit.state_dict(), strict=True, assign=True)
    class_token, tokens = add_vit(parts, network, "encoder.vit.")
    parts.output("class_token", class_token, ["batch", encoder.width])
    parts.output("tokens", tokens, ["batch", "number of tokens", encoder.width])


def _vit_outputs(features: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"class_token": features["summary"], "tokens": features["tokens"]}


def _swin(trained: Trained, parts: Parts) -> None:
    from pretrain.export.onnx_swin import add_swin

    encoder = trained.towers.encoder
    tokens = add_swin(parts, encoder.swin, "encoder.swin.")
    parts.output("tokens", tokens, ["batch", "number of tokens", encoder.width])


def _windows(trained: Trained) -> tuple[int, int]:
    """Of the last stage two windows and three, not all of them full."""
    high, wide = trained.towers.encoder.swin.layers[-1].blocks[0].window_size
    return high + 1, 2 * wide + 1


# By backbone.family.
GRAPHS: dict[str, Family] = {
    "internimage": Family(
        ("encoder.dcnv3.", "encoder.heads."),
        lambda trained: INTERNIMAGE[trained.run.backbone.size].strides[-1],
        _internimage,
        lambda trained: (2, 3),
        _internimage_outputs,
        "Sampling of DCNv3 is `GridSample`: no operator is built.",
    ),
    "swin": Family(
        ("encoder.swin.",),
        lambda trained: trained.towers.encoder.stride,
        _swin,
        _windows,
        lambda features: {"tokens": features["tokens"]},
        "Windows stay as large as they were trained, whatever the size; grids are padded to whole windows.",
    ),
    "vit": Family(
        ("encoder.vit.",),
        lambda trained: trained.towers.encoder.stride,
        _vit,
        lambda trained: (2, 3),
        _vit_outputs,
        "Position embeddings are resized within the graph, bicubically with antialiasing, as in pre-training.",
    ),
}


def write(trained: Trained, folder: Path) -> dict[str, Keys]:
    """Writes the graph, its weights beside it, and config.json."""
    from pretrain.export.onnx_parts import Parts

    family, views = GRAPHS[trained.run.backbone.family], trained.run.views
    multiple, (rows, columns) = family.multiple(trained), family.example(trained)
    parts = Parts(torch.zeros(2, 3, rows * multiple, columns * multiple), OPSET)
    family.add(trained, parts)
    parts.save(folder / GRAPH)
    told = {
        "inputs": {"images": ["batch", 3, "height", "width"]},
        "multiple_of": multiple,
        "trained_size": views.size,
        "outputs": [value.name for value in parts.graph.outputs],
        "image_mean": list(views.mean),
        "image_std": list(views.std),
        "opset": OPSET,
    }
    (folder / "config.json").write_text(json.dumps(told, indent=1) + "\n")
    state = trained.towers.state_dict()
    written = {name: name for name in state if name.startswith(family.prefixes)}
    assert written.keys() <= parts.graph.initializers.keys()
    skipped = {name: "no part of the graph" for name in state if name not in written}
    return {GRAPH: Keys(written, skipped).require_whole(state, written.values())}


@torch.inference_mode()
def prove(trained: Trained, folder: Path) -> list[Agreement]:
    """Computes the graph in onnxruntime at two sizes, in two batches, and compares every output.

    The towers of a `trained` that is the last are on the meta device then. Raises NotProven.
    """
    family, size, agreements = GRAPHS[trained.run.backbone.family], trained.run.views.size, []
    shown = {size: 2, size + 2 * trained.towers.encoder.stride: 1}
    of_sizes = {side: family.outputs(own_features(trained, side)) for side in shown}
    if trained.is_last:
        _let_go(trained)  # onnxruntime has the weights once more, as it transposes them
    session = open_graph(folder / GRAPH)
    for side, number in shown.items():
        ours = of_sizes[side]
        found = session.run(list(ours), {"images": random_images(side)[:number].numpy()})
        for (name, own), values in zip(ours.items(), map(torch.from_numpy, found), strict=True):
            output = f"{name} of {number} image{'s' * (number > 1)}"
            agreements.append(compare(GRAPH, output, side, vectors(own[:number]), vectors(values)))
    return agreements


def _let_go(trained: Trained) -> None:
    """The weights of the towers, and the memory that they had, which glibc keeps of tensors below its threshold."""
    trained.towers.to("meta")
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def vectors(values: Tensor) -> Tensor:
    """Maps with their channels last; others as they are."""
    return values.permute(0, 2, 3, 1) if values.ndim == 4 else values


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


def how_to_load(trained: Trained) -> str:
    """For the model card."""
    side, multiple = trained.run.views.size, GRAPHS[trained.run.backbone.family].multiple(trained)
    return "\n".join(
        (
            "```python",
            "import onnxruntime",
            "",
            f'session = onnxruntime.InferenceSession("{GRAPH}")',
            'outputs = session.run(None, {"images": images})     # float32 [b, 3, h, w], normalised',
            "```",
            "",
            f"Any batch, and images of any height and width that are multiples of {multiple} pixels; trained at",
            f"{side} x {side}. Operator set {OPSET}. The weights lie beside it, in `{GRAPH}.data`; outputs and",
            f"pixel statistics: `config.json`. {GRAPHS[trained.run.backbone.family].remark}",
        )
    )
