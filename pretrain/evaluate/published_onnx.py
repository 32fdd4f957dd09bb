"""How does the ONNX graph of an export become an encoder that the protocols can read? onnxruntime computes it, on the
CPU, image by image, in as little memory as any other model may take for one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pretrain.checkpoint.ranges import LARGEST_HEADER
from pretrain.config import Views
from pretrain.evaluate.published_encoder import CONFIG, Published, PublishedEncoder
from pretrain.export.names import NotProven
from pretrain.export.onnx_graph import GRAPH, open_graph
from pretrain.initial.bounds import MOST_PIXELS, require_pixels, require_statistics
from pretrain.initial.files import NOT_READ, digest_of, own_file, regular, require_as_exported
from pretrain.initial.one_image import MOST_BYTES
from pretrain.limited_memory import at_most, data_bytes
from pretrain.models.pooling import prepend_mean

if TYPE_CHECKING:  # which takes long to load, and no other model needs
    import onnx

SUFFIX = ".onnx"
TOKENS, CLASS_TOKEN = "tokens", "class_token"  # outputs of a graph; the second of a ViT's alone
PLACED = {"location", "offset", "length", "checksum"}  # what a graph tells of weights beside it
OWN = ("", "ai.onnx")  # names of the domain of ONNX's own operators
STACK = 2**23  # bytes of a thread's
AGAIN = f"export the run again by `python -m pretrain.export RUN --to {SUFFIX[1:]}`"


def is_graph(place: Path, told: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Is it an export to onnx, whose keys.json is `told`, or a graph by itself?"""
    return place.suffix == SUFFIX or told.get("format") == SUFFIX[1:] or "multiple_of" in config


def open_graph_of(place: Path, config: Mapping[str, Any], size: int | None) -> Published:
    """The encoder of an export --to onnx, a folder or the graph in it.

    ValueError for what does not fit or is hostile, FileNotFoundError for what is missing. Nothing is run but ONNX's
    own operators, without branches and loops.
    """
    folder = place if place.is_dir() else place.parent
    if place.is_file() and place.suffix != SUFFIX:
        raise ValueError(f"{place} is no graph, though its folder is of one: name {folder}")
    if place.is_dir() and not (folder / GRAPH).exists():
        raise FileNotFoundError(f"{folder / GRAPH} is missing: {AGAIN}")
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder / CONFIG} is missing, which tells of the graph: {AGAIN}")
    mean, std = require_statistics(config.get("image_mean"), config.get("image_std"), folder / CONFIG)
    side = size or require_pixels(config.get("trained_size"), folder / CONFIG, AGAIN)
    _require_multiple(side, config.get("multiple_of"), "--image-size" if size else "trained_size", folder)
    trunk = _Graph(regular(place) if place.is_file() else own_file(folder, GRAPH))
    if config.get("outputs") != trunk.outputs:
        raise ValueError(
            f"{folder / CONFIG} tells of the outputs {config.get('outputs')!r}, where {trunk.file.name} has "
            f"{trunk.outputs}: {AGAIN}"
        )
    fixed = (
        f"{trunk.file.name} is a graph, whose weights are not trained: name the run itself, or export it --to "
        "another format"
    )
    return Published(PublishedEncoder(trunk, _tokens, side, fixed), Views(size=side, mean=mean, std=std))


def _require_multiple(side: int, multiple: Any, name: str, folder: Path) -> None:
    if type(multiple) is not int or not 0 < multiple <= MOST_PIXELS:
        raise ValueError(
            f"{folder / CONFIG} has multiple_of {multiple!r}, which must be pixels in [1, {MOST_PIXELS}]: {AGAIN}"
        )
    if side % multiple:
        near = max(round(side / multiple), 1) * multiple
        raise ValueError(
            f"{name} {side} must be a multiple of {multiple}, as {folder / CONFIG} tells: give --image-size {near}"
        )


class _Graph(nn.Module):
    """A session of onnxruntime as a module: images [b, 3, s, s] -> [b, 1 + l, width], on any device."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        weights = _files_of_weights(file)
        for one in (file, *weights):
            require_as_exported(one)
        num_bytes, threads = sum(one.stat().st_size for one in weights), torch.get_num_threads() * STACK
        most = MOST_BYTES + 2 * num_bytes + threads  # weights lie there once more where they are transposed
        before = data_bytes()
        try:
            with at_most(most):
                self.session = open_graph(file)
        except NotProven as error:
            raise ValueError(f"{file} cannot be computed ({_first_line(error)}): {AGAIN}") from error
        self.most = most - max(data_bytes() - before, 0)
        told = {one.name: one.type for one in self.session.get_outputs()}
        self.outputs = list(told)
        self.read = [name for name in (CLASS_TOKEN, TOKENS) if name in told]
        inputs = {one.name: one.type for one in self.session.get_inputs()}
        floats = {name: "tensor(float)" for name in (*inputs, *self.read)}
        if TOKENS not in told or list(inputs) != ["images"] or inputs | told != told | floats:
            raise ValueError(
                f"{file} takes {inputs} and gives {told}, where a graph takes images and gives {TOKENS}, both of "
                f"tensor(float): {AGAIN}"
            )
        self.shape: torch.Size | None = None  # of what one image gives
        # By which a head's interrupted training knows its encoder, that has no weights of torch.
        digest = hashlib.sha256("".join(digest_of(one) for one in (file, *weights)).encode()).digest()
        self.register_buffer("digest", torch.frombuffer(bytearray(digest), dtype=torch.uint8))

    def forward(self, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b n d"]:
        found = [self._of_one(image) for image in images.detach().float().cpu().split(1)]
        return torch.cat(found).to(images.device)

    def _of_one(self, image: Float[Tensor, "1 3 s s"]) -> Float[Tensor, "1 n d"]:
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.log_severity_level = 4  # errors are raised
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        try:
            with at_most(self.most):
                values = self.session.run(self.read, {"images": image.numpy()}, options)
        except Exception as error:  # onnxruntime has classes of its own
            raise ValueError(
                f"{self.file} cannot be computed for an image of {image.shape[-1]} pixels a side, for which a model "
                f"may take {MOST_BYTES / 2**30:g} GiB beside its weights ({_first_line(error)}): give smaller images "
                f"by --image-size, or {AGAIN}"
            ) from error
        *summary, tokens = map(torch.from_numpy, values)
        is_row = tokens.ndim == 3 and len(tokens) == 1 and tokens.numel() > 0
        if not is_row or any(one.shape != (1, tokens.shape[-1]) for one in summary):
            self._refuse(f"gives outputs of the shapes {[one.shape for one in values]} for one image")
        found = torch.cat([summary[0][:, None], tokens], dim=1) if summary else prepend_mean(tokens)
        if not bool(found.isfinite().all()):
            self._refuse("gives other than finite numbers")
        if found.shape != (self.shape or found.shape):
            self._refuse(
                f"gives {found.shape[1] - 1} tokens for one image and {self.shape[1] - 1} for another"
            )
        self.shape = found.shape
        return found

    def _refuse(self, why: str) -> None:
        raise ValueError(
            f"{self.file} {why}, where tokens are finite numbers [1, number, width] and a class token is [1, width]: "
            f"{AGAIN}"
        )


def _tokens(graph: nn.Module, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b n d"]:
    return graph(images)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][-300:]


def _files_of_weights(file: Path) -> list[Path]:
    """Those beside a graph that hold its weights, judged before anything reads them.

    ValueError unless it is one graph of ONNX's own operators, without branches and loops, whose weights lie right in
    its folder, each once.
    """
    import onnx

    if file.stat().st_size > LARGEST_HEADER:
        raise ValueError(
            f"{file} has {file.stat().st_size:,} bytes, more than {LARGEST_HEADER:,} of a graph, whose weights lie "
            f"beside it: it {NOT_READ}"
        )
    try:
        with at_most(MOST_BYTES):
            model = onnx.load(file, load_external_data=False)
    except Exception as error:  # protobuf has classes of its own
        raise ValueError(f"{file} is no sound ONNX graph ({_first_line(error)}): {AGAIN}") from error
    if odd := _odd_parts(model):
        raise ValueError(
            f"{file} has {', '.join(odd)}, where an export is one graph of ONNX's own operators: it {NOT_READ}"
        )
    try:
        return _weights_beside(file, [one for one in model.graph.initializer if one.data_location == 1])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error.filename} is missing, with weights of {file}: {AGAIN}") from error


def _odd_parts(model: onnx.ModelProto) -> list[str]:
    """What no export has: of some a few bytes take any time or memory."""
    import onnx

    kinds, nodes = onnx.AttributeProto, model.graph.node
    plain = (kinds.FLOAT, kinds.INT, kinds.STRING, kinds.TENSOR, kinds.FLOATS, kinds.INTS, kinds.STRINGS)
    others = sorted({f"{one.domain}::{one.op_type}" for one in nodes if one.domain not in OWN})
    inner = [(node, one) for node in nodes for one in node.attribute]
    odd = sorted({node.op_type for node, one in inner if one.type not in plain or one.t.data_location})
    return [
        *(["functions"] if model.functions else []),
        *(["sparse weights"] if model.graph.sparse_initializer else []),
        *(f"the operator {name}" for name in others[:3]),
        *(f"an attribute of {name} that is a graph or lies elsewhere" for name in odd[:3]),
    ]


def _weights_beside(file: Path, tensors: Iterable[onnx.TensorProto]) -> list[Path]:
    sizes: dict[Path, int] = {}
    taken = 0
    for tensor in tensors:
        told = {entry.key: entry.value for entry in tensor.external_data}
        path = own_file(file.parent, told.get("location", ""))
        size = sizes.setdefault(path, path.stat().st_size)
        if len(told) < len(tensor.external_data) or told.keys() - PLACED:
            keys = sorted(entry.key for entry in tensor.external_data)
            raise ValueError(
                f"{file} places {tensor.name!r} by {keys}, where {sorted(PLACED)} may stand once: it {NOT_READ}"
            )
        numbers = [told.get("offset", "0"), told.get("length", str(size))]
        begin, length = (int(one) if one.isdecimal() and len(one) < 20 else -1 for one in numbers)
        if min(begin, length) < 0 or begin + length > size:
            raise ValueError(
                f"{path} has {size:,} bytes, where {file.name} has {tensor.name!r} at {numbers[0]} of {numbers[1]}: "
                "copy the folder again"
            )
        taken += length
    if taken > sum(sizes.values()):
        raise ValueError(
            f"{file} has weights of {taken:,} bytes in files of {sum(sizes.values()):,}, where each lies there once: "
            f"it {NOT_READ}"
        )
    return list(sizes)
