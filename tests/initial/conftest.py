"""Which runs and files do the tests of starting weights share?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pretrain.config import Backbone, Run
from pretrain.initial.asked import init_of
from pretrain.initial.start import Start, start_for
from pretrain.recipes import load
from pretrain.towers import Towers
from tests.evaluate.runs import randomised
from tests.export.conftest import FACTS, demo_run, internimage_run, swin_run, vit_run
from tests.fakes import shrink

__all__ = ["FACTS", "demo_run", "internimage_run", "swin_run", "vit_run"]

VIT = shrink(load("m3i.vit_b16"))
SWIN = shrink(replace(VIT, backbone=Backbone("swin", "swin_tiny", drop_path_schedule="linear")))
INTERNIMAGE = shrink(load("m3i.internimage_h"))


def towers_of(run: Run, seed: int = 0) -> Towers:
    torch.manual_seed(seed)
    return randomised(Towers(run, FACTS)).requires_grad_(False)


def timm_state(towers: Towers, family: str) -> dict[str, Tensor]:
    """A backbone under the names of timm."""
    state = towers.state_dict()
    prefix = f"encoder.{family}."
    return {name.removeprefix(prefix): t.clone() for name, t in state.items() if name.startswith(prefix)}


def started(path: Path | str, run: Run, *, heads: bool = False) -> tuple[Start, Towers]:
    """Other random towers of a run after the weights of a file were put into them."""
    init = init_of(str(path), heads)
    assert init is not None
    towers = towers_of(run, seed=1)
    start = start_for(init, run, towers)
    start.fill(towers)
    return start, towers


def encoder_state(towers: Towers) -> dict[str, Tensor]:
    return towers.encoder.state_dict()


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """The same names, the same bits."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="session")
def vit() -> Towers:
    return towers_of(VIT)


@pytest.fixture(scope="session")
def swin() -> Towers:
    return towers_of(SWIN)


@pytest.fixture(scope="session")
def internimage() -> Towers:
    return towers_of(INTERNIMAGE)
