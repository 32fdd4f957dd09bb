"""How does Triton's interpreter take less time? What it does at every call, it does once.

For a process that was begun with TRITON_INTERPRET=1 and does nothing else with Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

from pretrain.kernels.triton_norm import row_sum


def patch_once() -> None:
    """Before every kernel, and every call of a function in one, the interpreter looks through all of triton.language
    to put numpy's way in place of the compiler's: for each of thousands of calls a millisecond, for the same result.
    """
    for function in (row_sum, tl.sum):  # one that sees triton.language, one of its own
        interpreter._patch_lang(function.fn)
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()


def sum_pairs_at_once(pairs: Callable[..., Any]) -> None:
    """From here on a reduction by `pairs`, that is two sums, is numpy's; the interpreter goes number by number."""
    apply = interpreter.ReduceOps.apply_impl

    def sums(reduction: interpreter.ReduceOps, given: tuple[tl.tensor, ...]) -> Any:
        if reduction.combine_fn is pairs:
            return tuple(reduction.sum(one) for one in given)
        return apply(reduction, given)

    interpreter.ReduceOps.apply_impl = sums
