"""Embedding of image patches and visual prompts.

`modeling_pixel_sail` looks up the token embeddings and this module adds projected patches and prompts. A base model
with another image tokenizer replaces `PatchEmbedding` and nothing in the decoder.

Example: 64 patches of 3 x 16 x 16 values at tokens 1 .. 64 of a sequence; prompt 3 covers patches 9, 10, 17 and 18:

    patch_index = [-1, 0, 1, ..., 63, -1, ...]     prompt_ids = [-1, ..., 3, 3, -1, ...]
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pixel_sail.model.configuration_pixel_sail import Architecture
from pixel_sail.model.patches import normalize_patches


class PatchEmbedding(nn.Module):
    """Linear projections of raw patches and of prompt tokens, both added to the `<vpatch>` embeddings.

    Without `prompt_projection` prompt tokens are added unprojected. Unless `visual_prompts` is injection, they are not
    added at all.
    """

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.patch_projection = nn.Linear(3 * config.patch_size**2, config.hidden_size, bias=False)
        self.prompt_projection = (
            nn.Linear(config.hidden_size, config.hidden_size, bias=False) if config.projects_prompts else None
        )
        self.injects = config.num_visual_prompts > 0 and config.visual_prompts == "injection"

    def forward(
        self,
        embeddings_BTD: Tensor,
        patches_SK: Tensor,
        patch_index_BT: Tensor,
        prompt_table_RD: Tensor,
        prompt_ids_BT: Tensor,
    ) -> Tensor:
        """Return the embeddings with the image and prompt terms added where an index is not -1.

        Patches are bytes or already normalized float32 values. `prompt_table_RD` holds the token embeddings of
        `<Prompt0>` .. `<Prompt{R-1}>`. Both projections run in every call, even if unused, so that every rank of a
        distributed run has a gradient for them.
        Source: reference model, input embedding; patches are flattened channel first.
        """
        if patches_SK.dtype == torch.uint8:
            patches_SK = normalize_patches(patches_SK)
        patches_SD = self.patch_projection(patches_SK.to(embeddings_BTD.dtype))
        embeddings_BTD = embeddings_BTD + rows_or_zero(patches_SD, patch_index_BT)
        if self.injects:
            prompts_RD = prompt_table_RD if self.prompt_projection is None else self.prompt_projection(prompt_table_RD)
            embeddings_BTD = embeddings_BTD + rows_or_zero(prompts_RD, prompt_ids_BT)
        return embeddings_BTD


@dataclass(frozen=True, kw_only=True)
class PooledPrompts:
    """Mean embedding of the patches that each visual prompt covers, for every sample or image (owner)."""

    means_ORD: Tensor
    is_known_OR: Tensor
    """Whether the prompt covers any patch of its owner."""

    @classmethod
    def of(cls, embeddings_BTD: Tensor, owner_BT: Tensor, prompt_ids_BT: Tensor, size_OR: tuple[int, int]) -> Self:
        """Return the means for `size_OR` owners and prompts; `prompt_ids_BT` is -1 where no prompt covers a token."""
        num_owners, num_prompts = size_OR
        # Tokens without a prompt are summed into one extra row, which is dropped.
        row_N = torch.where(prompt_ids_BT >= 0, owner_BT * num_prompts + prompt_ids_BT, num_owners * num_prompts)
        row_N = row_N.flatten()
        # In float32: a region may cover hundreds of patches.
        values_ND = embeddings_BTD.flatten(0, 1).float()
        sums = values_ND.new_zeros(num_owners * num_prompts + 1, values_ND.shape[1]).index_add(0, row_N, values_ND)[:-1]
        # bincount would read the maximum and so synchronize with the device.
        counts = row_N.new_zeros(len(sums) + 1).index_add(0, row_N, torch.ones_like(row_N))[:-1]
        means = (sums / counts.clamp(min=1)[:, None]).to(embeddings_BTD.dtype)
        return cls(means_ORD=means.unflatten(0, size_OR), is_known_OR=(counts > 0).view(size_OR))

    def put_into(self, embeddings_BTD: Tensor, owner_BT: Tensor, named_BT: Tensor) -> Tensor:
        """Replace the embeddings of tokens that name a known prompt (`named_BT`, -1: none) by its mean."""
        owner_BT, named = owner_BT.clamp(min=0), named_BT.clamp(min=0)
        is_put_BT = (named_BT >= 0) & self.is_known_OR[owner_BT, named]
        return torch.where(is_put_BT[..., None], self.means_ORD[owner_BT, named], embeddings_BTD)


def rows_or_zero(rows_RD: Tensor, index_BT: Tensor) -> Tensor:
    """Return rows_RD[index_BT] as [B, T, D], with a row of zeros where the index is -1."""
    zero = len(rows_RD)
    padded = torch.cat((rows_RD, rows_RD.new_zeros(1, rows_RD.shape[1])))
    # As an embedding: on a CPU, the backward pass of plain indexing accumulates one token after another.
    return F.embedding(torch.where(index_BT >= 0, index_BT, zero), padded, padding_idx=zero)
