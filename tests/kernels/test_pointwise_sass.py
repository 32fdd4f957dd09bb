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
    pointwise_launch,
    triton_depthwise,
    triton_gelu,
    triton_norm,
    triton_residual,
)
from pretrain.kernels.pointwise_launch import Rows, Tile  # noqa: E402
from pretrain.models.internimage_config import INTERNIMAGE, InternImageConfig  # noqa: E402
from tests.kernels.machine_code import Code, compile_kernel, read_codes  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
pytestmark = pytest.mark.skipif(
    not all((TOOLS / tool).exists() for tool in ("ptxas", "cuobjdump", "nvdisasm")),
    reason="this Triton brings no assembler and disassembler for NVIDIA",
)

BYTES = {"bf16": 2, "fp32": 4}  # float16 differs from bfloat16 by its conversions alone
BY_ROWS = ("residual_norm", "residual_norm_grad", "norm_gelu", "norm_gelu_grad")
DEPTHWISE = ("depthwise", "depthwise_flipped", "depthwise_grad_taps")
PARTS = ("BRANCH", "SHARE", "GAMMA", "OUTER", "FOLLOWING")
VECTORS = {"GAMMA": 1, "OUTER": 2, "FOLLOWING": 2}  # rows of a part's gradient
NORM_ALONE = ("FOLLOWING",)
WIDE = ("partial_pointer", "statistics_pointer")  # float32 pointers
H = INTERNIMAGE["internimage_h"]
IN_FLOAT32 = (H,)  # the others' float32 differs by widths and by layer scale alone
# All widths and branches of this one; of the others the widest and fullest, which registers would not hold first,
# and of the smallest the narrowest, of most rows at once.
WHOLE = "internimage_h"
NARROWEST = "internimage_t"
PUBLISHED = [f"internimage_{size}" for size in ("t", "s", "b", "l", "xl", "h", "g")]


@dataclass(frozen=True)
class Configuration:
    kernel: str
    dtype: str
    width: int  # channels
    parts: tuple[str, ...] = ()  # of residual_norm
    size: int = 0  # side of a depth-wise kernel

    def __str__(self) -> str:
        return "-".join([self.kernel, self.dtype, str(self.width), str(self.size), *self.parts])

    @property
    def rows(self) -> Rows:
        return pointwise_launch.rows_launch(self.width, BYTES[self.dtype])

    @property
    def tile(self) -> Tile:
        is_taps = self.kernel == "depthwise_grad_taps"
        warps = pointwise_launch.TAP_WARPS if is_taps else pointwise_launch.CONVOLUTION_WARPS
        return pointwise_launch.tile_launch(self.width, BYTES[self.dtype], warps)

    @property
    def launch(self) -> tuple[object, ...]:
        """What the machine code depends on."""
        if self.kernel in BY_ROWS:
            return self.kernel, self.dtype, self.rows, self.parts
        return self.kernel, self.dtype, self.tile if self.kernel in DEPTHWISE else None, self.size

    def compile(self) -> bytes:
        if self.kernel in BY_ROWS:
            constants = {"ROWS": self.rows.rows, "CHANNELS": self.rows.channels}
            if not self.kernel.endswith("_grad"):
                constants["EPS"] = 1e-6
            module = triton_norm
            if self.kernel.startswith("residual"):
                module = triton_residual
                constants |= {f"HAS_{part}": part in self.parts for part in PARTS}
                if self.kernel.endswith("_grad"):
                    constants["NUM_VECTORS"] = sum(VECTORS.get(part, 0) for part in self.parts)
            kernel = getattr(module, f"{self.kernel}_kernel")
            return compile_kernel(kernel, constants, self.dtype, self.rows.warps, WIDE, ("width",))
        if self.kernel == "gelu_grad":
            constants = {"NUMBERS": pointwise_launch.NUMBERS}
            return compile_kernel(
                triton_gelu.gelu_grad_kernel, constants, self.dtype, 4, divisible=("num_numbers",)
            )
        constants = {"SIZE": self.size, "RUNS": self.tile.runs, "CHANNELS": self.tile.channels}
        kernel = triton_depthwise.depthwise_grad_taps_kernel
        if self.kernel != "depthwise_grad_taps":
            kernel = triton_depthwise.depthwise_kernel
            constants["IS_FLIPPED"] = self.kernel == "depthwise_flipped"
        return compile_kernel(kernel, constants, self.dtype, self.tile.warps, WIDE, ("channels",))


def branches(config: InternImageConfig) -> list[tuple[str, ...]]:
    """What the two branches of a block join with, in training with stochastic depth; H also without it."""
    gamma = () if config.layer_scale is None else ("GAMMA",)
    outer = ("OUTER",) if config.post_norm or config.res_post_norm else ()
    following = () if config.post_norm else ("FOLLOWING",)
    both = [(*gamma, *outer, *following), (*gamma, *outer)]
    shares = [("BRANCH", "SHARE"), ("BRANCH",)] if config is H else [("BRANCH", "SHARE")]
    return [(*share, *parts) for share in shares for parts in both]


def launches() -> list[Configuration]:
    """One of every machine code that is looked at: several widths share one."""
    found = []
    for name, dtype in product(PUBLISHED, BYTES):
        config = INTERNIMAGE[name]
        if dtype == "fp32" and config not in IN_FLOAT32:
            continue
        # In float32, which differs by the size of a number, the fullest branch stands for the others.
        is_whole = name == WHOLE
        joined = branches(config) if dtype == "bf16" and is_whole else branches(config)[:1]
        widths = {WHOLE: config.widths, NARROWEST: config.widths[:: len(config.widths) - 1]}
        for width in widths.get(name, config.widths[-1:]):
            parts_of = [*joined, NORM_ALONE] if is_whole else joined
            for kernel, parts in product(("residual_norm", "residual_norm_grad"), parts_of):
                found.append(Configuration(kernel, dtype, width, parts))
            found += [Configuration(kernel, dtype, width) for kernel in ("norm_gelu", "norm_gelu_grad")]
            size = config.dw_kernel_size
            found += [Configuration(kernel, dtype, width, size=size) for kernel in DEPTHWISE]
        found.append(Configuration("gelu_grad", dtype, 0))
    return list({configuration.launch: configuration for configuration in found}.values())


CONFIGURATIONS = launches()


@pytest.fixture(scope="module")
def codes() -> dict[Configuration, Code]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # no import hook reaches it
        codes = read_codes(list(pool.map(Configuration.compile, CONFIGURATIONS)))
    return dict(zip(CONFIGURATIONS, codes, strict=True))


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_no_register_is_spilled(codes, configuration):
    assert codes[configuration].spills == 0


def per_element(codes: dict[Configuration, Code], wanted: Configuration) -> float:
    """Warp instructions an element: all of the code once a tile, or of its loop if it has one; idle lanes of rows
    that are no power of 2 count.
    """
    code = next(code for configuration, code in codes.items() if configuration.launch == wanted.launch)
    instructions = sum(last - first + 1 for first, last in code.loops) or code.end
    if wanted.kernel in BY_ROWS:
        return instructions * wanted.rows.warps / (wanted.rows.rows * wanted.width)
    rows_of_taps = wanted.size if wanted.kernel == "depthwise_grad_taps" else 1
    return instructions * wanted.tile.warps * rows_of_taps / (4 * wanted.tile.runs * wanted.tile.channels)


# InternImage-H in bfloat16, with stochastic depth. Multiply-adds of a 5 x 5 kernel alone are 0.78 an element.
@pytest.mark.parametrize("width", H.widths)
@pytest.mark.parametrize(("kernel", "limit"), [
    ("depthwise", 2.7), ("depthwise_flipped", 2.7), ("depthwise_grad_taps", 2.6),
    ("residual_norm", 2.3), ("residual_norm_grad", 5.0), ("norm_gelu", 2.4), ("norm_gelu_grad", 3.6),
])  # fmt: skip
def test_instructions_an_element(codes, kernel, limit, width):
    parts = branches(H)[0] if kernel.startswith("residual") else ()
    size = H.dw_kernel_size if kernel in DEPTHWISE else 0
    assert per_element(codes, Configuration(kernel, "bf16", width, parts, size)) <= limit


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_no_kernel_adds_to_memory_so_sums_keep_their_order(codes, configuration):
    assert codes[configuration].atomics == 0


@pytest.mark.parametrize(
    "kernel", ["depthwise", "depthwise_flipped", "residual_norm", "norm_gelu", "gelu_grad"]
)
def test_maps_are_read_and_written_in_vectors(codes, kernel):
    """Of 16 bytes; of 8 in convolutions, which an H200 found faster."""
    for configuration, code in codes.items():
        if configuration.kernel == kernel and configuration.width % 512 == 0:
            rows = configuration.rows.rows if configuration.kernel in BY_ROWS else 0
            norms = (
                len({"OUTER", "FOLLOWING"} & {*configuration.parts}) or configuration.kernel == "norm_gelu"
            )
            vector = ".64" if configuration.kernel in DEPTHWISE else ".128"
            stores, loads = (
                [operation for operation in code.operations if operation.startswith(kind)]
                for kind in ("STG", "LDG")
            )
            narrow = [operation for operation in stores if not operation.endswith(vector)]
            assert len(narrow) < len(stores) and len(narrow) <= 2 * norms * rows, stores  # mean and scale
            narrow = [operation for operation in loads if not operation.endswith(vector)]
            assert len(narrow) <= rows * ("SHARE" in configuration.parts), narrow  # one number a row
