"""Which kernels, optimizer, attention and precision does a run get on this device? One line at its start.

What is chosen by availability, and by what measurement: Triton kernels of DCNv3 and around it where they serve
(benchmarks/dcnv3_gpu.py); torch's AdamW, fused on a GPU; attention as torch's scaled_dot_product_attention picks it.
Products of float32 matrices stay exact: the losses' are, whatever the model's precision, and cost little; torch's own
variable TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 rounds them. InternImage's maps are channels-last from its first layer on.
"""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend

from pretrain.config import Run
from pretrain.kernels import dcnv3_choice, pointwise
from pretrain.models.internimage_config import INTERNIMAGE

HEAD_WIDTH = 64  # channels of an attention head, of which the choice of its backend is asked


def chosen(run: Run, dtype: torch.dtype, device: torch.device, optimizer: torch.optim.Optimizer) -> str:
    """The choices in words; `dtype` is the model's."""
    kind = "fused" if optimizer.defaults["fused"] else "plain"
    words = [
        *_kernels(run, dtype, device),
        f"AdamW of torch ({kind})",
        f"attention {_attention(dtype, device)}",
    ]
    if device.type == "cuda":
        rounded = torch.get_float32_matmul_precision() != "highest"
        words.append(f"float32 products {'rounded to TF32' if rounded else 'exact'}")
    return ", ".join(words)


def _kernels(run: Run, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Of the operators that InternImage needs; none of another backbone."""
    if run.backbone.family != "internimage":
        return []
    size = INTERNIMAGE[run.backbone.size]
    call = dcnv3_choice.Call(device.type, dtype, size.widths[0] // size.groups[0])
    around = pointwise.choose(torch.empty(0, dtype=dtype, device=device))
    return [f"DCNv3 {dcnv3_choice.choose_path(call).path}", f"steps around it {around.path}", "channels-last"]


def _attention(dtype: torch.dtype, device: torch.device) -> str:
    """What torch would take for heads of the usual width, without a mask and with one."""
    heads = torch.empty(1, 1, 16, HEAD_WIDTH, dtype=dtype, device=device)
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool, device=device)
    said = [SDPBackend(torch._fused_sdp_choice(heads, heads, heads, attn_mask=m)) for m in (None, mask)]
    plain, masked = (backend.name.lower().removesuffix("_attention") for backend in said)
    return plain if plain == masked else f"{plain}, with a mask {masked}"
