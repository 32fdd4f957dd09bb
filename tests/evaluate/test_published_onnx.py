"""Does an ONNX graph that is evaluated give its tokens at any size, and say what is wrong before it takes memory?"""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper

from pretrain.evaluate.fine_tune_state import hash_of
from pretrain.evaluate.published import open_published
from tests.memory import little_memory

WEIGHT = np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32) / 16
CONFIG = {
    "multiple_of": 16,
    "trained_size": 32,
    "outputs": ["tokens"],
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def write(folder: Path, more: Callable[[onnx.ModelProto], None] | None = None, **config: Any) -> None:
    """A convolution of patches whose weight lies beside the graph, changed by `more`."""
    nodes = [
        helper.make_node("Conv", ["images", "weight"], ["map"], strides=[16, 16]),
        helper.make_node("Reshape", ["map", "shape"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["last"], perm=[0, 2, 1]),
        helper.make_node("Mul", ["last", "factor"], ["tokens"]),
    ]
    weights = {"weight": WEIGHT, "shape": np.array([0, 8, -1]), "factor": np.ones(1, np.float32)}
    graph = helper.make_graph(
        nodes,
        "patches",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["b", 3, "h", "w"])],
        [helper.make_tensor_value_info("tokens", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (folder / "model.onnx.data").unlink(missing_ok=True)
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    if more is not None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        more(model)
        (folder / "model.onnx").write_bytes(model.SerializeToString())
    (folder / "config.json").write_text(json.dumps(CONFIG | config))


def test_tokens_are_the_graph_s_at_any_size_and_in_any_batch(tmp_path: Path) -> None:
    write(tmp_path)
    for size, side in ((None, 32), (80, 80)):
        found, images = open_published(tmp_path, size), torch.randn(3, 3, side, side)
        expected = F.conv2d(images, torch.from_numpy(WEIGHT), stride=16).flatten(2).mT
        torch.testing.assert_close(found.encoder(images), expected, rtol=1e-4, atol=1e-5)
        summary = found.encoder(images, summary=True)[:, 0]
        torch.testing.assert_close(summary, expected.mean(dim=1), rtol=1e-4, atol=1e-5)
        assert (found.views.size, found.encoder.width, found.encoder.stride) == (side, 8, 16)


def test_a_kept_training_knows_the_graph_by_its_weights(tmp_path: Path) -> None:
    digests = set()
    for changed in (False, True, True):
        write(tmp_path)
        content = bytearray((tmp_path / "model.onnx.data").read_bytes())
        content[0] ^= changed
        (tmp_path / "model.onnx.data").write_bytes(content)
        digests.add(hash_of(open_published(tmp_path).encoder.state_dict()))
    assert len(digests) == 2


def located(location: str, **numbers: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(one for one in model.graph.initializer if one.name == "weight")
        for entry in tensor.external_data:
            entry.value = location if entry.key == "location" else str(numbers.get(entry.key, entry.value))

    return change


def placed_twice(model: onnx.ModelProto) -> None:
    entry = model.graph.initializer[0].external_data.add()
    entry.key, entry.value = "location", "model.onnx.data"


def followed(kind: str, inputs: list[str], **attributes: Any) -> Callable[[onnx.ModelProto], None]:
    """Another operator comes last."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.node[-1].output[0] = "before"
        model.graph.node.append(helper.make_node(kind, inputs, ["tokens"], **attributes))

    return change


def branched(model: onnx.ModelProto) -> None:
    then = helper.make_graph([], "then", [], [])
    model.graph.node.append(helper.make_node("If", ["factor"], [], then_branch=then, else_branch=then))


def with_functions(model: onnx.ModelProto) -> None:
    opsets = [helper.make_opsetid("", 20)]
    one = helper.make_node("Identity", ["a"], ["b"])
    model.functions.append(helper.make_function("own", "twice", ["a"], ["b"], [one], opsets))


def sparse(model: onnx.ModelProto) -> None:
    values, at = (helper.make_tensor(n, t, [1], [1]) for n, t in (("s", 1), ("i", TensorProto.INT64)))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, at, [10**12]))


def named(name: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node[-1].output[0] = model.graph.output[0].name = name

    return change


def halved(model: onnx.ModelProto) -> None:
    followed("Cast", ["before"], to=TensorProto.FLOAT16)(model)
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def filled(*sizes: int) -> Callable[[onnx.ModelProto], None]:
    """The largest of zeros of that shape is added to the tokens."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.array(sizes), "sizes"))
        model.graph.node[-1].output[0] = "before"
        model.graph.node.append(helper.make_node("ConstantOfShape", ["sizes"], ["zeros"]))
        model.graph.node.append(helper.make_node("ReduceMax", ["zeros"], ["zero"], keepdims=0))
        model.graph.node.append(helper.make_node("Add", ["before", "zero"], ["tokens"]))

    return change


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (located("../model.onnx.data"), r"names the file '\.\./model\.onnx\.data', which lies elsewhere"),
        (located("*/_ORT_MEM_ADDR_/*"), r"which lies elsewhere"),
        (located("other.data"), r"other\.data is missing, with weights of .*export the run again"),
        (located("model.onnx.data", offset=4), r"bytes, where model\.onnx has 'weight' at 4 of 24576: copy"),
        (located("model.onnx.data", length=-1), r"at 0 of -1: copy the folder again"),
        (
            with_functions,
            r"has functions, where an export is one graph of ONNX's own operators: it is not read",
        ),
        (sparse, "has sparse weights"),
        (branched, "has an attribute of If that is a graph or lies elsewhere"),
        (followed("Own", ["before"], domain="own"), "has the operator own::Own"),
        (followed("Nonsense", ["before"]), r"cannot be computed \(.*Nonsense.*: export the run again"),
        (named("features"), r"gives {'features': .*}, where a graph takes images and gives tokens"),
        (
            followed("ReduceMean", ["before"], keepdims=0),
            r"gives outputs of the shapes \[\(\)\] for one image",
        ),
        (followed("Log", ["before"]), "gives other than finite numbers"),
        (halved, r"tensor\(float16\).* both of tensor\(float\)"),
        (
            filled(5, 2**28),
            r"an image of 32 pixels a side, for which a model may take 4 GiB beside its weights \(.*allocate",
        ),
    ],
)
def test_a_graph_that_is_no_export_is_told(
    more: Callable[[onnx.ModelProto], None], told: str, tmp_path: Path
) -> None:
    write(tmp_path, more)
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        open_published(tmp_path)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"multiple_of": 0}, r"has multiple_of 0, which must be pixels in \[1, 4096\]: export the run again"),
        ({"multiple_of": "16"}, "has multiple_of '16'"),
        ({"trained_size": None}, "tells images of None pixels a side"),
        (
            {"trained_size": 40},
            r"trained_size 40 must be a multiple of 16, as .* tells: give --image-size 32",
        ),
        ({"image_std": [1, 1, 0]}, "std above 0"),
        (
            {"outputs": ["class_token", "tokens"]},
            r"tells of the outputs .*, where model\.onnx has \['tokens'\]",
        ),
    ],
)
def test_a_config_that_does_not_fit_its_graph_is_told(
    config: dict[str, Any], told: str, tmp_path: Path
) -> None:
    write(tmp_path, **config)
    with pytest.raises(ValueError, match=told):
        open_published(tmp_path)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_bytes_other_than_those_that_were_exported_are_refused(name: str, tmp_path: Path) -> None:
    write(tmp_path)
    digest = sha256((tmp_path / name).read_bytes()).hexdigest()
    (tmp_path / "keys.json").write_text(json.dumps({"format": "onnx", "sha256": {name: digest}}))
    open_published(tmp_path)
    if name == "model.onnx":
        write(tmp_path, followed("Relu", ["before"]))
    else:
        (tmp_path / name).write_bytes(bytes(WEIGHT.nbytes))
    with pytest.raises(
        ValueError, match=rf"{name} has SHA-256 .*, keys.json .*{digest[:12]}.*copy the export"
    ):
        open_published(tmp_path)


def test_damaged_files_of_a_graph_are_told(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=r"--image-size 40 must be a multiple of 16, as .*--image-size 32"):
        open_published(tmp_path, 40)
    data = tmp_path / "model.onnx.data"
    with pytest.raises(ValueError, match=r"model\.onnx\.data is no graph, though its folder is of one: name"):
        open_published(data)
    whole = data.read_bytes()
    data.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"has 24,572 bytes, where model\.onnx has 'weight'"):
        open_published(tmp_path)
    elsewhere = tmp_path.parent / f"{tmp_path.name}.data"
    elsewhere.write_bytes(whole)
    data.unlink()
    data.symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"is a link that leads out of the folder"):
        open_published(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match=r"model\.onnx is no sound ONNX graph .*: export the run again"):
        open_published(tmp_path)
    with (tmp_path / "model.onnx").open("wb") as file:
        file.truncate(2**40)
    with little_memory(), pytest.raises(ValueError, match=r"bytes, more than 33,554,432 of a graph"):
        open_published(tmp_path)
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.onnx is missing: export the run again"):
        open_published(tmp_path)
