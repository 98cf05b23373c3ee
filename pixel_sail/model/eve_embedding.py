"""Image embedding of the EVE base: two convolutions, a class token, and a token after every row.

Replaces `image_embedding.PatchEmbedding` if the architecture's base is eve. A patch is 2 x 2 pieces of 16 x 16 pixels.
Convolutions do not cross patch borders, so sequences hold patches as in the sail base:

    patch [3, 32, 32] -> 2 x 2 pieces of 1024 channels -> GELU -> one embedding of the decoder's width

Image tokens replace the embedding of their id. A visual prompt's embedding is added to the patches it covers.

Axis letters: B rows, T tokens, S patches, K values of a patch, D width, R visual prompts.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pixel_sail.model.configuration_pixel_sail import PixelSailConfig
from pixel_sail.model.image_embedding import rows_or_zero
from pixel_sail.model.patches import CLIP_MEAN, CLIP_STD, normalize_patches


class EveEmbedding(nn.Module):
    """Two convolutions with kernel equal to stride, and the embeddings of class token and row ends."""

    def __init__(self, config: PixelSailConfig) -> None:
        super().__init__()
        piece = config.patch_size // 2
        self.piece_projection = nn.Conv2d(3, config.patch_hidden_size, kernel_size=piece, stride=piece)
        self.patch_projection = nn.Conv2d(config.patch_hidden_size, config.hidden_size, kernel_size=2, stride=2)
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.row_end_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.config = config

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize the weights. The first convolution keeps the variance, the rest is initialized as embeddings."""
        nn.init.normal_(self.piece_projection.weight, std=self.piece_projection.weight[0].numel() ** -0.5)
        for layer in (self.piece_projection, self.patch_projection):
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        for embedding in (self.patch_projection.weight, self.class_embedding, self.row_end_embedding):
            nn.init.normal_(embedding, std=self.config.initializer_range)

    def forward(
        self,
        embeddings_BTD: Tensor,
        patches_SK: Tensor,
        patch_index_BT: Tensor,
        prompt_table_RD: Tensor,
        prompt_ids_BT: Tensor,
        input_ids_BT: Tensor,
    ) -> Tensor:
        """Return the embeddings with image tokens replaced, and prompts added where an index is not -1.

        Patches are bytes or already normalized float32 values. All parameters are used in every call, even without
        patches and prompts, so that every rank of a distributed run has a gradient for them.
        """
        if patches_SK.dtype == torch.uint8:
            patches_SK = normalize_patches(patches_SK, mean=CLIP_MEAN, std=CLIP_STD)
        pixels_S3YX = patches_SK.to(embeddings_BTD.dtype).unflatten(
            1, (3, self.config.patch_size, self.config.patch_size)
        )
        patches_SD = self.patch_projection(F.gelu(self.piece_projection(pixels_S3YX))).flatten(1)
        num_patches = len(patches_SD)
        rows = torch.cat((patches_SD, torch.stack((self.class_embedding, self.row_end_embedding)).to(patches_SD.dtype)))
        index_BT = patch_index_BT
        for place, token in ((num_patches, "<vision>"), (num_patches + 1, "</vision>")):
            index_BT = index_BT.masked_fill(input_ids_BT == self.config.token_id(token), place)
        image_BTD = rows_or_zero(rows, index_BT)
        embeddings_BTD = torch.where((index_BT >= 0)[..., None], image_BTD, embeddings_BTD)
        if self.config.num_visual_prompts:
            embeddings_BTD = embeddings_BTD + rows_or_zero(prompt_table_RD, prompt_ids_BT)
        return embeddings_BTD
