"""The decoder-only transformer: RMSNorm, grouped-query attention, SwiGLU, 2-D rotary positions.

`modeling_pixel_sail` and `generation` pass it embeddings; it returns the states after the final norm. Images affect it
only through the positions and the attention backend.

Example: embeddings [2, 194, 128] with positions [2, 2, 194] and `MaskedAttention(mask [2, 1, 194, 194])` give states
[2, 194, 128].

Axis letters: B rows, T tokens, S keys, D width, A attention heads, G key-value heads, E head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pixel_sail.model.configuration_pixel_sail import Architecture
from pixel_sail.model.recompute import GatedProjection, Norm, Rotation


class AttentionBackend(Protocol):
    """Computes attention and determines which keys each query sees."""

    def __call__(self, layer: int, q_BATE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor) -> Tensor:
        """Return the attention output [B, A, T, E] of a layer from rotated queries and keys, and values."""


def attend(q_BATE: Tensor, k_BGSE: Tensor, v_BGSE: Tensor, mask_B1TS: Tensor | None) -> Tensor:
    """Return attention of every query over the keys that the mask allows (None: all keys)."""
    repeats = q_BATE.shape[1] // k_BGSE.shape[1]
    keys, values = k_BGSE.repeat_interleave(repeats, dim=1), v_BGSE.repeat_interleave(repeats, dim=1)
    return F.scaled_dot_product_attention(q_BATE, keys, values, attn_mask=mask_B1TS)


@dataclass(frozen=True, kw_only=True)
class MaskedAttention:
    """Attention under one dense mask."""

    mask_B1TS: Tensor

    def __call__(self, layer: int, q_BATE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor) -> Tensor:
        """Return the attention output."""
        return attend(q_BATE, k_BGTE, v_BGTE, self.mask_B1TS)


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Cosines and sines [B, 1, T, E] of every token, computed once and shared by all layers."""

    cos: Tensor
    sin: Tensor
    recompute: bool = False
    """Whether rotation is one autograd function, whose backward pass rotates the gradient back."""

    def __call__(self, x_BATE: Tensor) -> Tensor:
        """Rotate queries or keys (first half against second half of the head)."""
        if self.recompute and torch.is_grad_enabled():
            turned: Tensor = Rotation.apply(x_BATE, self.cos, self.sin)
            return turned
        first, second = x_BATE.chunk(2, dim=-1)
        return x_BATE * self.cos + torch.cat((-second, first), dim=-1) * self.sin


def rotary_tables(
    position_ids_2BT: Tensor, head_dim: int, theta: float, dtype: torch.dtype, *, recompute: bool = False
) -> Rotary:
    """Return the rotation of every token.

    The lower half of the frequencies encodes the row position, the upper half the column position. For text both are
    equal, which is ordinary 1-D rotary embedding. Angles are float32, the tables have `dtype`.
    Source: Qwen2-VL's sectioned rotary embedding with sections (0, head_dim / 4, head_dim / 4).
    """
    device = position_ids_2BT.device
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponent  # [E/2]
    rows, columns = position_ids_2BT.float()[..., None].unbind(0)  # each [B, T, 1]
    quarter = head_dim // 4
    angles = torch.cat((rows * frequencies[:quarter], columns * frequencies[quarter:]), dim=-1)  # [B, T, E/2]
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    # In float64: the first float32 cosines of a process with several CPU threads differed in the last bit between runs.
    # Rounded afterwards, the tables are the same in every run.
    angles = angles.double()
    return Rotary(cos=angles.cos().to(dtype), sin=angles.sin().to(dtype), recompute=recompute)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale. Statistics are float32."""

    recompute = True
    """Whether the backward pass recomputes the result (see `Kernels.recompute_elementwise`)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last axis."""
        if self.recompute and x.device.type != "cpu" and x.dtype == self.weight.dtype:
            # torch's kernel also keeps only its input and one number per token. In half precision it rounds once.
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        if self.recompute and torch.is_grad_enabled():
            normed: Tensor = Norm.apply(x, self.weight, self.eps)
            return normed
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    """Projections of grouped-query attention. The attention itself is computed by an attention backend."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_groups = config.num_key_value_heads
        self.head_dim = config.head_dim
        group_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, group_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, group_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def heads(self, x_BTD: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries [B, A, T, E] and keys [B, G, T, E], and values [B, G, T, E]."""
        batch, num_tokens, _ = x_BTD.shape
        q_BATE = self.q_proj(x_BTD).view(batch, num_tokens, self.num_heads, self.head_dim).transpose(1, 2)
        k_BGTE = self.k_proj(x_BTD).view(batch, num_tokens, self.num_groups, self.head_dim).transpose(1, 2)
        v_BGTE = self.v_proj(x_BTD).view(batch, num_tokens, self.num_groups, self.head_dim).transpose(1, 2)
        return rotary(q_BATE), rotary(k_BGTE), v_BGTE

    def project_output(self, output_BATE: Tensor) -> Tensor:
        """Return the projected attention output."""
        return self.o_proj(output_BATE.transpose(1, 2).flatten(2))


class DownProjection(nn.Linear):
    """The down projection of a SwiGLU, applied to the product of both halves."""

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """Return the projection of silu(gate) * up, or of `gate` alone without `up`.

        Both halves are arguments so that ZeRO-3 gathers the weight for the call that uses it.
        """
        if up is None:
            return super().forward(gate)
        # Under autocast both halves are in half precision already, and the weight must match.
        weight = self.weight.to(gate.dtype)
        projected = GatedProjection.apply(gate.flatten(0, -2), up.flatten(0, -2), weight)
        assert isinstance(projected, Tensor)
        return projected.view(*gate.shape[:-1], projected.shape[-1])


class SwiGLU(nn.Module):
    """Gated feed-forward layer without biases."""

    recompute = True
    """Whether the backward pass recomputes the product of both halves (see `Kernels.recompute_elementwise`)."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = DownProjection(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to the last axis."""
        # A LoRA layer (model/lora.py) expects the product.
        if self.recompute and torch.is_grad_enabled() and isinstance(self.down_proj, DownProjection):
            return self.down_proj(self.gate_proj(x), self.up_proj(x))
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual connection."""

    compiled = False
    """Whether both halves, without the attention products, are compiled (see `Kernels.compile`)."""
    checkpointed = False
    """Whether the backward pass recomputes the feed-forward half (see `OptimConfig.activation_checkpointing`)."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x_BTD: Tensor, rotary: Rotary, backend: AttentionBackend, layer: int) -> Tensor:
        """Return the new states."""
        heads = partial(through_compile(type(self).heads), self) if self.compiled else self.heads
        return self.second_half(x_BTD + self.self_attn.project_output(backend(layer, *heads(x_BTD, rotary))))

    def heads(self, x_BTD: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries, keys and values of the layer."""
        return self.self_attn.heads(self.input_layernorm(x_BTD), rotary)

    def second_half(self, x_BTD: Tensor, *others: Any) -> Tensor:
        """Return `feed_forward` of the arguments, compiled and checkpointed if enabled."""
        half: Callable[..., Tensor] = self.feed_forward
        if self.compiled:
            half = partial(through_compile(type(self).feed_forward), self)
        if self.checkpointed and torch.is_grad_enabled():
            result: Tensor = checkpoint(half, x_BTD, *others, use_reentrant=False, preserve_rng_state=False)
            return result
        return half(x_BTD, *others)

    def feed_forward(self, x_BTD: Tensor) -> Tensor:
        """Return the states after the feed-forward half of the layer, which is applied per token."""
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


@cache
def through_compile(part: Callable[..., Any]) -> Callable[..., Any]:
    """Return a compiled method of a layer or decoder class: one graph for all instances and all sizes above 1."""
    return torch.compile(part, dynamic=True)


class Decoder(nn.Module):
    """The stack of layers and the final norm."""

    layer_class: type[DecoderLayer] = DecoderLayer

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.layer_class(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head_dim = config.head_dim
        self.rope_theta = config.rope_theta
        self.gradient_checkpointing = False

    def rotary(self, position_ids_2BT: Tensor, dtype: torch.dtype) -> Rotary:
        """Return the rotation of every token, shared by all layers."""
        recompute = self.norm.recompute
        return rotary_tables(position_ids_2BT, self.head_dim, self.rope_theta, dtype, recompute=recompute)

    def forward(self, x_BTD: Tensor, position_ids_2BT: Tensor, backend: AttentionBackend) -> Tensor:
        """Return the states after the final norm [B, T, D]."""
        rotary = self.rotary(position_ids_2BT, x_BTD.dtype)
        for index, layer in enumerate(self.layers):
            if self.gradient_checkpointing and self.training:
                x_BTD = checkpoint(layer, x_BTD, rotary, backend, index, use_reentrant=False)
            else:
                x_BTD = layer(x_BTD, rotary, backend, index)
        return self.norm(x_BTD)
