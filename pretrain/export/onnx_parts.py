"""How does a deep network become an ONNX graph without tracing every block? One of a kind is traced, all are placed.

Tracing takes seconds a block, whatever its width. So a graph is put together from parts: a module is traced when the
first of its kind comes, for any batch, height and width, and becomes a function of its inputs and its weights; each
module of that kind is a call with weights of its own. In the end the functions are inlined. Single layers are nodes.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnx_ir.tensor_adapters import TorchTensor
from onnxscript import optimizer
from torch import Tensor, nn
from torch.export import Dim

TO_FIRST, TO_LAST = (0, 3, 1, 2), (0, 2, 3, 1)  # where the channels of a map go
DOMAIN = "parts"  # of the functions, which are gone in the end
Axes = dict[int, Any]  # axis -> torch.export's Dim: those that may be of any length


@dataclass(frozen=True)
class Placed:
    """A value of the graph, and a tensor of its shape to trace the next part with."""

    value: ir.Value
    example: Tensor


class Parts:
    """A graph of one input [batch, 3, height, width] that grows by calls; `save` writes it."""

    def __init__(self, example: Tensor, opset: int) -> None:
        shape = ir.Shape(["batch", 3, "height", "width"])
        value = ir.Value(name="images", shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
        self.images = Placed(value, example)
        self.graph = ir.Graph([value], [], nodes=[], opset_imports={"": opset, DOMAIN: 1}, name="main")
        self.opset = opset
        self._traced: dict[str, ir.Function] = {}
        self._examples: dict[tuple, tuple[Tensor, ...]] = {}
        self._constants: dict[str, ir.Value] = {}

    def __call__(
        self, kind: str, module: nn.Module, prefix: str, inputs: Sequence[Placed], axes: Sequence[Axes]
    ) -> tuple[Placed, ...]:
        """What the module gives for the inputs. Its weights get `prefix` before their names.

        Modules of one `kind` compute the same but for their weights, and, unless they split channels, for the number
        of channels.
        """
        examples = [one.example for one in inputs]
        if kind not in self._traced:
            self._trace(kind, module, examples, axes)
        shapes = (kind, *(tuple(one.shape) for one in examples))
        if shapes not in self._examples:
            with torch.no_grad():
                found = module(*examples)
            self._examples[shapes] = found if isinstance(found, tuple) else (found,)
        function, weights = self._traced[kind], module.state_dict(keep_vars=True)
        taken = [one.value for one in inputs]
        for value in function.inputs[len(inputs) :]:
            name = value.name
            taken.append(self._constants.get(f"{kind}.{name}") or self._weight(prefix + name, weights[name]))
        call = ir.node(kind, taken, domain=DOMAIN, num_outputs=len(function.outputs))
        self.graph.append(call)
        return tuple(map(Placed, call.outputs, self._examples[shapes]))

    def transposed(self, placed: Placed, axes: Sequence[int]) -> Placed:
        """The axes of a value in another order."""
        return self.node("Transpose", [placed.value], {"perm": list(axes)}, placed.example.permute(*axes))

    def convolved(self, convolution: nn.Conv2d, prefix: str, placed: Placed) -> Placed:
        """A convolution of a map [b, c, h, w]."""
        (rows, columns), attributes = convolution.padding, {}
        attributes["strides"], attributes["pads"] = list(convolution.stride), [rows, columns, rows, columns]
        with torch.no_grad():
            example = convolution(placed.example)
        return self.node("Conv", [placed.value, *self._weights(convolution, prefix)], attributes, example)

    def normalised(self, norm: nn.LayerNorm, prefix: str, placed: Placed) -> Placed:
        """A LayerNorm of the last axis."""
        inputs = [placed.value, *self._weights(norm, prefix)]
        return self.node("LayerNormalization", inputs, {"epsilon": norm.eps}, placed.example)

    def linear(self, linear: nn.Linear, prefix: str, placed: Placed) -> Placed:
        """A linear layer of the last axis."""
        weight, *bias = self._weights(linear, prefix)
        with torch.no_grad():
            example = linear(placed.example)
        columns = self.node("Transpose", [weight], {"perm": [1, 0]}, linear.weight)
        product = self.node("MatMul", [placed.value, columns.value], {}, example)
        return self.node("Add", [product.value, *bias], {}, example) if bias else product

    def activated(self, placed: Placed) -> Placed:
        """GELU."""
        return self.node("Gelu", [placed.value], {}, placed.example)

    def node(
        self, kind: str, inputs: Sequence[ir.Value], attributes: dict[str, Any], example: Tensor
    ) -> Placed:
        """One operator of ONNX; `example` is what it gives for examples."""
        node = ir.node(kind, inputs, attributes)
        self.graph.append(node)
        return Placed(node.outputs[0], example)

    def numbers(self, *values: int) -> ir.Value:
        """A constant vector."""
        name = f"numbers.{'.'.join(map(str, values))}"
        if name not in self.graph.initializers:
            data = ir.tensor(list(values), dtype=ir.DataType.INT64, name=name)
            value = ir.Value(name=name, shape=data.shape, type=ir.TensorType(data.dtype), const_value=data)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def _weights(self, module: nn.Module, prefix: str) -> list[ir.Value]:
        return [self._weight(prefix + name, tensor) for name, tensor in module.named_parameters()]

    def output(self, name: str, placed: Placed, shape: Sequence[str | int]) -> None:
        """Makes a value an output of the graph, under a name and with the shape that readers see."""
        identity = ir.node("Identity", [placed.value])
        (value,) = identity.outputs
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
        self.graph.append(identity)
        self.graph.outputs.append(value)

    def save(self, path: Path) -> None:
        """Writes the graph, and its weights beside it in `NAME.data`."""
        functions = list(self._traced.values())
        model = ir.Model(self.graph, ir_version=10, producer_name="pretrain", functions=functions)
        common.InlinePass()(model)
        self.graph.opset_imports.pop(DOMAIN)
        common.CommonSubexpressionEliminationPass()(model)
        common.IdentityEliminationPass()(model)
        common.RemoveUnusedNodesPass()(model)
        ir.save(model, path, external_data=f"{path.name}.data")

    def _weight(self, name: str, tensor: Tensor) -> ir.Value:
        if name not in self.graph.initializers:
            data = TorchTensor(tensor.detach(), name=name)
            value = ir.Value(name=name, shape=data.shape, type=ir.TensorType(data.dtype), const_value=data)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def _trace(self, kind: str, module: nn.Module, examples: list[Tensor], axes: Sequence[Axes]) -> None:
        graph = traced(module, examples, axes, self.opset)
        for name, value in _initializers_to_inputs(graph, list(graph.initializers)):
            constant = ir.Value(
                name=f"{kind}.{name}", shape=value.shape, type=value.type, const_value=value.const_value
            )
            self.graph.register_initializer(constant)
            self._constants[constant.name], value.const_value = constant, None
        self._traced[kind] = ir.Function(DOMAIN, kind, graph=graph, attributes=())


def traced(module: nn.Module, examples: list[Tensor], axes: Sequence[Axes], opset: int) -> ir.Graph:
    """The simplified graph of a module, whose weights are inputs; its values have no shapes, whose symbols would mean
    nothing in the whole graph.

    What needs no input is computed, and what is computed twice once. The exporter's own optimisation tries each rule
    of rewriting on each node besides: forty times as long for 7 % fewer nodes, which onnxruntime computes no faster.
    """
    with torch.inference_mode(False), warnings.catch_warnings(), open(os.devnull, "w") as nowhere:
        warnings.simplefilter("ignore")  # of torch.export and onnxscript about themselves
        with contextlib.redirect_stdout(nowhere):
            program = torch.onnx.export(
                module.eval(),
                tuple(torch.zeros(one.shape) for one in examples),
                dynamo=True,
                dynamic_shapes=tuple(axes),
                opset_version=opset,
                verbose=False,
                optimize=False,
            )
    model, weights = program.model, module.state_dict()
    for _, value in _initializers_to_inputs(
        model.graph, [n for n in model.graph.initializers if n in weights]
    ):
        value.const_value = None  # other modules have others: nothing is computed of these
    common.InlinePass()(model)
    optimizer.fold_constants(model)
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    for node in model.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.shape = None
            value.metadata_props.clear()
    return model.graph


def _initializers_to_inputs(graph: ir.Graph, names: Sequence[str]) -> list[tuple[str, ir.Value]]:
    values = [(name, graph.initializers.pop(name)) for name in names]
    graph.inputs.extend(value for _, value in values)
    return values


def map_axes(rows: Any = None, columns: Any = None) -> Axes:
    """Of a map [batch, channels, rows, columns]."""
    return {0: Dim("batch"), 2: rows or Dim("rows"), 3: columns or Dim("columns")}


def last_axes() -> Axes:
    """Of a map with its channels last, [batch, rows, columns, channels]."""
    return {0: Dim("batch"), 1: Dim("rows"), 2: Dim("columns")}


def token_axes() -> Axes:
    """Of tokens [batch, number, channels]."""
    return {0: Dim("batch"), 1: Dim("number")}
