"""Layers that save their input and recompute cheap intermediate steps in the backward pass.

`decoder.py` and `upsampler.py` use them if `kernels.recompute_elementwise` is true. Between two matrix products there
are norms, rotations, activations and small convolutions. Plain autograd keeps a tensor for most of these steps; here
the outputs of products are kept and most other steps are computed twice. One 0.5B layer over 1,332 tokens in float32
then keeps, in MB,

    states 4.8 and normed 4.8, queries 4.8, keys and values 1.4, attention output 4.8, states 4.8 and normed 4.8,
    gate 25.9, other half 25.9

Plain autograd keeps two more tensors of the states' width for the norms and two of the inner width.

Axis letters: T tokens, D width, I inner width of the SwiGLU, B rows, A heads, E head width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def recompute_between_products(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return `function(x)`, keeping only `x`. `function` ends with a matrix product.

    The backward pass recomputes the input of that product, but not the product itself.
    """
    if not torch.is_grad_enabled():
        return function(x)
    result: Tensor = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    return result


class Norm(torch.autograd.Function):
    """A root-mean-square norm that keeps its input and one number per token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Return the normalized and scaled last axis. Statistics are float32."""
        wide = x.float()
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale)
        normed = (wide * scale).to(x.dtype)
        return normed.mul_(weight_D) if normed.dtype == weight_D.dtype else weight_D * normed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients of states and scale."""
        x, weight_D, scale = ctx.saved_tensors
        upstream = gradients[0].float()
        normed = x.float() * scale
        grad_x, grad_weight_D = None, None
        if ctx.needs_input_grad[1]:
            grad_weight_D = (upstream * normed).flatten(0, -2).sum(0).to(weight_D.dtype)
        if ctx.needs_input_grad[0]:
            grad_normed = upstream * weight_D
            share = torch.linalg.vecdot(grad_normed, normed)[..., None].div_(-x.shape[-1])
            grad_x = grad_normed.addcmul_(normed, share).mul_(scale).to(x.dtype)
        return grad_x, grad_weight_D, None


class Rotation(torch.autograd.Function):
    """Rotary positions with half the memory passes: the gradient is rotated back. Keeps only the tables, as plain
    autograd does."""

    @staticmethod
    def forward(ctx: Any, x_BATE: Tensor, cos_B1TE: Tensor, sin_B1TE: Tensor) -> Tensor:
        """Return the rotated heads (first half against second half)."""
        ctx.save_for_backward(cos_B1TE, sin_B1TE)
        return Rotation.turned(x_BATE, cos_B1TE, sin_B1TE, direction=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the heads."""
        cos_B1TE, sin_B1TE = ctx.saved_tensors
        return Rotation.turned(gradients[0], cos_B1TE, sin_B1TE, direction=-1), None, None

    @staticmethod
    def turned(x_BATE: Tensor, cos_B1TE: Tensor, sin_B1TE: Tensor, *, direction: int) -> Tensor:
        """Return heads rotated forwards (1) or back (-1). Both halves of the tables are equal."""
        half = x_BATE.shape[-1] // 2
        turned_BATE = x_BATE * cos_B1TE
        sin = sin_B1TE[..., :half].to(turned_BATE.dtype)
        first, second = x_BATE[..., :half], x_BATE[..., half:]
        turned_BATE[..., :half].addcmul_(second, sin, value=-direction)
        turned_BATE[..., half:].addcmul_(first, sin, value=direction)
        return turned_BATE


class GatedProjection(torch.autograd.Function):
    """`F.linear(silu(gate) * up, weight)` that keeps gate and up and recomputes their product in the backward pass.

    Plain autograd keeps four tensors of the inner width instead of two.
    """

    @staticmethod
    def forward(ctx: Any, gate_TI: Tensor, up_TI: Tensor, weight_DI: Tensor) -> Tensor:
        """Return the projection [T, D]."""
        ctx.save_for_backward(gate_TI, up_TI, weight_DI)
        return F.linear(F.silu(gate_TI).mul_(up_TI), weight_DI)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the gradients of gate, up and weight."""
        gate_TI, up_TI, weight_DI = ctx.saved_tensors
        (upstream_TD,) = gradients
        active_TI = F.silu(gate_TI)
        product_TI = active_TI * up_TI
        grad_weight_DI = upstream_TD.T @ product_TI if ctx.needs_input_grad[2] else None
        grad_product_TI = torch.mm(upstream_TD, weight_DI, out=product_TI)
        grad_up_TI = active_TI.mul_(grad_product_TI)
        grad_product_TI.mul_(up_TI)
        return torch.ops.aten.silu_backward(grad_product_TI, gate_TI), grad_up_TI, grad_weight_DI
