"""How far is a compiled InternImage from itself on a CPU? Prints JSON; run by test_internimage.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from pretrain.models.internimage import InternImage, InternImageConfig


def error(dynamic: bool) -> float:
    """Greatest error of the gradient of any parameter, over the greatest number of that gradient."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = InternImage(InternImageConfig(channels=16, depths=(1, 1), groups=(1, 2), res_post_norm=True))
    if dynamic:  # half of the time; the other level's block differs by its widths alone
        del model.levels[1].blocks[0]
    images, gradients = torch.randn(2, 3, 32, 32), []
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for function in (model, compiled):
        loss = sum(stage_map.sin().sum() for stage_map in function(images))
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in zip(*gradients, strict=True)
    )


if __name__ == "__main__":
    print(json.dumps({"fixed sizes": error(False), "any size": error(True)}))
