"""How an image and its visual prompts become token embeddings.

Place in the flow: this is the seam between pictures and the decoder. `modeling_pixel_sail` looks up the token
embeddings, this module adds what a patch shows and which prompt covers it; a base model with another image tokeniser
replaces this file's module and nothing of the decoder.

Example: 64 patches of 3 x 16 x 16 values standing at tokens 1 .. 64 of a sequence; patches 9, 10, 17 and 18 carry
prompt 3:

    patch_index = [-1, 0, 1, ..., 63, -1, ...]     prompt_ids = [-1, ..., 3, 3, -1, ...]
"""

import torch
from torch import Tensor, nn

from pixel_sail.model.configuration_pixel_sail import Architecture
from pixel_sail.model.patches import normalize_patches


class PatchEmbedding(nn.Module):
    """Raw patches through one linear layer, prompt tokens through another, both added onto the <vpatch> embeddings."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.patch_projection = nn.Linear(3 * config.patch_size**2, config.hidden_size, bias=False)
        self.prompt_projection = (
            nn.Linear(config.hidden_size, config.hidden_size, bias=False) if config.num_visual_prompts else None
        )

    def forward(
        self,
        embeddings_BTD: Tensor,
        patches_SK: Tensor,
        patch_index_BT: Tensor,
        prompt_table_RD: Tensor,
        prompt_ids_BT: Tensor,
    ) -> Tensor:
        """Return the embeddings with the image and prompt terms added where an index is not -1.

        Patches are bytes, or float32 values that are normalised already.
        `prompt_table_RD` holds the token embeddings of <Prompt0> .. <Prompt{R-1}>. Both projections run in every call,
        also when nothing uses them, so that every rank of a distributed run owns a gradient for them.
        Source: reference model, input embedding; patches are flattened channel first.
        """
        if patches_SK.dtype == torch.uint8:
            patches_SK = normalize_patches(patches_SK)
        patches_SD = self.patch_projection(patches_SK.to(embeddings_BTD.dtype))
        embeddings_BTD = embeddings_BTD + rows_or_zero(patches_SD, patch_index_BT)
        if self.prompt_projection is not None:
            prompts_RD = self.prompt_projection(prompt_table_RD)
            embeddings_BTD = embeddings_BTD + rows_or_zero(prompts_RD, prompt_ids_BT)
        return embeddings_BTD


def rows_or_zero(rows_RD: Tensor, index_BT: Tensor) -> Tensor:
    """Return rows_RD[index_BT] as [B, T, D], with a row of zeros where the index is -1."""
    padded = torch.cat((rows_RD, rows_RD.new_zeros(1, rows_RD.shape[1])))
    return padded[index_BT]
