"""Greedy generation: every image is encoded once, and all texts about it share its keys and values.

`evaluation/predict.py` and the parity tool call `encode_images`, then `generate`. All images of a batch have the same
patch grid. The state of a [SEG] is read after the token was consumed, even if [SEG] is the last generated token.

Example: 4 images of 64 patches with 12 questions each run as one batch of 48 texts over 4 cached prefixes of 66
tokens, without copies of a prefix. The answer `It is [SEG].<end>` costs 6 further single-token passes and gives one
state per text.

Axis letters: I images, Q maximum texts per image, R = I x Q rows, S prefix tokens, T tokens of this call,
C text tokens so far, P patches, D width, A attention heads, G key-value heads, H = A / G, E head width.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from pixel_sail.model.decoder import attend, through_compile
from pixel_sail.model.image_embedding import PooledPrompts
from pixel_sail.model.image_layout import image_span, patch_places
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation
from pixel_sail.model.tokenization import IMAGE_TOKENS
from pixel_sail.model.transfer import to_device
from pixel_sail.types import DataError


class NotFiniteError(DataError):
    """The model's states or logits for one text are NaN or infinite."""

    def __init__(self, message: str, *, request: int, question: int) -> None:
        super().__init__(message)
        self.request = request
        """Index of the image in the request."""
        self.question = question
        """Index of the text among those of the image."""


KeyValue = tuple[Tensor, Tensor]
"""Rotated keys and values of one layer, both [I, G, S, E]."""


@dataclass(frozen=True, kw_only=True)
class ImagePrefixes:
    """Encoded images of one grid: the cached keys and values, and the position at which texts start."""

    key_values: list[KeyValue]
    """By layer."""
    hidden_ISD: Tensor
    grid_hw: tuple[int, int]
    next_position: int
    places_P: Tensor
    """Token index of every patch in the prefix."""
    pooled: PooledPrompts | None = None
    """Embeddings that replace the prompt tokens of the texts, by image, if visual prompts are pooled."""

    def patch_states(self, image: int) -> Tensor:
        """Return the states [h, w, D] of the patches of one image."""
        return self.hidden_ISD[image].index_select(0, self.places_P).unflatten(0, self.grid_hw)


@dataclass(frozen=True, kw_only=True)
class GenerationOutput:
    """The generated answer to one text."""

    token_ids: list[int]
    """Generated tokens, including the end token if it was reached."""
    seg_states_ND: Tensor
    """State of every [SEG] in question, forced answer and generated answer, in order."""


@dataclass(kw_only=True)
class _Row:
    """One text during generation. Rows without a text pad the batch and are finished from the start."""

    position: int
    tokens: list[int] = field(default_factory=list)
    seg_states: list[Tensor] = field(default_factory=list)
    finished: bool = False


@torch.no_grad()
def encode_images(
    model: PixelSailForSegmentation,
    patches_IPK: Tensor,
    grid_hw: tuple[int, int],
    position_ids_2S: Tensor,
    prompt_ids_IS: Tensor,
    lead_ids: Sequence[int] = (),
) -> ImagePrefixes:
    """Encode image spans preceded by the text `lead_ids`. Positions and prompts cover all of these tokens."""
    config, device, num_images = model.config, patches_IPK.device, len(patches_IPK)
    span = image_span(config.base, grid_hw, [config.token_id(token) for token in IMAGE_TOKENS], lead_ids)
    backend = _PrefixAttention(len(span.token_ids_S), is_causal=config.attention == "causal", device=device)
    hidden, pooled = model.encode_prefix(
        span.token_ids_S.to(device).expand(num_images, -1),
        position_ids_2S[:, None].expand(-1, num_images, -1),
        patches_IPK,
        prompt_ids_IS,
        backend,
        [grid_hw] * num_images,
    )
    return ImagePrefixes(
        key_values=backend.key_values,
        hidden_ISD=hidden,
        grid_hw=grid_hw,
        next_position=int(position_ids_2S.max()) + 1,
        places_P=patch_places(config.base, grid_hw, len(lead_ids)).to(device),
        pooled=pooled,
    )


class _PrefixAttention:
    """Attention within image spans, bidirectional or causal. Keeps keys and values."""

    def __init__(self, length: int, *, is_causal: bool, device: torch.device) -> None:
        self.key_values: list[KeyValue] = []
        everything_SS = torch.ones(length, length, dtype=torch.bool, device=device) if is_causal else None
        self.mask_SS = None if everything_SS is None else everything_SS.tril()

    def __call__(self, layer: int, q_BATE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor) -> Tensor:
        """Return the attention output."""
        self.key_values.append((k_BGTE, v_BGTE))
        return attend(q_BATE, k_BGTE, v_BGTE, self.mask_SS)


def generate(
    model: PixelSailForSegmentation,
    prefixes: ImagePrefixes | None,
    texts: Sequence[Sequence[Sequence[int]]],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    compiled: bool = False,
) -> list[list[GenerationOutput]]:
    """Continue texts greedily until an end token or the length limit, each after the prefix of its image.

    texts: tokens of every text, grouped by image in the order of the prefixes; without prefixes (text only) any
    grouping. compiled: run single-token steps through torch.compile, which needs a warm-up, and a C++ compiler on a
    CPU. Raises: ValueError for an empty text; NotFiniteError.
    """
    steps = generate_steps(model, prefixes, texts, max_new_tokens=max_new_tokens, end_ids=end_ids, compiled=compiled)
    while True:
        try:
            next(steps)
        except StopIteration as finished:
            outputs: list[list[GenerationOutput]] = finished.value
            return outputs


@torch.no_grad()
def generate_steps(
    model: PixelSailForSegmentation,
    prefixes: ImagePrefixes | None,
    texts: Sequence[Sequence[Sequence[int]]],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    compiled: bool = False,
) -> Generator[list[list[int]], None, list[list[GenerationOutput]]]:
    """Like `generate`, and yield after every step the tokens of all rows so far, padding rows included. The lists are
    mutated by later steps.

    The outputs are the generator's return value. Raises: ValueError for an empty text; NotFiniteError with the first
    text whose states are not finite.
    """
    num_columns = max((len(group) for group in texts), default=0)
    if num_columns == 0:
        return [[] for _ in texts]
    for number, group in enumerate(texts):
        for index, text in enumerate(group):
            if len(text) == 0:
                raise ValueError(f"generate: text {index} of group {number} is empty, expected at least one token")
    padded = [text for group in texts for text in [*group, *[()] * (num_columns - len(group))]]
    start = prefixes.next_position if prefixes else 0
    rows = [_Row(position=start, finished=len(text) == 0) for text in padded]
    capacity = max(map(len, padded)) + max_new_tokens
    cache = _TextCache(model, prefixes, rows, num_images=len(texts), capacity=capacity, compiled=compiled)
    hidden_RTD = cache.extend(padded)
    last = to_device(torch.tensor([max(len(text), 1) - 1 for text in padded]), model.device)
    state_RD = hidden_RTD[torch.arange(len(rows), device=model.device), last]
    for step in range(max_new_tokens):
        logits_RV = model.lm_head(state_RD)
        best_R1 = logits_RV.argmax(-1, keepdim=True)
        # argmax treats NaN as the largest value, so checking the maximum is enough. One transfer for both.
        is_finite_R1 = logits_RV.gather(-1, best_R1).isfinite()
        chosen = torch.cat((best_R1, is_finite_R1.long()), dim=1).tolist()
        next_R = [token for token, _ in chosen]
        for index, (row, (token, is_finite)) in enumerate(zip(rows, chosen, strict=True)):
            if not row.finished and not is_finite:
                raise NotFiniteError(
                    f"the logits of token {len(row.tokens)} of the answer are not finite",
                    request=index // num_columns,
                    question=index % num_columns,
                )
            if not row.finished:
                row.tokens.append(token)
                row.finished = token in end_ids
        yield [row.tokens for row in rows]
        if all(row.finished for row in rows):
            break
        if step + 1 == max_new_tokens and not _ends_with_seg(model, rows):
            break
        consumed = [() if row.finished else (token,) for row, token in zip(rows, next_R, strict=True)]
        state_RD = cache.extend(consumed)[:, 0]
    none = state_RD.new_zeros(0, model.config.hidden_size)
    outputs = (
        GenerationOutput(token_ids=row.tokens, seg_states_ND=torch.stack(row.seg_states) if row.seg_states else none)
        for row in rows
    )
    return list(_regroup(outputs, [len(group) for group in texts], num_columns))


def _regroup(
    outputs: Iterator[GenerationOutput], counts: Sequence[int], num_columns: int
) -> Iterator[list[GenerationOutput]]:
    """Yield the outputs of each image without padding rows."""
    for number in counts:
        yield [next(outputs) for _ in range(num_columns)][:number]


def _ends_with_seg(model: PixelSailForSegmentation, rows: Sequence[_Row]) -> bool:
    """Return whether a row ends at the length limit with a [SEG] whose state is not computed yet."""
    return any(not row.finished and row.tokens[-1] == model.config.token_id("[SEG]") for row in rows)


class _TextCache:
    """Keys and values of all texts."""

    def __init__(
        self,
        model: PixelSailForSegmentation,
        prefixes: ImagePrefixes | None,
        rows: Sequence[_Row],
        *,
        num_images: int,
        capacity: int,
        compiled: bool,
    ) -> None:
        self.model = model
        self.pooled = None if prefixes is None else prefixes.pooled
        self.rows = rows
        self.num_images = num_images
        self.num_slots = 0
        self.compiled = compiled
        config, layers = model.config, model.decoder.layers
        shape = (len(rows), config.num_key_value_heads, capacity, config.head_dim)
        # Zeros, because a compiled step multiplies unwritten slots by a weight of 0.
        self.keys = [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in layers]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        none = self.keys[0].new_zeros(num_images, shape[1], 0, shape[3])
        self.images = [(none, none) for _ in layers] if prefixes is None else prefixes.key_values
        self.valid_RC = torch.zeros(len(rows), capacity, dtype=torch.bool, device=model.device)

    def extend(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Consume the next tokens of every row (none: the row waits), record [SEG] states, return the states [R, T, D].

        Shorter texts are padded on the right; the states of padding are undefined.
        """
        device, seg_id = self.model.device, self.model.config.token_id("[SEG]")
        length = max(map(len, texts))
        table = [
            [len(text), row.position, *text, *[0] * (length - len(text))]
            for row, text in zip(self.rows, texts, strict=True)
        ]
        counts_R1, starts_R1, tokens_RT = to_device(torch.tensor(table), device).split((1, 1, length), dim=1)
        steps_T = torch.arange(length, device=device)
        first, self.num_slots = self.num_slots, self.num_slots + length
        self.valid_RC[:, first : self.num_slots] = steps_T < counts_R1
        is_compiled = self.compiled and length == 1
        # A compiled step attends to the whole cache, because every further size would be compiled again.
        seen = self.valid_RC.shape[1] if is_compiled else self.num_slots
        slots_C, new_T = torch.arange(seen, device=device), first + steps_T
        # A token always attends to itself, so that no row of the mask is empty for padded or waiting texts.
        causal_TC, itself_TC = slots_C <= new_T[:, None], slots_C == new_T[:, None]
        backend = _CachedTextAttention(
            keys=self.keys,
            values=self.values,
            images=self.images,
            num_images=self.num_images,
            new_T=new_T,
            mask_RTC=(causal_TC & self.valid_RC[:, None, :seen]) | itself_TC,
        )
        embeddings_RTD = self.model.embed_tokens(tokens_RT)
        if self.pooled is not None:
            image_R = torch.arange(len(self.rows), device=device) // (len(self.rows) // self.num_images)
            image_RT = image_R[:, None].expand_as(tokens_RT)
            embeddings_RTD = self.pooled.put_into(embeddings_RTD, image_RT, self.model.named_prompts(tokens_RT))
        decoder = self.model.decoder
        decode = partial(through_compile(type(decoder).forward), decoder) if is_compiled else decoder
        hidden_RTD = decode(embeddings_RTD, (starts_R1 + steps_T).expand(2, -1, -1), backend)
        for index, (row, text) in enumerate(zip(self.rows, texts, strict=True)):
            row.position += len(text)
            row.seg_states += [hidden_RTD[index, place] for place, token in enumerate(text) if token == seg_id]
        return hidden_RTD


@dataclass(frozen=True, kw_only=True)
class _CachedTextAttention:
    """Attention of new tokens to their image and to earlier tokens of their text. Appends them to the cache.

    The scores over the prefix come from one product per image, so that no prefix is copied for its texts. They are
    concatenated with the scores over the row's own text under one softmax.
    """

    keys: list[Tensor]
    """By layer [R, G, C, E], as are values. Updated in place."""
    values: list[Tensor]
    images: list[KeyValue]
    """Keys and values of the prefixes, by layer."""
    num_images: int
    new_T: Tensor
    """Cache slots of the new tokens."""
    mask_RTC: Tensor
    """Which cache slots of its row each new token attends to."""

    def __call__(self, layer: int, q_BATE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor) -> Tensor:
        """Return the attention output. Scores and softmax are in float32, as in a fused kernel."""
        length, width, num_groups = q_BATE.shape[2], q_BATE.shape[3], k_BGTE.shape[1]
        num_slots = self.mask_RTC.shape[2]
        self.keys[layer].index_copy_(2, self.new_T, k_BGTE)
        self.values[layer].index_copy_(2, self.new_T, v_BGTE)
        own_keys_RGCE = self.keys[layer][:, :, :num_slots].float()
        own_values_RGCE = self.values[layer][:, :, :num_slots].float()
        image_keys_IGSE, image_values_IGSE = self.images[layer]
        # The H heads that share keys and values are folded into the query axis.
        q_RGHTE = q_BATE.unflatten(1, (num_groups, -1)).float() * width**-0.5
        own_RGHTC = (q_RGHTE.flatten(2, 3) @ own_keys_RGCE.mT).unflatten(2, (-1, length))
        own_RGHTC = own_RGHTC.masked_fill(~self.mask_RTC[:, None, None], -torch.inf)
        seen_RGHTS = self.by_row(self.by_image(q_RGHTE) @ image_keys_IGSE.float().mT, q_RGHTE)
        weights = torch.cat((seen_RGHTS, own_RGHTC), dim=-1).softmax(-1)
        seen_RGHTS, own_RGHTC = weights.split((seen_RGHTS.shape[-1], num_slots), dim=-1)
        from_image_RGHTE = self.by_row(self.by_image(seen_RGHTS) @ image_values_IGSE.float(), q_RGHTE)
        from_text_RGHTE = (own_RGHTC.flatten(2, 3) @ own_values_RGCE).view_as(q_RGHTE)
        return (from_image_RGHTE + from_text_RGHTE).flatten(1, 2).to(q_BATE.dtype)

    def by_image(self, x_RGHTZ: Tensor) -> Tensor:
        """Return all query rows of each image as one axis: [I, G, Q x H x T, Z]."""
        return x_RGHTZ.unflatten(0, (self.num_images, -1)).transpose(1, 2).flatten(2, 4)

    def by_row(self, x_IGXZ: Tensor, like_RGHTE: Tensor) -> Tensor:
        """Undo `by_image`, to the shape of another tensor except for the last axis."""
        num_rows, _, num_heads, length, _ = like_RGHTE.shape
        layout = (num_rows // self.num_images, num_heads, length)
        return x_IGXZ.unflatten(2, layout).transpose(1, 2).flatten(0, 1)
