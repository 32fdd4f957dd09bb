"""What do the batch norms of ranks that train one model see? The images of all of them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pretrain.collectives import world_size
from pretrain.models.feature_norm import EPS, standardise


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
