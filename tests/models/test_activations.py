"""Does each choice of checkpointing keep less, and change no gradient, on every backbone?"""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from pretrain.config import Backbone
from pretrain.models.activations import CHECKPOINTS
from pretrain.models.backbone import BACKBONES, build_encoder


def encoder_of(family: str, choice: str) -> nn.Module:
    torch.manual_seed(0)
    backbone = Backbone(family, f"{family}_tiny", drop_path=0.0, token_width=64, activation_checkpoint=choice)
    encoder = build_encoder(backbone, 64)
    for parameter in encoder.parameters():
        if not parameter.any():  # weights and biases that start at zero would hide what they do
            nn.init.normal_(parameter, std=0.05)
    return encoder.train()


def kept_bytes(encoder: nn.Module, images: torch.Tensor) -> int:
    """What a forward pass allocates and does not free before the backward pass."""
    gc.collect()  # what an earlier test left in cycles must not be freed, and counted, while this one runs
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as measured:
        tokens = encoder(images)
    del tokens
    return sum(event.self_cpu_memory_usage for event in measured.events())


@pytest.mark.parametrize(
    ("family", "linear"),
    [
        ("internimage", F.linear),
        ("internimage", zero3_linear_wrap),  # what DeepSpeed puts in its place under ZeRO-3
        ("swin", F.linear),
        ("vit", F.linear),
    ],
)
def test_more_recomputation_keeps_less(
    family: str, linear: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.functional.linear", linear)
    images = torch.randn(4, 3, 64, 64)
    kept = [kept_bytes(encoder_of(family, choice), images) for choice in CHECKPOINTS]
    assert list(CHECKPOINTS) == ["none", "selective", "full"]
    assert kept[0] > 1.2 * kept[1] > 1.2 * kept[2] > 0, kept
    assert kept[1] > 2 * kept[2], "selective keeps what linear layers give"


@pytest.mark.parametrize("linear", [F.linear, zero3_linear_wrap], ids=["torch", "deepspeed"])
@pytest.mark.parametrize("choice", ["selective", "full"])
@pytest.mark.parametrize("family", BACKBONES)
def test_gradients_are_the_same(
    family: str, choice: str, linear: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.functional.linear", linear)
    images, gradients = torch.randn(2, 3, 64, 64), []
    for one in ("none", choice):
        encoder = encoder_of(family, one)
        encoder(images).square().sum().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
