"""Attention backends for packed sequences. The image of a sample is always its prefix, so no dense mask is needed.

`modeling_pixel_sail` calls `attention_backend` once per forward pass and passes the result to the decoder. A sample of
1,202 image tokens and a conversation of 130 tokens has two attention segments: 1,202 queries over 1,202 keys without a
mask, and 130 queries over 1,332 keys, causal from the bottom right. Each independent question is a segment over the
image and itself. `attention_mask.py` builds the equivalent dense mask, which tests compare with.

Axis letters: B rows, T tokens, A attention heads, G key-value heads, E head width, I segments of one shape, Q queries
of a segment, K keys of a segment, N all tokens of all rows.
"""

import inspect
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixel_sail.model.attention_mask import attention_mask
from pixel_sail.model.decoder import AttentionBackend, MaskedAttention
from pixel_sail.model.spans import sample_spans
from pixel_sail.model.transfer import to_device
from pixel_sail.model.turn_attention import TurnAttention, fastest_on_cpu
from pixel_sail.types import DataError, SampleSpan


@dataclass(frozen=True, kw_only=True)
class AttentionSegment:
    """One product of queries and keys: tokens [start, start + num_queries) of a row attend to the first
    `num_prefix_keys` tokens of their sample and to themselves, causally unless the segment is an image."""

    row: int
    start: int
    num_queries: int
    prefix_start: int
    num_prefix_keys: int
    is_image: bool


def attention_segments(spans: Sequence[SampleSpan]) -> tuple[AttentionSegment, ...]:
    """Return the segments of all samples, in the order of their tokens."""
    segments = []
    for span in spans:
        if span.image:
            segments.append(_segment(span, 0, span.image, num_prefix_keys=0, is_image=True))
        start = span.image
        if span.shared:
            segments.append(_segment(span, start, span.shared, num_prefix_keys=start))
        start = seen = span.image + span.shared
        for length in span.branches:
            segments.append(_segment(span, start, length, num_prefix_keys=seen))
            start += length
    return tuple(segments)


def _segment(
    span: SampleSpan, offset: int, num_queries: int, *, num_prefix_keys: int, is_image: bool = False
) -> AttentionSegment:
    return AttentionSegment(
        row=span.row,
        start=span.start + offset,
        num_queries=num_queries,
        prefix_start=span.start,
        num_prefix_keys=num_prefix_keys,
        is_image=is_image,
    )


class SegmentAttention:
    """Torch's fused CPU kernel, called once for all segments of one shape. Padding gets zeros."""

    def __init__(self, spans: Sequence[SampleSpan], *, dtype: torch.dtype) -> None:
        groups: dict[tuple[int, int, bool], list[AttentionSegment]] = defaultdict(list)
        for segment in attention_segments(spans):
            groups[segment.num_queries, segment.num_prefix_keys, segment.is_image].append(segment)
        self.groups = list(groups.items())
        # Causal from the bottom right, additive, in the dtype of the scores. Built once, not in every layer.
        self.masks: dict[tuple[int, int], Tensor] = {}
        for (queries, num_prefix_keys, is_image), _ in self.groups:
            if not is_image:
                mask_QK = torch.zeros(queries, num_prefix_keys + queries, dtype=dtype)
                mask_QK[:, num_prefix_keys:].masked_fill_(
                    torch.ones(queries, queries, dtype=torch.bool).triu(1), -torch.inf
                )
                self.masks[queries, num_prefix_keys] = mask_QK

    def __call__(self, layer: int, q_BATE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor) -> Tensor:
        """Return the attention output."""
        if torch.is_autocast_enabled("cpu"):  # autocast does not cover the private kernel
            dtype = torch.get_autocast_dtype("cpu")
            q_BATE, k_BGTE, v_BGTE = (x.to(dtype) for x in (q_BATE, k_BGTE, v_BGTE))
        output_BATE: Tensor = SegmentProducts.apply(q_BATE, k_BGTE, v_BGTE, self)
        return output_BATE

    def mask(self, shape: tuple[int, int, bool], dtype: torch.dtype) -> Tensor | None:
        """Return the additive mask for segments of one shape."""
        queries, num_prefix_keys, is_image = shape
        return None if is_image else self.masks[queries, num_prefix_keys].to(dtype)


class SegmentProducts(torch.autograd.Function):
    """Attention over all segments of a layer. Saves queries, keys, values and output of whole rows, no slices.

    The same computation as slices, stacks and `scaled_dot_product_attention` under autograd saves keys and values once
    per head and segment, and its backward pass fills a tensor of zeros for every slice.
    """

    @staticmethod
    def forward(ctx: Any, q_BATE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor, attention: SegmentAttention) -> Tensor:
        """Return the attention output [B, A, T, E], stored in memory as [B, T, A, E]."""
        rows, heads, tokens, width = q_BATE.shape
        output_BATE = q_BATE.new_zeros(rows, tokens, heads, width).transpose(1, 2)
        log_sums = []
        for shape, segments in attention.groups:
            output_IAQE, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _queries(q_BATE, segments),
                _keys(k_BGTE, segments, heads),
                _keys(v_BGTE, segments, heads),
                attn_mask=attention.mask(shape, q_BATE.dtype),
            )
            for segment, output_AQE in zip(segments, output_IAQE, strict=True):
                _part(output_BATE, segment.row, segment.start, segment.num_queries).copy_(output_AQE)
            log_sums.append(log_sum)
        ctx.save_for_backward(q_BATE, k_BGTE, v_BGTE, output_BATE, *log_sums)
        ctx.attention = attention
        return output_BATE

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients of queries, keys and values."""
        q_BATE, k_BGTE, v_BGTE, output_BATE, *log_sums = ctx.saved_tensors
        attention: SegmentAttention = ctx.attention
        heads, groups = q_BATE.shape[1], k_BGTE.shape[1]
        grad_q_BATE, grad_k_BGTE, grad_v_BGTE = (torch.zeros_like(x) for x in (q_BATE, k_BGTE, v_BGTE))
        for (shape, segments), log_sum in zip(attention.groups, log_sums, strict=True):
            grad_q, *grad_kv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _queries(gradients[0], segments),
                _queries(q_BATE, segments),
                _keys(k_BGTE, segments, heads),
                _keys(v_BGTE, segments, heads),
                _queries(output_BATE, segments),
                log_sum,
                0.0,
                False,
                attn_mask=attention.mask(shape, q_BATE.dtype),
            )
            for segment, own_AQE in zip(segments, grad_q, strict=True):
                _part(grad_q_BATE, segment.row, segment.start, segment.num_queries).copy_(own_AQE)
            for whole_BGTE, grad_IAKE in zip((grad_k_BGTE, grad_v_BGTE), grad_kv, strict=True):
                for segment, own_GKE in zip(segments, grad_IAKE.unflatten(1, (groups, -1)).sum(2), strict=True):
                    prefix_GKE, itself_GQE = own_GKE.split([segment.num_prefix_keys, segment.num_queries], dim=1)
                    _part(whole_BGTE, segment.row, segment.prefix_start, segment.num_prefix_keys).add_(prefix_GKE)
                    _part(whole_BGTE, segment.row, segment.start, segment.num_queries).add_(itself_GQE)
        return grad_q_BATE, grad_k_BGTE, grad_v_BGTE, None


def _part(x_BATE: Tensor, row: int, start: int, length: int) -> Tensor:
    return x_BATE[row, :, start : start + length]


def _stack(parts: Sequence[Tensor]) -> Tensor:
    return parts[0][None] if len(parts) == 1 else torch.stack(list(parts))


def _queries(x_BATE: Tensor, segments: Sequence[AttentionSegment]) -> Tensor:
    """Return the tokens of segments of one shape [I, A, Q, E]."""
    return _stack([_part(x_BATE, segment.row, segment.start, segment.num_queries) for segment in segments])


def _keys(x_BGTE: Tensor, segments: Sequence[AttentionSegment], heads: int) -> Tensor:
    """Return the keys or values that segments of one shape see [I, A, K, E], repeated for every head.

    Repeated here because the kernel's backward pass over shared keys took 2.7 times as long on two cores.
    """
    seen_IGKE = _stack([_seen(x_BGTE, segment) for segment in segments])
    count, groups, keys, width = seen_IGKE.shape
    return seen_IGKE[:, :, None].expand(count, groups, heads // groups, keys, width).flatten(1, 2)


def _seen(x_BGTE: Tensor, segment: AttentionSegment) -> Tensor:
    """Return the keys or values [G, K, E] that a segment sees."""
    own = _part(x_BGTE, segment.row, segment.start, segment.num_queries)
    if not segment.num_prefix_keys:
        return own
    if segment.prefix_start + segment.num_prefix_keys == segment.start:
        return _part(x_BGTE, segment.row, segment.prefix_start, segment.num_prefix_keys + segment.num_queries)
    return torch.cat((_part(x_BGTE, segment.row, segment.prefix_start, segment.num_prefix_keys), own), dim=1)


class VarlenAttention:
    """Torch's variable-length flash kernels, called once for all images and once for all texts over their keys.

    CUDA and half precision only. Padding gets zeros. Expects the tokens of all rows as one row, ordered as images,
    texts, padding, so that a kernel reads a contiguous slice. `reorder` does this once per forward pass instead of in
    every layer.
    """

    def __init__(self, spans: Sequence[SampleSpan], *, shape: tuple[int, int], device: torch.device) -> None:
        segments = attention_segments(spans)
        images = [segment for segment in segments if segment.is_image]
        texts = [segment for segment in segments if not segment.is_image]

        def token_indices(segment: AttentionSegment, start: int, length: int) -> NDArray[np.int64]:
            """Return indices of tokens of a segment's row, counted over all rows."""
            return np.arange(start, start + length) + segment.row * shape[1]

        def query_indices(segment: AttentionSegment) -> NDArray[np.int64]:
            return token_indices(segment, segment.start, segment.num_queries)

        tokens_N = np.arange(shape[0] * shape[1])
        image_Q, text_Q = (_concatenate(query_indices(segment) for segment in kind) for kind in (images, texts))
        order_N = np.concatenate((image_Q, text_Q, np.setdiff1d(tokens_N, np.concatenate((image_Q, text_Q)))))
        inverse_N = np.empty_like(order_N)
        inverse_N[order_N] = tokens_N
        keys_K = inverse_N[
            _concatenate(
                x
                for segment in texts
                for x in (token_indices(segment, segment.prefix_start, segment.num_prefix_keys), query_indices(segment))
            )
        ]
        self.sizes = (len(image_Q), len(text_Q), len(tokens_N) - len(image_Q) - len(text_Q))
        self.shape = shape
        tables = (to_device(torch.from_numpy(table), device) for table in (order_N, inverse_N, keys_K))
        self.order_N, self.inverse_N, self.keys_K = tables
        self.images = _Lengths.of(images, device)
        self.texts = _Lengths.of(texts, device)

    def reorder(self, x_BTZ: Tensor) -> Tensor:
        """Return per-token values in the order of this backend [1, N, ...]."""
        return x_BTZ.flatten(0, 1).index_select(0, self.order_N)[None]

    def restore_order(self, x_1NZ: Tensor) -> Tensor:
        """Undo `reorder`: [B, T, ...]."""
        return x_1NZ.squeeze(0).index_select(0, self.inverse_N).unflatten(0, self.shape)

    def __call__(self, layer: int, q_BATE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor) -> Tensor:
        """Return the attention output of reordered tokens [1, A, N, E]."""
        q_NAE, k_NGE, v_NGE = (x_BATE.squeeze(0).transpose(0, 1) for x_BATE in (q_BATE, k_BGTE, v_BGTE))
        image_queries, text_queries, padding_NAE = q_NAE.split(self.sizes)
        outputs = []
        if self.images is not None:
            keys, values = (x_NGE[: self.sizes[0]] for x_NGE in (k_NGE, v_NGE))
            outputs.append(flash_varlen(image_queries, keys, values, self.images, is_causal=False))
        if self.texts is not None:
            keys, values = (x_NGE.index_select(0, self.keys_K) for x_NGE in (k_NGE, v_NGE))
            outputs.append(flash_varlen(text_queries, keys, values, self.texts, is_causal=True))
        if len(padding_NAE) or not outputs:
            outputs.append(torch.zeros_like(padding_NAE))
        return torch.cat(outputs).transpose(0, 1)[None]


def _concatenate(parts: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.arange(0), *parts])


@dataclass(frozen=True, kw_only=True)
class _Lengths:
    """Cumulative lengths of the segments of one kind, for a variable-length kernel."""

    query_ends: Tensor
    key_ends: Tensor
    max_queries: int
    max_keys: int

    @classmethod
    def of(cls, segments: Sequence[AttentionSegment], device: torch.device) -> "_Lengths | None":
        """Return the lengths of the segments, or None without segments."""
        if not segments:
            return None
        queries, keys = (
            [segment.num_queries for segment in segments],
            [segment.num_prefix_keys + segment.num_queries for segment in segments],
        )
        ends = torch.tensor([[0, *accumulate(queries)], [0, *accumulate(keys)]], dtype=torch.int32)
        query_ends, key_ends = to_device(ends, device)
        return cls(query_ends=query_ends, key_ends=key_ends, max_queries=max(queries), max_keys=max(keys))


def flash_varlen(q_NAE: Tensor, k_NGE: Tensor, v_NGE: Tensor, lengths: _Lengths, *, is_causal: bool) -> Tensor:
    """Return variable-length attention. `is_causal` aligns the mask to the bottom right."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    # torch 2.10 has an argument `is_causal`, later versions a window.
    options: dict[str, Any] = (
        {"is_causal": is_causal} if "is_causal" in known else {"window_size": (-1, 0 if is_causal else -1)}
    )
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    else:
        repeats = q_NAE.shape[1] // k_NGE.shape[1]
        k_NGE, v_NGE = k_NGE.repeat_interleave(repeats, dim=1), v_NGE.repeat_interleave(repeats, dim=1)
    output = varlen_attn(
        q_NAE, k_NGE, v_NGE, lengths.query_ends, lengths.key_ends, lengths.max_queries, lengths.max_keys, **options
    )
    assert isinstance(output, Tensor)
    return output


class FlexAttention:
    """FlexAttention with the rule of `attention_mask` as its mask function. One block mask per row."""

    def __init__(self, sample_index_BT: Tensor, branch_ids_BT: Tensor, in_image_BT: Tensor) -> None:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def may_see(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same_sample = sample_index_BT[row, query] == sample_index_BT[row, key]
            key_branch = branch_ids_BT[row, key]
            visible = (key_branch == 0) | (key_branch == branch_ids_BT[row, query])
            both_image = in_image_BT[row, query] & in_image_BT[row, key]
            return same_sample & visible & ((query >= key) | both_image)

        num_rows, num_tokens = sample_index_BT.shape
        device = sample_index_BT.device
        on_gpu = device.type == "cuda"
        self.block_mask = create_block_mask(
            may_see, num_rows, None, num_tokens, num_tokens, device=str(device), _compile=on_gpu
        )
        # Without compilation torch computes every score and warns. On a CPU this serves comparisons only.
        self.kernel: Any = torch.compile(flex_attention, dynamic=True) if on_gpu else flex_attention

    def __call__(self, layer: int, q_BATE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor) -> Tensor:
        """Return the attention output."""
        output = self.kernel(q_BATE, k_BGTE, v_BGTE, block_mask=self.block_mask, enable_gqa=True)
        assert isinstance(output, Tensor)
        return output


def resolve_attention(choice: str, device: torch.device, dtype: torch.dtype) -> str:
    """Resolve `auto` for long rows on this device. Other choices are returned unchanged (see `fastest_on_cpu`)."""
    if choice != "auto":
        return choice
    if device.type == "cpu":
        return "segments"
    if device.type != "cuda":
        return "dense"
    return "varlen" if dtype in (torch.bfloat16, torch.float16) else "flex"


def attention_backend(
    choice: str,
    sample_index_BT: Tensor,
    branch_ids_BT: Tensor,
    in_image_BT: Tensor,
    spans: Sequence[SampleSpan] | None,
    *,
    dtype: torch.dtype,
) -> AttentionBackend:
    """Return the attention backend of one packed batch. `dtype` is the dtype of queries and keys.

    Raises: DataError for flex on a CPU with gradients; ValueError for samples that are not an image followed by text,
    which only `dense` and `flex` support.
    """
    device = sample_index_BT.device
    is_auto, choice = choice == "auto", resolve_attention(choice, device, dtype)
    shape = (sample_index_BT.shape[0], sample_index_BT.shape[1])
    if choice in ("segments", "turns", "varlen") and spans is None:
        spans = sample_spans(sample_index_BT, branch_ids_BT, in_image_BT)
    if is_auto and choice == "segments" and spans is not None:
        choice = fastest_on_cpu(spans, shape)
    if choice == "dense":
        mask_B1TT = attention_mask(sample_index_BT, branch_ids_BT, in_image_BT)
        # The fused CPU kernel would convert a boolean mask to numbers in every layer.
        numbers = torch.zeros(mask_B1TT.shape, dtype=dtype, device=device).masked_fill_(~mask_B1TT, -torch.inf)
        return MaskedAttention(mask_B1TS=numbers)
    if choice == "flex":
        if device.type == "cpu" and torch.is_grad_enabled():
            raise DataError("kernels.attention is flex, which torch trains on a GPU only; use segments or auto")
        return FlexAttention(sample_index_BT, branch_ids_BT, in_image_BT)
    assert spans is not None
    if choice == "varlen":
        return VarlenAttention(spans, shape=shape, device=device)
    if device.type != "cpu":
        raise DataError(f"kernels.attention is {choice}, which is for CPUs, and the model is on {device}; use auto")
    if choice == "turns":
        return TurnAttention(spans, shape=shape, dtype=dtype)
    return SegmentAttention(spans, dtype=dtype)
