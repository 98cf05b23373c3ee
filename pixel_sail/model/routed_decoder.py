"""A decoder whose layers have weights of their own for image tokens, each token computed by its own weights only.

`modeling_pixel_sail` takes it in place of `Decoder` where the architecture names `modality_experts`. Tokens are put in
order once, text before image, so that each half goes through its weights as one product; only queries, keys, values and
what attention makes of them return to the order of the sequence:

    sequence  u  <vision> p p </vision>  a b      a layer's products   [u a b] and [<vision> p p </vision>]

`RoutedTokens` is this fast way, `Mixed` the obvious one: both weights on every token, one of the results kept.

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
"""A layer that treats every token by itself."""


class TokenRouting(Protocol):
    """Which tokens are text and which belong to an image."""

    def reorder(self, x_ND: Tensor) -> Tensor:
        """Return tokens of the sequence in the order that layers take."""

    def restore_order(self, x_ND: Tensor) -> Tensor:
        """Undo `reorder`."""

    def apply(self, text: TokenLayer, image: TokenLayer | None, x_ND: Tensor) -> Tensor:
        """Return reordered tokens after the layer of their kind; without a layer for images, `text` takes all."""


class RoutedTokens:
    """Every token goes through the layer of its kind. Both layers run in every call, also on no token, so that every
    rank of a distributed run gathers them equally often and owns a gradient for them."""

    def __init__(self, is_image_BT: Tensor, num_image: int) -> None:
        """`num_image` is how many are true: known on the host, so that no device is asked."""
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
        """Return reordered tokens after the layer of their kind."""
        if image is None:
            return text(x_ND)
        text_ND, image_ND = x_ND.split(self.sizes)
        return torch.cat((text(text_ND), image(image_ND)))


class Mixed:
    """Both layers compute every token, and a mask keeps one of the results."""

    def __init__(self, is_image_BT: Tensor) -> None:
        self.is_image_N1 = is_image_BT.flatten()[:, None]

    def reorder(self, x_ND: Tensor) -> Tensor:
        """Return the tokens as they are."""
        return x_ND

    def restore_order(self, x_ND: Tensor) -> Tensor:
        """Return the tokens as they are."""
        return x_ND

    def apply(self, text: TokenLayer, image: TokenLayer | None, x_ND: Tensor) -> Tensor:
        """Return every token after the layer of its kind."""
        if image is None:
            return text(x_ND)
        share_N1 = self.is_image_N1.to(x_ND.dtype)
        return text(x_ND) * (1.0 - share_N1) + image(x_ND) * share_N1


class ImageWeights(nn.Module):
    """What a layer has a second time, for image tokens; None where text and image share it."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        parts = config.modality_experts
        has_norms = "layernorm" in parts
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps) if has_norms else None
        self.self_attn = Attention(config) if "self_attn" in parts else None
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps) if has_norms else None
        self.mlp = SwiGLU(config) if "mlp" in parts else None


class RoutedLayer(DecoderLayer):
    """A decoder layer with weights for image tokens beside those for text."""

    def __init__(self, config: Architecture) -> None:
        super().__init__(config)
        self.image = ImageWeights(config)

    def forward(
        self, x_BTD: Tensor, rotary: Rotary, backend: AttentionBackend, layer: int, routing: TokenRouting | None = None
    ) -> Tensor:
        """Return the new states: of reordered tokens [N, D] with `routing`, else of text tokens [B, T, D]."""
        if routing is None:
            return super().forward(x_BTD, rotary, backend, layer)
        return self.second_half(x_BTD + self._attended(x_BTD, rotary, backend, layer, routing), routing)

    def _attended(
        self, x_ND: Tensor, rotary: Rotary, backend: AttentionBackend, layer: int, routing: TokenRouting
    ) -> Tensor:
        own = self.self_attn
        num_rows, num_tokens = rotary.cos.shape[0], rotary.cos.shape[2]

        def heads(name: str, x_ND: Tensor) -> Tensor:
            """Return one projection in the order of the sequence [B, heads, T, E]."""
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
        """Return the states after the second half of the layer, which treats every token by itself."""
        if routing is None:
            return super().feed_forward(x_BTD)
        normed = routing.apply(self.post_attention_layernorm, self.image.post_attention_layernorm, x_BTD)
        return x_BTD + routing.apply(self.mlp, self.image.mlp, normed)


class RoutedDecoder(Decoder):
    """The stack of routed layers and the final norm, which text and image share."""

    layer_class = RoutedLayer

    def forward(
        self, x_BTD: Tensor, position_ids_2BT: Tensor, backend: AttentionBackend, routing: TokenRouting | None = None
    ) -> Tensor:
        """Return the states after the final norm [B, T, D]; without `routing` all tokens are text."""
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
