"""Who looks at the gradient before the optimizer moves? The guard, at its norm; ZeRO-1 and 2 do so once.

DeepSpeed asks of each parameter's gradient whether it is finite and then for its norm: some ten kernels a parameter,
and the backbone of InternImage-H alone has 1,335. The optimizer's step of that run took 0.2 s on an H200, whatever
the batch; in a profile on a CPU four fifths of the host's time in a step of 1,900 small parameters were these two
looks. The norm alone says both: it is finite if and only if every number is, short of 1e19.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import combine_grad_norm_groups, mask_nan_or_inf_with_val_inplace
from torch import Tensor

INVALID = -1.0  # DeepSpeed's norm of a gradient for which it skips the step
OWN = ("has_overflow_partitioned_grads_serial", "get_grad_norm_direct")  # what of DeepSpeed's is replaced


def look_once(optimizer: Any) -> None:
    """Replaces DeepSpeed's two looks at every gradient, of a ZeRO-1 or 2 optimizer whose state is not offloaded.

    A step whose gradient is not finite is still skipped: DeepSpeed skips for an invalid norm too.
    """
    if not (optimizer.compute_grad_norm and optimizer.check_grad_overflow):
        return  # the ds config leaves out one of the two
    missing = [name for name in OWN if not hasattr(optimizer, name)]
    assert not missing, f"this DeepSpeed has no {missing}: see pretrain/gradient_norm.py"

    def found_nothing() -> Tensor:
        return torch.zeros(1, dtype=torch.bool, device=optimizer.device)

    def norm(gradients: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
        """Over all ranks, in float32; -1 where it is not finite."""
        owned = [g for g in gradients if not getattr(g, "_zero_padding", False)][: len(parameters)]
        squares = torch.zeros((), device=optimizer.device)
        if owned:
            squares = torch.stack(torch._foreach_norm(owned, 2, dtype=torch.float32)).square().sum()
        dist.all_reduce(squares, group=optimizer.dp_process_group)
        total = squares.sqrt()
        mask_nan_or_inf_with_val_inplace(total, device=optimizer.device)
        return total

    optimizer.has_overflow_partitioned_grads_serial = found_nothing
    optimizer.get_grad_norm_direct = norm


def ask_before_moving(optimizer: Any, may_move: Callable[[Tensor], bool]) -> None:
    """Has a ZeRO optimizer ask `may_move` of the norm of the whole gradient, and skip the step where it may not.

    The norm is a float32 scalar, equal on all ranks, not finite or negative where the gradient is not finite. Where
    DeepSpeed finds that before it has a norm, as with an offloaded ZeRO-2, it skips without asking.
    """
    name = "scaled_global_norm" if hasattr(optimizer, "scaled_global_norm") else "_get_norm_groups"
    assert hasattr(optimizer, name), f"this DeepSpeed has no {name}: see pretrain/gradient_norm.py"
    own = getattr(optimizer, name)

    def whole() -> Tensor:
        norm = own()
        return norm if may_move(norm) else torch.full_like(norm, INVALID)

    def groups() -> list[Any]:
        norms = own()
        return norms if may_move(combine_grad_norm_groups(norms)) else [INVALID]

    setattr(optimizer, name, {"scaled_global_norm": whole, "_get_norm_groups": groups}[name])
