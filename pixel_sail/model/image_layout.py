"""Token layout of an image: ids, positions, and which tokens are patches.

The processor and generation use it, for training and inference alike. The two layouts of a 2 x 3 grid; in the second,
text of the template precedes the image:

    sail   <vision> <vpatch>x6 </vision>                                  (row, column) positions
    eve    <|im_start|>user\\n <vision> <vpatch>x3 </vision> <vpatch>x3 </vision>      1-D positions

In the eve layout `<vision>` is the class token and `</vision>` ends every row of patches.

Axis letters: S tokens, P patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pixel_sail.types import SizeHW


@dataclass(frozen=True, kw_only=True)
class ImageSpan:
    """The tokens of one image and of the template text before it."""

    token_ids_S: Tensor
    position_ids_2S: Tensor
    patch_index_S: Tensor
    """Patch index of each token, row by row; -1 for other tokens."""

    @property
    def next_position(self) -> int:
        """Return the position of the first text token after the image."""
        return int(self.position_ids_2S.max()) + 1


def image_span(base: str, grid_hw: SizeHW, image_ids: Sequence[int], lead_ids: Sequence[int] = ()) -> ImageSpan:
    """Return the layout of an image with this patch grid.

    image_ids: ids of `<vision>`, `<vpatch>` and `</vision>`; lead_ids: text before the image, eve only.
    """
    rows, columns = grid_hw
    vision_id, patch_id, end_id = image_ids
    if base == "eve":
        row_ids = [*[patch_id] * columns, end_id]
        ids = torch.tensor([*lead_ids, vision_id, *row_ids * rows])
        positions = torch.arange(len(ids)).expand(2, -1)
    else:
        assert not lead_ids, "the sail layout has no text before its image"
        ids = torch.tensor([vision_id, *[patch_id] * (rows * columns), end_id])
        positions = image_positions(grid_hw)
    places_P = patch_places(base, grid_hw, len(lead_ids))
    patch_index = torch.full_like(ids, -1)
    patch_index[places_P] = torch.arange(len(places_P))
    return ImageSpan(token_ids_S=ids, position_ids_2S=positions, patch_index_S=patch_index)


def patch_places(base: str, grid_hw: SizeHW, num_lead: int = 0) -> Tensor:
    """Return the token index of every patch within its span [P]."""
    rows, columns = grid_hw
    per_row = columns + 1 if base == "eve" else columns
    return 1 + num_lead + (torch.arange(rows)[:, None] * per_row + torch.arange(columns)).flatten()


def image_tokens(base: str, grid_hw: SizeHW) -> int:
    """Return the number of tokens of an image, including delimiters."""
    rows, columns = grid_hw
    return 1 + rows * (columns + 1) if base == "eve" else rows * columns + 2


def image_positions(grid_hw: SizeHW) -> Tensor:
    """Return the (row, column) positions [2, 1 + h * w + 1] of an image span in the sail layout.

    `<vision>` is at 0, patch (r, c) at (1 + r, 1 + c), `</vision>` at 1 + max(h, w). Text continues from there.
    """
    rows, columns = grid_hw
    patch_rows = torch.arange(rows).repeat_interleave(columns) + 1
    patch_columns = torch.arange(columns).repeat(rows) + 1
    first, last = torch.zeros(2, 1, dtype=torch.long), torch.full((2, 1), 1 + max(grid_hw))
    return torch.cat((first, torch.stack((patch_rows, patch_columns)), last), dim=1)
