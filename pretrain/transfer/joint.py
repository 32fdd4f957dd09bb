"""What must ranks that train one model share at each step? The mean of their gradients and what batch norms see."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from pretrain.collectives import sum_over_ranks, world_size
from pretrain.models.feature_norm import EPS, standardise

BUCKET = 2**25  # numbers that are averaged at once


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces each gradient by its mean over the ranks; one that no rank has stays None. A collective call.

    After the whole backward pass: batch norms call the other ranks within it, and calls of two kinds at once could
    meet in another order on each rank.
    """
    if world_size() == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    holders = sum_over_ranks(torch.tensor([parameter.grad is not None for parameter in trained]).long())
    bucket: list[nn.Parameter] = []
    for parameter, num_holders in zip(trained, holders.tolist(), strict=True):
        if not num_holders:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if bucket and sum(one.numel() for one in bucket) + parameter.numel() > BUCKET:
            _average(bucket)
            bucket = []
        bucket.append(parameter)
    _average(bucket)


def _average(parameters: list[nn.Parameter]) -> None:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    joined = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(joined)
    joined /= world_size()
    for gradient, mean in zip(gradients, joined.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


class JointBatchNorm(nn.Module):
    """`norm` with the statistics of all ranks' images, on a CPU, where torch's SyncBatchNorm cannot.

    Its parameters and buffers are those of `norm`, under the same names. Every rank has equally many positions.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.affine and norm.track_running_stats and norm.eps == EPS and norm.momentum is not None
        self.weight, self.bias, self.momentum = norm.weight, norm.bias, norm.momentum
        for name, buffer in norm.named_buffers():
            self.register_buffer(name, buffer)

    def forward(self, maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        if not self.training:
            statistics = (self.running_mean, self.running_var)
            return nn.functional.batch_norm(maps, *statistics, self.weight, self.bias, eps=EPS)
        rows, mean, variance = standardise(maps.movedim(1, -1), self.running_mean.clone())
        count = maps.numel() // maps.shape[1] * world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / max(count - 1, 1)), self.momentum)
            self.get_buffer("num_batches_tracked").add_(1)
        return (rows * self.weight + self.bias).movedim(-1, 1)


def with_joint_norms(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, each BatchNorm2d of which sees the images of all ranks; alone it stays as it is."""
    if world_size() == 1:
        return model
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, JointBatchNorm(child))
    return model
