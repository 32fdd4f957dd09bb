"""What stands around DCNv3 in a block, and costs as much when every step reads and writes the whole map?

Triton kernels where Triton serves the device and plain torch elsewhere: a branch joins its map and is normalised
on both sides (one kernel, which is a LayerNorm without a branch); depth-wise convolution, then LayerNorm and GELU
(two kernels); a linear layer, also behind a GELU whose result is not kept (two kernels, backward). What they cost is
the memory that they move. Norms and sums run in float32, whatever the dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pretrain.kernels.dcnv3_choice import FUSED_DTYPES, Choice, announce, triton_obstacle

NORM_EPS = 1e-6  # of every LayerNorm of InternImage
PATHS = ("torch", "triton")
FUSED_SIZES = (3, 5)  # sides of the published depth-wise kernels


def choose_path(x: Tensor) -> str:
    """`triton` where its kernels serve the device and the dtype; never on a CPU, where only tests run them.

    The log says it once a process, with the reason.
    """
    choice = choose(x)
    if not torch.compiler.is_compiling():
        announce("the steps around DCNv3", x.device.type, x.dtype, choice)
    return choice.path


def choose(x: Tensor) -> Choice:
    """Path and reason."""
    if x.device.type == "cpu":
        return Choice("torch", "Triton has no CPU backend")
    if x.dtype not in FUSED_DTYPES:
        return Choice(
            "torch", f"no fused kernels: dtype {x.dtype} is not among {', '.join(map(str, FUSED_DTYPES))}"
        )
    obstacle = triton_obstacle(x.device.type)
    if obstacle is not None:
        return Choice("torch", f"no fused kernels: {obstacle}")
    return Choice("triton", "the fused kernels serve this device and dtype")


def _checked(path: str | None, x: Tensor) -> str:
    """The path asked for, or the chosen one; ValueError when it is unknown or cannot run on x's device."""
    if path is None:
        return choose_path(x)
    if path not in PATHS:
        raise ValueError(f"path={path!r} is unknown; choose from {PATHS}")
    obstacle = triton_obstacle(x.device.type) if path == "triton" else None
    if obstacle is not None:
        raise ValueError(f"path={path!r} cannot run on {x.device.type}: {obstacle}")
    return path


def _check_residual(x: Tensor, branch: Tensor, *parts: Tensor | None) -> None:
    """ValueError unless branch is as large as x, and share, gamma, outer and following fit it."""
    n, c = len(x), x.shape[-1]
    wanted = {"share": (n,), "gamma": (c,), "outer": (2, c), "following": (2, c)}
    found = {"branch": (branch, tuple(x.shape))}
    found |= {
        name: (part, shape)
        for (name, shape), part in zip(wanted.items(), parts, strict=True)
        if part is not None
    }
    for name, (part, shape) in found.items():
        if tuple(part.shape) != shape:
            raise ValueError(
                f"residual_norm {name} has shape {tuple(part.shape)}, but a map of {tuple(x.shape)} needs {shape}"
            )


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
    multiplies an image's branch by, without gradient. What is None is left out; without `following` the second
    result is None. Differentiable once on the Triton path. Raises ValueError for shapes that do not fit.
    """
    _check_residual(x, branch, share, gamma, outer, following)
    share = None if share is None else share.detach()
    if _checked(path, x) == "triton":
        from pretrain.kernels import residual_triton  # here: Triton is optional

        parts = (share, gamma, outer, following)
        total, normed, _ = residual_triton.call_residual_norm(x, branch, *parts, NORM_EPS)
        return total, normed if following is not None else None
    if outer is not None:
        branch = F.layer_norm(branch, branch.shape[-1:], *outer.unbind(), NORM_EPS)
    if gamma is not None:
        branch = gamma * branch
    if share is not None:
        branch = branch * share[:, None, None, None]
    total = x + branch.to(x.dtype)
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
    """gelu(norm(depth-wise convolution of x)): odd k, stride 1, as large as x; zero outside the map.

    `norm` is weight and bias. Differentiable once on the Triton path, which serves k = 3 and 5. Raises
    ValueError for a kernel that is not square and odd, or does not fit x.
    """
    size = weight.shape[-1]
    if weight.shape != (x.shape[-1], 1, size, size) or size % 2 == 0:
        raise ValueError(
            f"depth-wise weight has shape {tuple(weight.shape)}, but a map of {x.shape[-1]} channels needs "
            f"[{x.shape[-1]}, 1, k, k] with odd k"
        )
    if path == "triton" and size not in FUSED_SIZES:
        raise ValueError(f"path='triton' has kernels of size {FUSED_SIZES}, not {size}: leave the path out")
    if _checked(path if size in FUSED_SIZES else "torch", x) == "triton":
        from pretrain.kernels import pointwise_triton  # here: Triton is optional

        return pointwise_triton.call_depthwise_norm_gelu(x, weight.flatten(1).t(), bias, norm, NORM_EPS)[0]
    channels = x.shape[-1]
    pre = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=size // 2, groups=channels).permute(
        0, 2, 3, 1
    )
    return F.gelu(F.layer_norm(pre, (channels,), *norm.unbind(), NORM_EPS))


def layer_norm(
    x: Float[Tensor, "*b c"], norm: Float[Tensor, "2 c"], *, path: str | None = None
) -> Float[Tensor, "*b c"]:
    """LayerNorm over the last axis by weight and bias, with NORM_EPS. Differentiable once on the Triton path."""
    if _checked(path, x) == "triton":
        from pretrain.kernels import residual_triton  # here: Triton is optional

        return residual_triton.call_layer_norm(x, norm, NORM_EPS)[0]
    return F.layer_norm(x, x.shape[-1:], *norm.unbind(), NORM_EPS)


def rows_linear(
    x: Float[Tensor, "b c"],
    weight: Float[Tensor, "d c"],
    bias: Float[Tensor, " d"],
    *,
    has_gelu: bool = False,
) -> Float[Tensor, "b d"]:
    """linear(x), or linear(gelu(x)), of which x alone is kept for the gradient: gelu(x) is computed again there.

    Under autocast all three are cast as F.linear would cast them. The bias's gradient is summed in float32.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    return _RowsLinear.apply(x, weight, bias, has_gelu)


class _RowsLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, has_gelu: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_gelu = has_gelu
        return torch.addmm(bias, F.gelu(x) if has_gelu else x, weight.t())

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_out @ weight if ctx.has_gelu or ctx.needs_input_grad[0] else None
        if ctx.has_gelu:
            x, grad_x = gelu_again(x, grad_x)
        of_weight = grad_out.t() @ x if ctx.needs_input_grad[1] else None
        return grad_x, of_weight, column_sum(grad_out) if ctx.needs_input_grad[2] else None, None


def column_sum(x: Float[Tensor, "b c"], *, path: str | None = None) -> Float[Tensor, " c"]:
    """Sum over the rows, added in float32."""
    if _checked(path, x) == "triton":
        from pretrain.kernels import pointwise_triton  # here: Triton is optional

        return pointwise_triton.call_column_sum(x).to(x.dtype)
    return x.sum(0)


def gelu_again(
    x: Float[Tensor, "*b c"], grad: Float[Tensor, "*b c"], *, path: str | None = None
) -> tuple[Float[Tensor, "*b c"], Float[Tensor, "*b c"]]:
    """gelu(x), and the gradient of x from that of gelu(x)."""
    if _checked(path, x) == "triton":
        from pretrain.kernels import pointwise_triton  # here: Triton is optional

        return pointwise_triton.call_gelu_grad(x, grad)
    return F.gelu(x), torch.ops.aten.gelu_backward(grad, x)
