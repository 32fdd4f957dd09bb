"""Does each choice of checkpointing keep less, and change no gradient, on both backbones?"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from pretrain.models.activations import CHECKPOINTS
from pretrain.models.backbone import build_encoder
from pretrain.recipes import load
from tests.fakes import shrink


def encoder_of(recipe: str, choice: str) -> nn.Module:
    torch.manual_seed(0)
    encoder = build_encoder(
        replace(shrink(load(recipe)).backbone, drop_path=0.0, activation_checkpoint=choice), 64
    )
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
    ("recipe", "linear"),
    [
        ("m3i.internimage_h", F.linear),
        ("m3i.internimage_h", zero3_linear_wrap),  # what DeepSpeed puts in its place under ZeRO-3
        ("m3i.vit_b16", F.linear),
    ],
)
def test_more_recomputation_keeps_less(
    recipe: str, linear: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.functional.linear", linear)
    images = torch.randn(4, 3, 64, 64)
    kept = [kept_bytes(encoder_of(recipe, choice), images) for choice in CHECKPOINTS]
    assert list(CHECKPOINTS) == ["none", "selective", "full"]
    assert kept[0] > 1.2 * kept[1] > 1.2 * kept[2] > 0, kept
    assert kept[1] > 2 * kept[2], "selective keeps what linear layers give"


@pytest.mark.parametrize("linear", [F.linear, zero3_linear_wrap], ids=["torch", "deepspeed"])
@pytest.mark.parametrize("choice", ["selective", "full"])
@pytest.mark.parametrize("recipe", ["m3i.internimage_h", "m3i.vit_b16"])
def test_gradients_are_the_same(
    recipe: str, choice: str, linear: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.functional.linear", linear)
    images, gradients = torch.randn(2, 3, 64, 64), []
    for one in ("none", choice):
        encoder = encoder_of(recipe, one)
        encoder(images).square().sum().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
