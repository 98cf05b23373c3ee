"""Selects the weights that Muon updates with `optim.optimizer=muon`; AdamW updates all others.

`optim.py` calls `is_orthogonal` for every trained parameter, by name and shape. For example

    decoder.layers.0.self_attn.q_proj.weight [64, 64]      yes
    decoder.layers.0.input_layernorm.weight [64]           no, one axis: norms, biases and single embeddings never
    mask_head.upsampler.blocks.0.depthwise.weight [64, 1, 3, 3]   no, not a matrix

Orthogonal updates suit weights that multiply vectors as one matrix in every step. This includes convolutions whose
weight, flattened to first axis against all others, maps one cell: a transposed convolution with kernel = stride maps C
channels to 4 x C ([C, 4 x C]), a convolution with kernel = stride a patch to one embedding, a 1x1 one C channels to C.
"""

import re
from dataclasses import dataclass

from torch import Size


@dataclass(frozen=True, kw_only=True)
class Role:
    """Optimizer of the parameters with more than one axis whose full name matches a pattern."""

    pattern: str
    orthogonal: bool
    why: str


PARAMETER_ROLES = (
    Role(
        pattern=r".*\.lora_[AB]",
        orthogonal=False,
        why="what is trained is the product of the two; each by itself may be of any scale, and B starts at zero",
    ),
    Role(
        pattern=r"decoder\.layers\.\d+\.(image\.)?(self_attn|mlp)\.\w+_proj\.weight",
        orthogonal=True,
        why="products of hidden states: queries, keys, values, outputs and the feed-forward part",
    ),
    Role(
        pattern=r"patch_embedding\.(patch|piece)_projection\.weight",
        orthogonal=True,
        why="a patch's values to an embedding; every image uses all of it, unlike a table of tokens",
    ),
    Role(
        pattern=r"patch_embedding\.prompt_projection\.weight",
        orthogonal=False,
        why="no gradient in steps without a marked region: a fading momentum would be scaled up to a full update",
    ),
    Role(
        pattern=r"(embed_tokens|lm_head)\.weight",
        orthogonal=False,
        why="rows are tokens, most of which a step does not see; the output layer is where AdamW is known to be better",
    ),
    Role(
        pattern=r"mask_head\.(pre_projector|pixel_projector|seg_projector)\.\d+\.weight",
        orthogonal=True,
        why="linear layers of hidden states; their last product is a dot product of two learned sides, not classes",
    ),
    Role(
        pattern=r"mask_head\.upsampler\..*\.(transposed|mixed|shuffled|pointwise)\.weight",
        orthogonal=True,
        why="all channels of a cell (or its neighbourhood) to all channels",
    ),
    Role(
        pattern=r"mask_head\.upsampler\..*\.depthwise\.weight",
        orthogonal=False,
        why="nine numbers per channel, no channel meets another: a filter, not a matrix",
    ),
    Role(
        pattern=r"distill_head\..*\.weight",
        orthogonal=False,
        why="output layers towards teachers, which are thrown away after training",
    ),
)


def is_orthogonal(name: str, shape: Size) -> bool:
    """Return whether a parameter gets orthogonal updates. Raises: KeyError for a matrix that no role names."""
    if len(shape) < 2:
        return False
    for role in PARAMETER_ROLES:
        if re.fullmatch(role.pattern, name):
            return role.orthogonal
    raise KeyError(f"{name} {tuple(shape)}: no role in training/roles.py matches it; add one, it decides its optimizer")
