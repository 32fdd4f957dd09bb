"""Does the row that the README adds to the table run as it stands there?"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from pretrain import objectives
from pretrain.balance import BalanceTracker
from pretrain.pretrainer import Pretrainer
from pretrain.recipes import load
from pretrain.towers import Towers
from tests.fakes import FACTS, random_batch, shrink
from tests.paths import ROOT
from tests.stand_ins import encoders


def test_the_row_of_the_readme_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "OBJECTIVES", dict(objectives.OBJECTIVES))
    (code,) = re.findall(
        r"```python\n(from pretrain\.objectives import .*?)```", (ROOT / "README.md").read_text(), re.S
    )
    before = set(objectives.OBJECTIVES)
    exec(code, {})
    (name,) = set(objectives.OBJECTIVES) - before
    run = replace(shrink(load("rows.siamese_feature")), objective=objectives.OBJECTIVES[name])
    torch.manual_seed(0)
    model, teacher = Pretrainer(run, FACTS), Towers(run, FACTS).eval()
    losses = model(random_batch(run, 4), encoders(teacher), BalanceTracker())
    losses.total.backward()
    assert (
        0.5 < losses.nats["dense"].item() < 1.5
    )  # 1 - cosine of features that have nothing to do with each other
    assert all(p.grad is not None for p in model.parameters())
