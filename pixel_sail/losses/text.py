"""Text loss: cross-entropy of the next token at supervised positions.

`losses/total.py` calls it with the logits at `Batch.logit_positions_M2`. The answer "It is [SEG]." with its end token
has five such positions; the first is the last token of the question.
"""

from torch import Tensor
from torch.nn import functional as F


def text_losses(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    """Return the cross-entropy of every supervised position [M] in float32. M may be 0."""
    return F.cross_entropy(logits_MV.float(), targets_M, reduction="none")
