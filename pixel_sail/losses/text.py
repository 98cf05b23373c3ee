"""Text loss: cross-entropy of the next token at supervised positions.

Place in the flow: `losses/total.py` calls it with the logits the model computed at `Batch.logit_positions_M2`. For the
answer "It is [SEG]." with its ending token there are five such positions, the first being the last token of the
question.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def text_sum(logits_MV: Tensor, targets_M: Tensor, weights_M: Tensor) -> Tensor:
    """Return the weighted sum of the cross-entropies in float32; 0 (with a gradient of 0) where M is 0."""
    losses_M = F.cross_entropy(logits_MV.float(), targets_M, reduction="none")
    return (losses_M * weights_M.to(torch.float32)).sum()
