"""What stands around DCNv3 in a block, and costs as much when every step reads and writes the whole map?

Three functions, Triton kernels where Triton serves the device and plain torch elsewhere: a branch joins its map
and is normalised on both sides (one kernel); depth-wise convolution, then LayerNorm and GELU (two kernels); a
linear layer behind a GELU whose result is not kept (one kernel, backward). What they cost is the memory that
they move. Norms and sums run in float32, whatever the dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pretrain.kernels.dcnv3_choice import FUSED_DTYPES, triton_obstacle

NORM_EPS = 1e-6  # of every LayerNorm of InternImage
FUSED_SIZES = (3, 5)  # sides of the published depth-wise kernels


def choose_path(x: Tensor) -> str:
    """`triton` where its kernels serve the device and the dtype; never on a CPU, where only tests run them."""
    is_served = x.device.type != "cpu" and x.dtype in FUSED_DTYPES and triton_obstacle(x.device.type) is None
    return "triton" if is_served else "torch"


def residual_norm(
    x: Float[Tensor, "n h w c"],
    branch: Float[Tensor, "n h w c"],
    *,
    share: Float[Tensor, " n"] | None = None,
    gamma: Float[Tensor, " c"] | None = None,
    outer: Float[Tensor, "2 c"] | None = None,
    following: Float[Tensor, "2 c"] | None = None,
    path: str | None = None,
) -> tuple[Float[Tensor, "n h w c"], Float[Tensor, "n h w c"] | None]:
    """(total, norm(total; following)) with total = x + share gamma norm(branch; outer), in the dtype of x.

    `outer` and `following` are weight and bias of a LayerNorm over channels; `share` is what stochastic depth
    multiplies an image's branch by. What is None is left out; without `following` the second result is None.
    """
    if (path or choose_path(x)) == "triton":
        from pretrain.kernels import pointwise_triton  # here: Triton is optional

        total, normed = pointwise_triton.residual_norm(x, branch, share, gamma, outer, following, NORM_EPS)
        return total, normed if following is not None else None
    if outer is not None:
        branch = F.layer_norm(branch, branch.shape[-1:], *outer.unbind(), NORM_EPS)
    if gamma is not None:
        branch = gamma * branch
    if share is not None:
        branch = branch * share[:, None, None, None]
    total = x + branch
    if following is None:
        return total, None
    return total, F.layer_norm(total, total.shape[-1:], *following.unbind(), NORM_EPS)


def depthwise_norm_gelu(
    x: Float[Tensor, "n h w c"],
    weight: Float[Tensor, "c 1 k k"],
    bias: Float[Tensor, " c"],
    norm: Float[Tensor, "2 c"],
    *,
    path: str | None = None,
) -> Float[Tensor, "n h w c"]:
    """gelu(norm(depth-wise convolution of x)): odd k, stride 1, as large as x; zero outside the map."""
    if path is None:
        path = choose_path(x) if weight.shape[-1] in FUSED_SIZES else "torch"
    if path == "triton":
        from pretrain.kernels import pointwise_triton  # here: Triton is optional

        return pointwise_triton.depthwise_norm_gelu(x, weight.flatten(1).t(), bias, norm, NORM_EPS)
    padding, channels = weight.shape[-1] // 2, x.shape[-1]
    pre = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=channels).permute(0, 2, 3, 1)
    return F.gelu(F.layer_norm(pre, (channels,), *norm.unbind(), NORM_EPS))


def gelu_linear(
    x: Float[Tensor, "b c"], weight: Float[Tensor, "d c"], bias: Float[Tensor, " d"]
) -> Float[Tensor, "b d"]:
    """linear(gelu(x)), of which x alone is kept for the gradient: gelu(x) is computed again there."""
    return _GeluLinear.apply(x, weight, bias)


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.addmm(bias, F.gelu(x), weight.t())

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        activated, grad_x = gelu_again(x, grad_out @ weight)
        of_weight = grad_out.t() @ activated if ctx.needs_input_grad[1] else None
        return grad_x, of_weight, grad_out.sum(0) if ctx.needs_input_grad[2] else None


def gelu_again(
    x: Float[Tensor, "b c"], grad: Float[Tensor, "b c"], *, path: str | None = None
) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b c"]]:
    """gelu(x), and the gradient of x from that of gelu(x)."""
    if (path or choose_path(x)) == "triton":
        from pretrain.kernels import pointwise_triton  # here: Triton is optional

        return pointwise_triton.gelu_grad(x, grad)
    return F.gelu(x), torch.ops.aten.gelu_backward(grad, x)
