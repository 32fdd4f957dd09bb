"""What does a rank own of the training state under ZeRO, and where does DeepSpeed keep it?"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_fp32_param
from jaxtyping import Float
from torch import Tensor, nn

from pretrain.checkpoint.ranges import Slice
from pretrain.checkpoint.snapshot import MOMENTS


def local_slices(module: nn.Module) -> list[Slice]:
    """What this rank owns of every parameter of a module that deepspeed.initialize has partitioned."""
    slices = []
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "ds_id"):  # ZeRO-3: an equal share each, the last ones padded
            shape, share = tuple(parameter.ds_shape), parameter.ds_tensor.ds_numel
            start = min(share * dist.get_rank(), parameter.ds_numel)
            numel = min(share, parameter.ds_numel - start)
        else:  # ZeRO-1, 2: whatever falls into this rank's share of all parameters laid end to end
            shape, mapping = tuple(parameter.shape), parameter._hp_mapping
            address = None if mapping is None else mapping.lp_fragment_address
            start, numel = (0, 0) if address is None else (address.start, address.numel)
        slices.append(Slice(name, shape, start, numel))
    return slices


def local_master(parameter: nn.Parameter, numel: int) -> Float[Tensor, " numel"]:
    """This rank's slice of the float32 master weight: the optimizer's own memory, a copy if that is offloaded."""
    if hasattr(parameter, "ds_id"):
        return safe_get_local_fp32_param(parameter).view(-1)[:numel]
    return parameter._hp_mapping.get_hp_fragment().view(-1)[:numel]


class OwnedState:
    """Master weights and moments of AdamW that this rank owns, as views of DeepSpeed's memory, and the buffers.

    `module` and `optimizer` are those of one deepspeed.initialize. ValueError where the optimizer's state is swapped
    to NVMe, which leaves nothing to look at.
    """

    def __init__(self, module: nn.Module, optimizer: Any) -> None:
        frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
        assert not frozen, f"{frozen} have no master weight to keep"
        if getattr(optimizer, "swap_optimizer", False):
            raise ValueError(
                "offload_optimizer.device='nvme' in the ds config leaves no optimizer state in memory, which "
                "checkpoints are made from: use 'cpu'"
            )
        self.slices = local_slices(module)
        self._optimizer, self._parameters = optimizer, dict(module.named_parameters())
        kept = module.state_dict().keys()
        self.buffers = {name: b for name, b in module.named_buffers() if name in kept}  # equal on all ranks
        self._owned = [s for s in self.slices if s.numel]

    @property
    def steps(self) -> int:
        """Steps that the optimizer has made, which leaves out those whose gradient was not finite."""
        counts = {int(owner.state[flat]["step"]) for flat, owner in self._flats() if owner.state[flat]}
        assert len(counts) <= 1, f"parts of the optimizer have made different numbers of steps: {counts}"
        return counts.pop() if counts else 0

    def masters(self) -> dict[str, Float[Tensor, " numel"]]:
        """Float32 weights by parameter, in the order of `slices` where `numel` is not 0."""
        return {s.name: self._view(s) for s in self._owned}

    def moments(self) -> dict[str, dict[str, Float[Tensor, " numel"]]]:
        """The two moments by name, then as `masters`; KeyError before the first step, which makes them."""
        return {moment: {s.name: self._view(s, moment) for s in self._owned} for moment in MOMENTS}

    @torch.no_grad()
    def begin_moments(self, steps: int) -> None:
        """Makes the moments of an optimizer that has made `steps` steps, all zero; none for 0 steps of a new one."""
        for flat, owner in self._flats():
            states = owner.state[flat]
            if not states and not steps:
                continue
            for moment in MOMENTS:  # in place where DeepSpeed has views of them
                states.setdefault(moment, torch.zeros_like(flat)).zero_()
            counts_there = owner.defaults.get("fused") or owner.defaults.get("capturable")
            states["step"] = torch.tensor(float(steps), device=flat.device if counts_there else "cpu")

    @torch.no_grad()
    def publish(self) -> None:
        """Makes the model's own weights of the masters, in its precision; a collective call."""
        optimizer = self._optimizer
        if not self._is_partitioned:
            optimizer.update_lp_params()
            return
        optimizer.parameter_offload.partition_all_parameters()
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.invalidate_secondary_tensor()
        if persistent := optimizer.persistent_parameters:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    @property
    def _is_partitioned(self) -> bool:
        return hasattr(self._optimizer, "fp32_partitioned_groups_flat")  # ZeRO-3

    def _flats(self) -> list[tuple[Tensor, torch.optim.Optimizer]]:
        """The flat pieces of memory that masters are views of, each with the optimizer that steps it."""
        owner = self._optimizer.optimizer
        if not self._is_partitioned:
            return [(group["params"][0], owner) for group in owner.param_groups]
        return [(flat, owner) for flat in self._optimizer.fp32_partitioned_groups_flat]

    def _view(self, part: Slice, key: str | None = None) -> Tensor:
        """The master of a slice, or what the optimizer keeps of it under `key`."""
        parameter = self._parameters[part.name]
        if self._is_partitioned:
            index, start, _ = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        else:
            mapping = parameter._hp_mapping
            index, start = mapping.param_group_index, mapping.hp_fragment_address.start
        flat, owner = self._flats()[index]
        return (flat if key is None else owner.state[flat][key]).detach()[start : start + part.numel]
