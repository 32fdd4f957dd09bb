"""In which numbers does a fine-tuning compute? In bfloat16 where GPU and encoder bear it, else in float32."""

from __future__ import annotations

import torch
from torch import nn

from pretrain.collectives import from_every_rank, rank

FAR = 0.1  # relative distance of features in bfloat16 from those in float32; 0.02 is usual


def name_of(precision: torch.dtype) -> str:
    """As results tell it."""
    return str(precision).removeprefix("torch.")


def precision_of(model: nn.Module, size: int, device: torch.device) -> torch.dtype:
    """Of the passes: bfloat16 on GPUs that have it, where the encoder bears it; otherwise float32, which is told."""
    if device.type != "cuda" or not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32
    obstacle = obstacle_to_bfloat16(model, size, device)
    if obstacles := from_every_rank([obstacle] if obstacle else []):
        if rank() == 0:
            print(f"fine-tuning runs in float32, since under autocast to bfloat16 {obstacles[0]}")
        return torch.float32
    return torch.bfloat16


def obstacle_to_bfloat16(model: nn.Module, size: int, device: torch.device) -> str:
    """Why the encoder cannot be trained under autocast, judged by one pass of two images; empty where it can.

    Kernels of its own may want numbers of one kind, where autocast mixes them.
    """
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    model.eval()
    with torch.no_grad():
        expected = model.encoder(images).mean(dim=1)
    try:
        with torch.autocast(device.type, torch.bfloat16):
            found = model.encoder(images).mean(dim=1).float()
        if found.requires_grad:
            found.sum().backward()
    except Exception as error:  # of any kernel
        return f"the encoder fails ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    finally:
        model.zero_grad(set_to_none=True)
        model.train()
    apart = float((found - expected).detach().norm() / expected.norm())
    return "" if apart < FAR else f"its features are {100 * apart:.0f} % apart"
