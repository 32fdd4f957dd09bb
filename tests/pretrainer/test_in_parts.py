"""Is the gradient of a batch in parts that of the batch at once, for every row of the table?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.saved import peak_saved
from pretrain.balance import BalanceTracker
from pretrain.micro_batches import in_parts
from pretrain.objectives import OBJECTIVES
from pretrain.pretrainer import Pretrainer
from pretrain.recipes import load
from pretrain.towers import Towers
from tests.fakes import FACTS, random_batch, shrink
from tests.stand_ins import encoders

IMAGES = 8
# Of rows that differ in the balance alone, one.
ROWS = list({repr((o.input, o.targets)): row for row, o in OBJECTIVES.items()}.values())


def gradients(row, micro_batches):
    """Nats, gradients and balance norms of a step with drop path, after which no generator has moved."""
    run = load("m3i.vit_b16" if row == "m3i" else f"rows.{row}")
    backbone = replace(run.backbone, family="vit", drop_path=0.3, token_norm="batch")
    run = replace(shrink(replace(run, backbone=backbone)), batch=IMAGES)
    torch.manual_seed(0)
    model, teacher = Pretrainer(run, FACTS, micro_batches), Towers(run, FACTS).eval()
    state, tracker = torch.get_rng_state(), BalanceTracker()
    losses = model(random_batch(run, IMAGES), encoders(teacher), tracker)
    losses.total.backward()
    assert torch.equal(torch.get_rng_state(), state), "the parts would draw something else the second time"
    tracker.advance()
    norms = torch.stack([tracker.image_norm, tracker.label_norm])
    return {
        "nats": losses.nats,
        "norms": norms,
        "gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
    }


@pytest.mark.parametrize("row", ROWS)
def test_a_row_in_parts_has_the_gradient_of_the_batch_at_once(row):
    parts, whole = gradients(row, 4), gradients(row, 1)
    assert parts["gradients"].keys() == whole["gradients"].keys()
    largest = max(one.abs().max().item() for one in whole["gradients"].values())
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5 * largest)  # float32 sums in another order


def test_activations_live_for_one_part_at_a_time():
    weight = torch.rand(8, 8, requires_grad=True)
    peaks = {}
    for parts in (1, 4):
        with peak_saved() as peak:
            in_parts(parts, deep(weight), torch.rand(64, 8)).sum().backward()
        peaks[parts] = peak.bytes
    assert peaks[4] < 1.3 * peaks[1] / 4  # and the input of every part


def deep(weight):
    """Twenty layers whose every output is kept for the backward pass."""

    def compute(rows):
        for _ in range(20):
            rows = (rows @ weight).tanh()
        return rows

    return compute


def test_outputs_that_nothing_reads_need_no_gradient():
    weight = torch.rand(3, requires_grad=True)
    x = torch.rand(6, 3, requires_grad=True)
    used, _ = in_parts(3, lambda rows: (rows * weight, rows.exp()), x)
    used.sum().backward()
    torch.testing.assert_close(weight.grad, x.detach().sum(0))
    torch.testing.assert_close(x.grad, weight.detach().expand(6, 3))
