"""Does autograd keep as much for the backward pass as the formulas say?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.balance import BalanceTracker
from pretrain.config import Backbone, Decoder, Run
from pretrain.models.backbone import build_encoder
from pretrain.plan.activations import ENCODERS, kept
from pretrain.plan.flops import size_of
from pretrain.plan.machines import GIB
from pretrain.plan.memory import memory
from pretrain.plan.settings import Setting, read
from pretrain.plan.sizes import assumed_facts, sizes_of
from pretrain.pretrainer import Pretrainer
from pretrain.recipes import load
from pretrain.towers import Towers
from tests.fakes import FACTS, random_batch, shrink
from tests.paths import ROOT
from tests.stand_ins import encoders

TOLERANCE = 0.1


def wide(recipe: str, family: str, keeps: str) -> Run:
    """Small, but wide enough that what counts is what counts in a real run."""
    run = shrink(
        replace(load(recipe), backbone=Backbone(family, f"{family}_tiny", 0.0, activation_checkpoint=keeps))
    )
    return replace(run, decoder=Decoder(2, 192, 768, 4), text=replace(run.text, width=96, ffn=384, layers=2))


def saved_bytes(run: Run) -> int:
    """Of all memory that autograd keeps of one forward pass, without the weights."""
    torch.manual_seed(0)
    model, teacher = Pretrainer(run, FACTS), Towers(run, FACTS).eval().requires_grad_(False)
    batch = random_batch(run, run.batch)
    return kept_storages(model.parameters(), lambda: model(batch, encoders(teacher), BalanceTracker()))


def kept_storages(parameters: Iterable[Tensor], forward: Callable[[], Any]) -> int:
    """Bytes of what a forward pass keeps, every memory once."""
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        alive = forward()
    assert alive is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize("family", ["vit", "internimage"])
@pytest.mark.parametrize(
    "recipe", ["m3i.internimage_h", "rows.siamese_pixel", "rows.instance_discrimination"]
)
def test_kept_numbers_of_a_step(recipe: str, family: str):
    run = wide(recipe, family, "none")
    told = run.batch * kept(run, FACTS, "none", is_fused=False, bytes_a_number=4).total * 4
    assert saved_bytes(run) == pytest.approx(told, rel=TOLERANCE)


def test_kept_numbers_of_swin():
    """At its published size: the smallest is too narrow for its biases and masks to be few."""
    backbone = Backbone("swin", "swin_t", 0.0)
    encoder, images = build_encoder(backbone, 192), torch.randn(1, 3, 192, 192)
    found = kept_storages(encoder.parameters(), lambda: encoder(images))
    told, *_ = ENCODERS["swin"](size_of(backbone), backbone, 192, "none", False)
    assert found == pytest.approx(4 * told, rel=TOLERANCE)


@pytest.mark.parametrize("recipe", ["internimage_h", "vit_b16"])
def test_peak_of_an_h200(recipe: str):
    measured = json.loads((ROOT / "benchmarks/results/m3i_step_gpu.json").read_text())["recipes"][recipe][
        "zero2"
    ]
    run = replace(load(f"m3i.{recipe}"), batch=measured["images"])
    facts = assumed_facts(run, categories=24)
    told = memory(run, facts, sizes_of(run, facts), Setting("zero2", read()["zero2"]), ranks=1)
    assert told.peak / GIB == pytest.approx(measured["peak_memory_gib"], rel=TOLERANCE)
