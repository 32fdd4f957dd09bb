"""Is the machine code of the Triton kernels as short as claimed, and free of spills? Compiled without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from tests.kernels.sass import KERNELS, Configuration, Machine, compile_all, per_element  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
pytestmark = pytest.mark.skipif(
    not all((TOOLS / tool).exists() for tool in ("ptxas", "cuobjdump", "nvdisasm")),
    reason="this Triton brings no assembler and disassembler for NVIDIA",
)

STAGES = ((48, 10, "large"), (24, 20, "large"), (12, 40, "medium"), (6, 80, "small"))  # InternImage-H, 192 px
BATCH = 64
OFFSET_LIMIT = 3.0  # pixels; where no position samples further, the large map's tiles skip all but 9 others
# float16 has the registers of bfloat16 and fewer conversions; `python tests/kernels/sass.py` shows it too.
CONFIGURATIONS = [Configuration(k, d, g) for d in ("bf16", "fp32") for g in (32, 16) for k in KERNELS]


@pytest.fixture(scope="module")
def machines() -> dict[Configuration, Machine]:
    return compile_all(CONFIGURATIONS)


def instructions(machines: dict[Configuration, Machine], kernel: str, side: int, groups: int) -> float:
    configuration = Configuration(kernel, "bf16", 32)
    return per_element(machines[configuration], configuration, BATCH, side, side, groups, OFFSET_LIMIT)


@pytest.mark.parametrize(
    "configuration", CONFIGURATIONS, ids=lambda c: f"{c.kernel}-{c.dtype}-{c.group_width}"
)
def test_no_register_is_spilled(machines, configuration):
    assert machines[configuration].spills == 0


@pytest.mark.parametrize(
    "configuration", CONFIGURATIONS, ids=lambda c: f"{c.kernel}-{c.dtype}-{c.group_width}"
)
def test_only_the_atomic_variant_adds_to_memory(machines, configuration):
    """The interpreter runs one program after the other and cannot show that an order changes."""
    assert (machines[configuration].atomics > 0) == (configuration.kernel == "grad_value_atomic")


@pytest.mark.parametrize(("side", "groups", "product"), STAGES)
def test_forward_takes_at_most_6_instructions_an_element(machines, side, groups, product):
    """4.6 with 16 channels a thread and positions first: more cache lines, 1.6 times as long on an H200."""
    assert instructions(machines, "sample", side, groups) <= 6.0


@pytest.mark.parametrize(("side", "groups", "product"), STAGES)
def test_backward_takes_at_most_18_instructions_an_element(machines, side, groups, product):
    kernels = ["grad_packed", product, "arrange_banded" if product == "large" else "arrange"]
    parts = {kernel: instructions(machines, kernel, side, groups) for kernel in kernels}
    assert sum(parts.values()) <= 18.0, parts


@pytest.mark.parametrize("group_width", [32, 16])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", ["sample", "grad_packed"])
def test_no_value_of_the_gathering_kernels_crosses_shared_memory(machines, kernel, dtype, group_width):
    assert machines[Configuration(kernel, dtype, group_width)].shared_barriers == 0


@pytest.mark.parametrize("product", ["small", "medium", "large"])
def test_value_gradient_is_multiplied_on_tensor_cores(machines, product):
    assert machines[Configuration(product, "bf16", 32)].matrix_products > 0
