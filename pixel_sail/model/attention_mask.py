"""The attention mask of a packed sequence.

Three per-token arrays of a batch become one dense boolean mask. This is the reference for the attention backends. One
sample with an image of two patches and two independent questions of two tokens each:

    token          <vision> patch patch </vision>  q0 q0  q1 q1
    in_image          1      1     1      1         0  0   0  0
    branch_ids        0      0     0      0         1  1   2  2     (all 1 when the questions form one conversation)
"""

import torch
from torch import Tensor


def attention_mask(sample_index_BT: Tensor, branch_ids_BT: Tensor, in_image_BT: Tensor) -> Tensor:
    """Return the mask [B, 1, T, T], true where the query (third axis) may see the key (fourth).

    Attention is block-diagonal over samples. Image tokens, including their two delimiters, attend to each other in both
    directions. Every other token attends causally to branch 0 (the shared image) and to its own branch. Padding has
    sample -1 and attends to earlier padding, so no row is empty.
    Source: bytedance/Sa2VA 9832e1a, sa2va_eval/projects/ST (`create_single_prefix_mask`), extended to packed sequences.
    """
    num_tokens = sample_index_BT.shape[1]
    position = torch.arange(num_tokens, device=sample_index_BT.device)
    causal_TT = position[:, None] >= position[None, :]
    same_sample_BTT = sample_index_BT[:, :, None] == sample_index_BT[:, None, :]
    both_image_BTT = in_image_BT[:, :, None] & in_image_BT[:, None, :]
    key_branch_BTT = branch_ids_BT[:, None, :]
    visible_branch_BTT = (key_branch_BTT == 0) | (key_branch_BTT == branch_ids_BT[:, :, None])
    allowed_BTT = same_sample_BTT & visible_branch_BTT & (causal_TT | both_image_BTT)
    return allowed_BTT[:, None]
