"""Greedy answers about one image: the image is encoded once, any number of texts share its cache.

Place in the flow: `evaluation/predict.py` and the parity tool call `encode_image`, then `generate`. A [SEG] state is
taken after the token was consumed, also when [SEG] is the last token that was generated.

Example: 12 questions about one 64-patch image run as one batch of 12 rows over one cached prefix of 66 tokens; the
answer "It is [SEG].<end>" costs 6 further single-token passes and gives one state per row.

Axis letters: R texts, T tokens of the longest question, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pixel_sail.model.decoder import KeyValue
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation


@dataclass(frozen=True, kw_only=True)
class ImagePrefix:
    """An encoded image: what later tokens attend to, and where their positions start."""

    key_values: list[KeyValue]
    """Per layer keys and values [1, G, T, E], or [R, G, T, E] after `stack_prefixes`."""
    hidden_1TD: Tensor
    grid_hw: tuple[int, int]
    next_position: int

    def patch_states(self) -> Tensor:
        """Return the states [h, w, D] of the patches, which stand between the two delimiters."""
        rows, columns = self.grid_hw
        return self.hidden_1TD[0, 1 : 1 + rows * columns].view(rows, columns, -1)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One generated answer."""

    token_ids: list[int]
    """Generated tokens, with the ending token if it was reached."""
    seg_states_ND: Tensor
    """States of every [SEG] of question, forced answer and generated answer, in order."""


@dataclass(kw_only=True)
class _Row:
    """What is known of one text while it grows."""

    position: int
    tokens: list[int] = field(default_factory=list)
    seg_states: list[Tensor] = field(default_factory=list)
    finished: bool = False


@torch.no_grad()
def encode_image(
    model: PixelSailForSegmentation,
    patches_PK: Tensor,
    grid_hw: tuple[int, int],
    position_ids_2T: Tensor,
    prompt_ids_T: Tensor,
) -> ImagePrefix:
    """Encode the image span `<vision> patches </vision>`; positions and prompts cover all of its tokens."""
    config, device = model.config, patches_PK.device
    ids = [config.token_id("<vision>"), *[config.token_id("<vpatch>")] * len(patches_PK), config.token_id("</vision>")]
    hidden, key_values = model.encode_prefix(
        torch.tensor([ids], device=device), position_ids_2T[:, None], patches_PK, prompt_ids_T[None]
    )
    next_position = int(position_ids_2T.max()) + 1
    return ImagePrefix(key_values=key_values, hidden_1TD=hidden, grid_hw=grid_hw, next_position=next_position)


def stack_prefixes(prefixes: Sequence[ImagePrefix]) -> ImagePrefix:
    """Return one prefix per text as a batch, for `generate`: the same image with different visual prompts.

    Its `patch_states` are those of the first; take them from the single prefixes. Raises: ValueError if grids differ.
    """
    first = prefixes[0]
    if any(prefix.grid_hw != first.grid_hw for prefix in prefixes):
        raise ValueError(f"stack_prefixes: grids {[p.grid_hw for p in prefixes]} differ, expected those of one image")
    layers = zip(*(prefix.key_values for prefix in prefixes), strict=True)
    return ImagePrefix(
        key_values=[(torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer])) for layer in layers],
        hidden_1TD=first.hidden_1TD,
        grid_hw=first.grid_hw,
        next_position=first.next_position,
    )


@torch.no_grad()
def generate(
    model: PixelSailForSegmentation,
    prefix: ImagePrefix | None,
    texts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
) -> list[Answer]:
    """Continue every text greedily after the shared prefix (None: no image) until an end token or the length limit.

    A stacked prefix holds one for each text instead.
    Raises: ValueError for an empty text.
    """
    if not texts:
        return []
    if any(len(text) == 0 for text in texts):
        raise ValueError(f"generate: text {[len(t) for t in texts].index(0)} of {len(texts)} is empty")
    rows = [_Row(position=prefix.next_position if prefix else 0) for _ in texts]
    cache = _Cache(model, prefix, num_texts=len(texts))
    tokens_RT, valid_RT = _right_pad(texts, model.device)
    hidden_RTD = cache.extend(tokens_RT, valid_RT, rows)
    last = valid_RT.sum(1) - 1
    state_RD = hidden_RTD[torch.arange(len(rows), device=model.device), last]
    for step in range(max_new_tokens):
        next_R = model.lm_head(state_RD).argmax(-1)
        for row, token in zip(rows, next_R.tolist(), strict=True):
            if not row.finished:
                row.tokens.append(token)
                row.finished = token in end_ids
        if all(row.finished for row in rows):
            break
        if step + 1 == max_new_tokens and not _ends_with_seg(model, rows):
            break
        active = torch.tensor([[not row.finished] for row in rows], device=model.device)
        state_RD = cache.extend(next_R[:, None], active, rows)[:, 0]
    width = model.config.hidden_size
    return [
        Answer(
            token_ids=row.tokens,
            seg_states_ND=torch.stack(row.seg_states) if row.seg_states else state_RD.new_zeros(0, width),
        )
        for row in rows
    ]


def _ends_with_seg(model: PixelSailForSegmentation, rows: Sequence[_Row]) -> bool:
    """Return whether a row stops at the length limit with a [SEG] whose state is still to be computed."""
    return any(not row.finished and row.tokens[-1] == model.config.token_id("[SEG]") for row in rows)


class _Cache:
    """Keys and values of the shared prefix and of every text, and the reference way to extend them."""

    def __init__(self, model: PixelSailForSegmentation, prefix: ImagePrefix | None, *, num_texts: int) -> None:
        self.model = model
        self.past: list[KeyValue] | None = None
        length = 0
        if prefix is not None:
            self.past = [
                (k.expand(num_texts, -1, -1, -1), v.expand(num_texts, -1, -1, -1)) for k, v in prefix.key_values
            ]
            length = prefix.hidden_1TD.shape[1]
        self.valid_RS = torch.ones(num_texts, length, dtype=torch.bool, device=model.device)

    def extend(self, tokens_RT: Tensor, valid_RT: Tensor, rows: Sequence[_Row]) -> Tensor:
        """Consume tokens (only the valid ones count), note [SEG] states and positions, return the states [R, T, D]."""
        num_tokens = tokens_RT.shape[1]
        starts = torch.tensor([row.position for row in rows], device=tokens_RT.device)
        positions_RT = starts[:, None] + torch.arange(num_tokens, device=tokens_RT.device)
        past_length = self.valid_RS.shape[1]
        self.valid_RS = torch.cat((self.valid_RS, valid_RT), dim=1)
        slots = torch.arange(self.valid_RS.shape[1], device=tokens_RT.device)
        queries = past_length + torch.arange(num_tokens, device=tokens_RT.device)
        # A token always sees itself, so that the row of a padded or finished text is never empty.
        causal_TS = slots[None] <= queries[:, None]
        itself_TS = slots[None] == queries[:, None]
        mask_RTS = (causal_TS & self.valid_RS[:, None]) | itself_TS
        hidden_RTD, self.past = self.model.decoder(
            self.model.embed_tokens(tokens_RT), positions_RT.expand(2, -1, -1), mask_RTS[:, None], self.past
        )
        is_seg_RT = (tokens_RT == self.model.config.token_id("[SEG]")) & valid_RT
        for index, row in enumerate(rows):
            row.position += int(valid_RT[index].sum())
            row.seg_states.extend(hidden_RTD[index][is_seg_RT[index]].unbind(0))
        return hidden_RTD


def _right_pad(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tokens [R, T] padded with 0 and which of them are real."""
    longest = max(len(text) for text in texts)
    tokens = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=device)
    lengths = torch.tensor([len(text) for text in texts], device=device)
    return tokens, torch.arange(longest, device=device)[None] < lengths[:, None]
