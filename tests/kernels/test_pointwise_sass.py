"""Is the machine code of the kernels around DCNv3 short, in whole vectors and free of spills? Without a GPU."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from pretrain.kernels import (  # noqa: E402
    pointwise_triton,
    triton_depthwise,
    triton_gelu,
    triton_norm,
    triton_residual,
)
from pretrain.kernels.pointwise_triton import Rows  # noqa: E402
from pretrain.models.internimage_config import INTERNIMAGE, InternImageConfig  # noqa: E402
from tests.kernels.machine_code import Code, compile_kernel  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
pytestmark = pytest.mark.skipif(
    not all((TOOLS / tool).exists() for tool in ("ptxas", "cuobjdump", "nvdisasm")),
    reason="this Triton brings no assembler and disassembler for NVIDIA",
)

BYTES = {"bf16": 2, "fp32": 4}  # float16 differs from bfloat16 by its conversions alone
BY_ROWS = ("residual_norm", "residual_norm_grad", "norm_gelu", "norm_gelu_grad")
DEPTHWISE = ("depthwise", "depthwise_flipped", "depthwise_grad_taps")
PARTS = ("SHARE", "GAMMA", "OUTER", "FOLLOWING")


@dataclass(frozen=True)
class Configuration:
    kernel: str
    dtype: str
    width: int  # channels
    parts: tuple[str, ...] = ()  # of residual_norm

    def __str__(self) -> str:
        return "-".join([self.kernel, self.dtype, str(self.width), *self.parts])

    def compile(self) -> Code:
        itemsize, wide = BYTES[self.dtype], ("partial_pointer",)
        if self.kernel in BY_ROWS:
            launch = rows_launch(self.kernel, self.dtype, self.width)
            constants = {"EPS": 1e-6, "ROWS": launch.rows, "CHANNELS": launch.channels}
            module = triton_norm
            if self.kernel.startswith("residual"):
                module = triton_residual
                constants |= {f"HAS_{part}": part in self.parts for part in PARTS}
            return compile_kernel(
                getattr(module, f"{self.kernel}_kernel"), constants, self.dtype, launch.warps, wide
            )
        if self.kernel == "gelu_grad":
            constants = {"NUMBERS": pointwise_triton.NUMBERS}
            return compile_kernel(triton_gelu.gelu_grad_kernel, constants, self.dtype, 4)
        launch = pointwise_triton.tile_launch(self.width, itemsize)
        constants = {"SIZE": 5, "RUNS": launch.runs, "CHANNELS": launch.channels}
        if self.kernel == "depthwise_grad_taps":
            kernel = triton_depthwise.depthwise_grad_taps_kernel
        else:
            kernel = triton_depthwise.depthwise_kernel
            constants["IS_FLIPPED"] = self.kernel == "depthwise_flipped"
        return compile_kernel(kernel, constants, self.dtype, launch.warps, wide)


def rows_launch(kernel: str, dtype: str, width: int) -> Rows:
    held = pointwise_triton.BACKWARD if kernel.endswith("_grad") else pointwise_triton.FORWARD
    return pointwise_triton.rows_launch(width, BYTES[dtype], held)


def parts_of(config: InternImageConfig) -> tuple[str, ...]:
    """What the first branch of a block joins with: the second leaves FOLLOWING out."""
    gamma = () if config.layer_scale is None else ("GAMMA",)
    if config.post_norm:
        return ("SHARE", *gamma, "OUTER")
    return ("SHARE", *gamma, *(("OUTER",) if config.res_post_norm else ()), "FOLLOWING")


def launches() -> list[Configuration]:
    """One of every launch that a published size leads to: several widths share one."""
    chosen = {}
    for config, dtype in product(INTERNIMAGE.values(), BYTES):
        for width, kernel in product(config.widths, BY_ROWS):
            parts = parts_of(config) if kernel.startswith("residual") else ()
            key = (kernel, dtype, rows_launch(kernel, dtype, width), parts)
            chosen[key] = Configuration(kernel, dtype, width, parts)
        for width, kernel in product(config.widths, DEPTHWISE):
            key = (kernel, dtype, pointwise_triton.tile_launch(width, BYTES[dtype]))
            chosen[key] = Configuration(kernel, dtype, width)
        chosen["gelu_grad", dtype] = Configuration("gelu_grad", dtype, 0)
    return list(chosen.values())


CONFIGURATIONS = launches()


@pytest.fixture(scope="module")
def codes() -> dict[Configuration, Code]:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return dict(zip(CONFIGURATIONS, pool.map(Configuration.compile, CONFIGURATIONS), strict=True))


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_no_register_is_spilled(codes, configuration):
    assert codes[configuration].spills == 0


def per_element(codes: dict[Configuration, Code], kernel: str, width: int = 512) -> float:
    """Warp instructions an element in bfloat16: all of the code once a tile, or of its loop if it has one."""
    found = next(c for c in CONFIGURATIONS if c.kernel == kernel and c.dtype == "bf16" and _fits(c, width))
    code = codes[found]
    size = sum(last - first + 1 for first, last in code.loops) or code.end
    if kernel in BY_ROWS:
        launch = rows_launch(kernel, "bf16", width)
        return size * launch.warps / (launch.rows * width)
    launch = pointwise_triton.tile_launch(width, 2)
    rows_of_taps = 5 if kernel == "depthwise_grad_taps" else 1
    return size * launch.warps * rows_of_taps / (4 * launch.runs * launch.channels)


def _fits(configuration: Configuration, width: int) -> bool:
    if configuration.kernel in BY_ROWS:
        kernel = configuration.kernel
        return rows_launch(kernel, "bf16", configuration.width) == rows_launch(kernel, "bf16", width)
    return pointwise_triton.tile_launch(configuration.width, 2) == pointwise_triton.tile_launch(width, 2)


# Multiply-adds of a 5 x 5 kernel alone are 0.78 an element. Measured: 2.1, 2.1, 2.3, 1.4, 2.9, 1.4, 2.0.
@pytest.mark.parametrize(("kernel", "limit"), [
    ("depthwise", 2.5), ("depthwise_flipped", 2.5), ("depthwise_grad_taps", 2.7),
    ("residual_norm", 1.6), ("residual_norm_grad", 3.2), ("norm_gelu", 1.6), ("norm_gelu_grad", 2.3),
])  # fmt: skip
def test_instructions_an_element(codes, kernel, limit):
    assert per_element(codes, kernel) <= limit


@pytest.mark.parametrize(
    "kernel", ["depthwise", "depthwise_flipped", "residual_norm", "norm_gelu", "gelu_grad"]
)
def test_maps_are_read_and_written_in_vectors_of_16_bytes(codes, kernel):
    for configuration, code in codes.items():
        if configuration.kernel == kernel and configuration.width % 64 == 0:
            stores = [operation for operation in code.operations if operation.startswith("STG")]
            assert stores and all(operation.endswith(".128") for operation in stores), stores
