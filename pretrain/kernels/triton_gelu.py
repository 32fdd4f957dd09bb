"""How do the Triton kernels compute GELU and its slope (by erf, not tanh)?"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def normal_distribution(x):
    """Phi(x), the share of the standard normal distribution below x, and exp(-x**2 / 2), its slope but for
    a factor. To 1e-7 by formula 7.1.26 of Abramowitz and Stegun, Handbook of Mathematical Functions: a third
    of the instructions of an exact erf, and far below the rounding of bfloat16.
    """
    bell = tl.exp(-0.5 * x * x)
    t = 1.0 / (1.0 + 0.23164189 * tl.abs(x))
    tail = 0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
    tail = t * bell * tail
    return tl.where(x < 0, tail, 1.0 - tail), bell


@triton.jit
@no_type_check
def gelu(x):
    below, _ = normal_distribution(x)
    return x * below


@triton.jit
@no_type_check
def gelu_slope(x):
    """d gelu(x) / dx = Phi(x) + x phi(x)."""
    below, bell = normal_distribution(x)
    return below + x * (0.3989422804014327 * bell)


@triton.jit
@no_type_check
def gelu_grad_kernel(
    x_pointer, grad_out_pointer, out_pointer, grad_pointer, num_numbers, NUMBERS: tl.constexpr
):
    """gelu(x) once more, and its gradient, from one reading of x."""
    place = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    is_valid = place < num_numbers
    x = tl.load(x_pointer + place, mask=is_valid, other=0.0).to(tl.float32)
    grad_out = tl.load(grad_out_pointer + place, mask=is_valid, other=0.0).to(tl.float32)
    tl.store(out_pointer + place, gelu(x).to(out_pointer.dtype.element_ty), mask=is_valid)
    tl.store(
        grad_pointer + place, (grad_out * gelu_slope(x)).to(grad_pointer.dtype.element_ty), mask=is_valid
    )
