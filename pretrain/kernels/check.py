"""Does a DCNv3 path equal the reference on this device, does it repeat, and how long does it take?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median

import torch
from torch import Tensor

from pretrain.kernels.dcnv3 import dcnv3, dcnv3_packed
from pretrain.kernels.dcnv3_choice import Call, Choice, choose_path
from pretrain.kernels.packed_row import COLUMNS, FIRST_LOGIT

# Greatest error over the greatest number of a result: rounding of inputs' dtype, sums in float32.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
CHECKED_GROUPS = 4  # of each shape: enough to see every mistake, and the float64 reference stays small
QUEUED = 10  # calls between two events of a GPU
NAMES = ("out", "grad_value", "grad_offset_and_mask")
Operator = Callable[..., Tensor]  # (path, value, packed) or (path, value, offset, mask) -> out


@dataclass(frozen=True)
class Kind:
    """A kind of call: sizes, and options of `dcnv3`; without options it comes as packed rows."""

    images: int
    side: int  # height and width of the value
    groups: int
    group_width: int
    has_scale: bool = True
    options: dict[str, int | bool] = field(default_factory=dict)

    def choice(self, device: torch.device, dtype: torch.dtype) -> Choice:
        return choose_path(
            Call(device.type, dtype, self.group_width, is_packed=not self.options, **self.options)
        )


# The stages of InternImage-H at 192 px, the first of InternImage-T at 224 px, and what no published size uses.
KINDS = {
    "H stage 1": Kind(2, 48, 10, 32),
    "H stage 2": Kind(2, 24, 20, 32),
    "H stage 3": Kind(2, 12, 40, 32),
    "H stage 4": Kind(2, 6, 80, 32),
    "T stage 1": Kind(2, 56, 4, 16, has_scale=False),
    "group width 24": Kind(2, 14, 4, 24),
    "without centre": Kind(2, 14, 4, 16, options={"remove_center": True}),
    "5 x 5, stride 2": Kind(2, 14, 4, 16, options={"kernel_size": 5, "stride": 2, "padding": 2}),
    "dilation 2": Kind(2, 14, 4, 16, options={"dilation": 2, "padding": 2}),
}


@dataclass(frozen=True)
class Check:
    errors: dict[str, float]  # greatest error of each result over its greatest number
    is_repeatable: bool  # a second pass gave the same bits

    def is_close(self, dtype: torch.dtype) -> bool:
        return all(error < LIMITS[dtype] for error in self.errors.values())  # False for NaN

    @property
    def largest(self) -> float:
        """Greatest error of all; NaN if one is."""
        return max(self.errors.values(), key=lambda error: (math.isnan(error), error))


def inputs(kind: Kind, device: torch.device, dtype: torch.dtype, spread: float = 1.0) -> list[Tensor]:
    """Operands of a call, then a gradient of its output; offsets of `spread` pixels, seeded."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    channels, side = kind.groups * kind.group_width, kind.side
    value = normal(kind.images, side, side, channels)
    if not kind.options:
        packed = normal(kind.images, side, side, kind.groups, COLUMNS)
        packed[..., :FIRST_LOGIT] = exact_pixels(packed[..., :FIRST_LOGIT] * spread)
        operands = [value, packed, normal(*value.shape)]
    else:
        size, stride = kind.options.get("kernel_size", 3), kind.options.get("stride", 1)
        reach = kind.options.get("dilation", 1) * (size - 1) + 1
        out = (side + 2 * kind.options.get("padding", 1) - reach) // stride + 1
        points = size**2 - kind.options.get("remove_center", False)
        offset = exact_pixels(normal(kind.images, out, out, kind.groups * points * 2) * spread)
        mask = normal(kind.images, out, out, kind.groups, points).softmax(-1).flatten(-2)
        operands = [value, offset, mask, normal(kind.images, out, out, channels)]
    return [operand.to(dtype) for operand in operands]


def exact_pixels(offset: Tensor) -> Tensor:
    """Offsets in steps of 1/32 pixel: locations are exact in every dtype, so that none is rounded into the
    neighbouring cell, where the offset's gradient is another one.
    """
    return (offset * 32).round() / 32


def operator(kind: Kind, **extra: bool) -> Operator:
    """(path, *operands) -> out, for this kind of call; `extra` options go to `dcnv3_packed`."""
    if kind.options:
        return lambda path, *operands: dcnv3(*operands, groups=kind.groups, path=path, **kind.options)
    return lambda path, *operands: dcnv3_packed(*operands, has_scale=kind.has_scale, path=path, **extra)


def derivatives(function: Operator, path: str, operands: list[Tensor]) -> list[Tensor]:
    """Output, gradient of the value, and of all else, side by side."""
    *leaves, grad = operands
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(path, *leaves)
    of_value, *rest = torch.autograd.grad(out, leaves, grad)
    return [out.detach(), of_value, torch.cat([tensor.flatten(3) for tensor in rest], dim=-1)]


def check(kind: Kind, device: torch.device, dtype: torch.dtype, path: str) -> Check:
    """Compares forward and backward with the float64 reference, and with themselves."""
    small = replace(kind, groups=min(kind.groups, CHECKED_GROUPS))
    operands, function = inputs(small, device, dtype), operator(small)
    found, again = (derivatives(function, path, operands) for _ in range(2))
    expected = derivatives(function, "reference", [operand.double() for operand in operands])
    errors = {
        name: float((a.double() - b).abs().max() / b.abs().max())
        for name, a, b in zip(NAMES, found, expected, strict=True)
    }
    return Check(errors, all(torch.equal(a, b) for a, b in zip(found, again, strict=True)))


def seconds(function: Callable[[], object], device: torch.device, rounds: int = 20) -> float:
    """Median time of one call, after a first that may compile; on a GPU between events of its stream, several
    calls at a time, so that the device does not wait for the host.
    """
    function()
    times = []
    for _ in range(rounds):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(QUEUED):
                function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / QUEUED)
        else:
            begun = time.perf_counter()
            function()
            times.append(time.perf_counter() - begun)
    return median(times)


def pass_seconds(
    kind: Kind, device: torch.device, dtype: torch.dtype, path: str, rounds: int = 20, **extra: bool
) -> tuple[float, float]:
    """Seconds of a forward pass, and of forward and backward, of the whole kind."""
    *leaves, grad = inputs(kind, device, dtype)
    function = operator(kind, **extra)
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def forward() -> None:
        with torch.no_grad():
            function(path, *leaves)

    def both() -> None:
        torch.autograd.grad(function(path, *leaves), leaves, grad)

    return seconds(forward, device, rounds), seconds(both, device, rounds)
