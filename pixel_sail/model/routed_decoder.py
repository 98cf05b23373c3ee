"""A decoder whose layers have separate weights for image tokens.

`modeling_pixel_sail` uses it instead of `Decoder` if the architecture has `modality_experts`. Tokens are reordered
once, text before image, so that each modality is one matrix product per layer. Only queries, keys, values and the
attention output are in sequence order:

    sequence  u  <vision> p p </vision>  a b      a layer's products   [u a b] and [<vision> p p </vision>]

`RoutedTokens` is this fast implementation. `Mixed` is the reference: both weights on every token, one result kept.

Axis letters: B rows, T tokens, N = B x T, D width, A attention heads, G key-value heads, E head width.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pixel_sail.model.configuration_pixel_sail import Architecture
from pixel_sail.model.decoder import (
    Attention,
    AttentionBackend,
    Decoder,
    DecoderLayer,
    RMSNorm,
    Rotary,
    SwiGLU,
)

TokenLayer = Callable[[Tensor], Tensor]
"""A layer that is applied per token."""


class TokenRouting(Protocol):
    """Assignment of tokens to text and image layers."""

    def reorder(self, x_ND: Tensor) -> Tensor:
        """Return tokens of the sequence in the order expected by the layers."""

    def restore_order(self, x_ND: Tensor) -> Tensor:
        """Undo `reorder`."""

    def apply(self, text: TokenLayer, image: TokenLayer | None, x_ND: Tensor) -> Tensor:
        """Apply to reordered tokens the layer of their modality. Without an image layer, `text` is applied to all."""


class RoutedTokens:
    """Applies to every token the layer of its modality. Both layers run in every call, even without tokens, so that
    every rank of a distributed run gathers them equally often and has a gradient for them."""

    def __init__(self, is_image_BT: Tensor, num_image: int) -> None:
        """`num_image`: the number of true values, passed from the host to avoid a device synchronization."""
        is_image_N = is_image_BT.flatten()
        self.sizes = (len(is_image_N) - num_image, num_image)
        self.order_N = is_image_N.to(torch.uint8).argsort(stable=True)
        places_N = torch.arange(len(is_image_N), device=is_image_N.device)
        self.inverse_N = torch.empty_like(self.order_N).scatter_(0, self.order_N, places_N)

    def reorder(self, x_ND: Tensor) -> Tensor:
        """Return text tokens, then image tokens."""
        return x_ND.index_select(0, self.order_N)

    def restore_order(self, x_ND: Tensor) -> Tensor:
        """Undo `reorder`."""
        return x_ND.index_select(0, self.inverse_N)

    def apply(self, text: TokenLayer, image: TokenLayer | None, x_ND: Tensor) -> Tensor:
        """Apply to reordered tokens the layer of their modality."""
        if image is None:
            return text(x_ND)
        text_ND, image_ND = x_ND.split(self.sizes)
        return torch.cat((text(text_ND), image(image_ND)))


class Mixed:
    """Applies both layers to every token and selects one of the results."""

    def __init__(self, is_image_BT: Tensor) -> None:
        self.is_image_N1 = is_image_BT.flatten()[:, None]

    def reorder(self, x_ND: Tensor) -> Tensor:
        """Return the tokens as they are."""
        return x_ND

    def restore_order(self, x_ND: Tensor) -> Tensor:
        """Return the tokens as they are."""
        return x_ND

    def apply(self, text: TokenLayer, image: TokenLayer | None, x_ND: Tensor) -> Tensor:
        """Apply to every token the layer of its modality."""
        if image is None:
            return text(x_ND)
        share_N1 = self.is_image_N1.to(x_ND.dtype)
        return text(x_ND) * (1.0 - share_N1) + image(x_ND) * share_N1


class ImageWeights(nn.Module):
    """The parts of a layer that image tokens have separately. None: shared with text."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        parts = config.modality_experts
        has_norms = "layernorm" in parts
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps) if has_norms else None
        self.self_attn = Attention(config) if "self_attn" in parts else None
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps) if has_norms else None
        self.mlp = SwiGLU(config) if "mlp" in parts else None


class RoutedLayer(DecoderLayer):
    """A decoder layer with separate weights for image tokens."""

    def __init__(self, config: Architecture) -> None:
        super().__init__(config)
        self.image = ImageWeights(config)

    def forward(
        self, x_BTD: Tensor, rotary: Rotary, backend: AttentionBackend, layer: int, routing: TokenRouting | None = None
    ) -> Tensor:
        """Return the new states: of reordered tokens [N, D] with `routing`, otherwise of text tokens [B, T, D]."""
        if routing is None:
            return super().forward(x_BTD, rotary, backend, layer)
        return self.second_half(x_BTD + self._attended(x_BTD, rotary, backend, layer, routing), routing)

    def _attended(
        self, x_ND: Tensor, rotary: Rotary, backend: AttentionBackend, layer: int, routing: TokenRouting
    ) -> Tensor:
        own = self.self_attn
        num_rows, num_tokens = rotary.cos.shape[0], rotary.cos.shape[2]

        def heads(name: str, x_ND: Tensor) -> Tensor:
            """Return one projection in sequence order [B, heads, T, E]."""
            mapped_ND = routing.restore_order(self._projected(name, x_ND, routing))
            return mapped_ND.view(num_rows, num_tokens, -1, own.head_dim).transpose(1, 2)

        x_ND = routing.apply(self.input_layernorm, self.image.input_layernorm, x_ND)
        q_BATE = heads("q_proj", x_ND)
        k_BGTE = heads("k_proj", x_ND)
        v_BGTE = heads("v_proj", x_ND)
        output_BATE = backend(layer, rotary(q_BATE), rotary(k_BGTE), v_BGTE)
        output_ND = output_BATE.transpose(1, 2).reshape(num_rows * num_tokens, -1)
        return self._projected("o_proj", routing.reorder(output_ND), routing)

    def _projected(self, name: str, x_ND: Tensor, routing: TokenRouting) -> Tensor:
        """Return reordered tokens after one of the attention's linear layers."""
        other = self.image.self_attn
        return routing.apply(getattr(self.self_attn, name), None if other is None else getattr(other, name), x_ND)

    def feed_forward(self, x_BTD: Tensor, routing: TokenRouting | None = None) -> Tensor:
        """Return the states after the feed-forward half of the layer, which is applied per token."""
        if routing is None:
            return super().feed_forward(x_BTD)
        normed = routing.apply(self.post_attention_layernorm, self.image.post_attention_layernorm, x_BTD)
        return x_BTD + routing.apply(self.mlp, self.image.mlp, normed)


class RoutedDecoder(Decoder):
    """The stack of routed layers and the final norm, which text and image tokens share."""

    layer_class = RoutedLayer

    def forward(
        self, x_BTD: Tensor, position_ids_2BT: Tensor, backend: AttentionBackend, routing: TokenRouting | None = None
    ) -> Tensor:
        """Return the states after the final norm [B, T, D]. Without `routing` all tokens are text."""
        if routing is None:
            return super().forward(x_BTD, position_ids_2BT, backend)
        rotary = self.rotary(position_ids_2BT, x_BTD.dtype)
        x_ND = routing.reorder(x_BTD.flatten(0, 1))
        for index, layer in enumerate(self.layers):
            if self.gradient_checkpointing and self.training:
                x_ND = checkpoint(layer, x_ND, rotary, backend, index, routing, use_reentrant=False)
            else:
                x_ND = layer(x_ND, rotary, backend, index, routing)
        return self.norm(routing.restore_order(x_ND)).view_as(x_BTD)
