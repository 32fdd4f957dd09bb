"""Do the formulas of floating-point operations agree with torch's counter?"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.balance import BalanceTracker
from pretrain.config import Backbone
from pretrain.facts import DataFacts
from pretrain.models.backbone import build_encoder
from pretrain.models.text import TextEncoder
from pretrain.plan import flops
from pretrain.pretrainer import Pretrainer
from pretrain.recipes import load
from pretrain.towers import Towers
from tests.fakes import FACTS, random_batch, shrink
from tests.paths import ROOT
from tests.stand_ins import encoders

TOLERANCE = 0.01  # the formulas leave out what is no product; the sizes below keep that small


def counted(work) -> float:
    """Operations of a call; attention as its two products, since the counter has the fused kernel's recomputation."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("size", "pixels"),
    [
        ("internimage_h", 192),
        ("internimage_t", 224),
        ("swin_b", 224),
        ("swin_t", 192),
        ("vit_b16", 224),
        ("vit_l16", 192),
    ],
)
def test_forward_of_published_backbones(size: str, pixels: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # raises for meta
    backbone = Backbone(size.split("_")[0], size, drop_path=0.0)
    with torch.device("meta"):
        encoder, images = build_encoder(backbone, pixels), torch.zeros(1, 3, pixels, pixels)
    found = counted(lambda: encoder(images))
    assert found == pytest.approx(2 * flops.encoder_work(backbone, pixels).forward, rel=TOLERANCE)


def test_forward_of_the_text_encoder():
    run = load("m3i.internimage_h")
    run = replace(run, text=replace(run.text, layers=2))
    text, tokens = TextEncoder(run.text, FACTS.vocab_size), torch.zeros(2, run.text.length, dtype=torch.long)
    found = counted(lambda: text(tokens, torch.ones_like(tokens, dtype=torch.bool)))
    projection = run.text.width * run.pool.width
    assert found == pytest.approx(2 * 2 * (flops.text_work(run) - projection), rel=TOLERANCE)


@pytest.mark.parametrize(
    "recipe",
    [
        "m3i.internimage_h",
        "m3i.vit_b16",
        "rows.instance_discrimination",
        "rows.siamese_pixel",
        "rows.mim_feature_tokenizer",
        "mvp.vit_b16",
        "hvp.swin_t",
        "rows.hvp_tags_clusters",
    ],
)
def test_step_of_a_recipe(recipe: str):
    # The CPU samples small maps of InternImage by products of its own: a ViT instead.
    run = load(recipe)
    if run.backbone.family == "internimage":
        run = replace(run, backbone=Backbone("vit", "vit_b16", 0.0))
    run = shrink(run)
    torch.manual_seed(0)
    model, teacher = Pretrainer(run, FACTS), Towers(run, FACTS).eval().requires_grad_(False)
    batch = random_batch(run, run.batch)
    found = counted(lambda: model(batch, encoders(teacher), BalanceTracker()).total.backward())
    assert found == pytest.approx(flops.step_flops(run, FACTS), rel=TOLERANCE)


@pytest.mark.parametrize("recipe", ["internimage_h", "vit_b16"])
def test_step_agrees_with_what_an_h200_counted(recipe: str):
    measured = json.loads((ROOT / "benchmarks/results/m3i_step_gpu.json").read_text())["recipes"][recipe]
    told = measured["zero2"]
    run = replace(load(f"m3i.{recipe}"), batch=told["images"])
    has_texts = any(source.supervision == "text" for source in run.data.values())
    facts = DataFacts(("category",) * 24, 30_522 * has_texts)  # the scenes'; the numbers hardly count
    assert flops.step_flops(run, facts) == pytest.approx(told["operations_a_step"], rel=TOLERANCE)
