"""The architecture of a Pixel-SAIL model, as one dataclass with two users.

Place in the flow: Hydra's `model` group fills `Architecture`, `PixelSailConfig` carries the same fields into the
`config.json` that travels with the weights. The values of a real model, for example of the 0.5B one:

    Architecture(vocab_size=151680, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                 num_attention_heads=14, num_key_value_heads=2, patch_size=16, mask_stride=4, mask_dim=512)
"""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

MAX_FEATURE_SIZE = 1024
"""Widest channel count of the upsampler; wider decoders are projected down first (release: `min(hidden, 1024)`)."""


@dataclass(kw_only=True)
class Architecture:
    """Everything that determines the shapes of the parameters and what the forward pass computes."""

    vocab_size: int = 512
    """Rows of the token embedding."""
    hidden_size: int = 128
    intermediate_size: int = 352
    """Width of the SwiGLU."""
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    """Standard deviation of the normal initialisation of the decoder and of the embeddings."""
    patch_size: int = 16
    """Side of a square patch, pixels."""
    max_long_side: int = 1024
    """Longest side an image is resized to, pixels."""
    mask_stride: int = 4
    """Pixels per mask logit: 2 is the released code, 4 the paper, `patch_size` switches the upsampler off."""
    mask_dim: int = 256
    """Width of the dot product between a [SEG] state and a pixel feature."""
    num_visual_prompts: int = 15
    """How many <Prompt{i}> tokens exist; 0 removes the visual-prompt path."""
    token_ids: dict[str, int] = field(default_factory=dict)
    """Ids of the tokens the model itself looks at: <vision>, <vpatch>, </vision>, [SEG], <Prompt0> .. and the end."""

    def validate(self) -> None:
        """Raise ValueError where sizes do not fit together."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model: hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; change one of them"
            )
        if self.head_dim % 4:
            raise ValueError(
                f"model: head_dim is {self.head_dim}; rotary rows and columns take a quarter of it each, so it must be "
                "a multiple of 4"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model: num_attention_heads {self.num_attention_heads} must be a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.max_long_side < self.patch_size:
            raise ValueError(
                f"model: max_long_side is {self.max_long_side}, expected at least one patch ({self.patch_size} pixels)"
            )
        if not 1 <= self.mask_stride <= self.patch_size:
            raise ValueError(
                f"model: mask_stride is {self.mask_stride}, expected 1 .. patch_size ({self.patch_size}); "
                "patch_size itself switches the upsampler off"
            )

    @property
    def head_dim(self) -> int:
        """Return the width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def feature_size(self) -> int:
        """Return the channel count of the upsampler."""
        return min(self.hidden_size, MAX_FEATURE_SIZE)

    @property
    def num_upsample_blocks(self) -> int:
        """Return how often the patch grid is doubled until one cell covers at most `mask_stride` pixels."""
        blocks = 0
        while self.patch_size / 2**blocks > self.mask_stride:
            blocks += 1
        return blocks


class PixelSailConfig(PreTrainedConfig, Architecture):
    """`Architecture` as a Hugging Face configuration."""

    model_type = "pixel_sail"

    def __post_init__(self, **kwargs: Any) -> None:
        """Finish the Hugging Face part, then check the sizes."""
        super().__post_init__(**kwargs)
        # By name: Hugging Face puts a `validate` of its own on every configuration class.
        Architecture.validate(self)

    @classmethod
    def from_architecture(cls, architecture: Architecture) -> "PixelSailConfig":
        """Return the configuration with these fields."""
        return cls(**vars(architecture))

    def token_id(self, token: str) -> int:
        """Return the id of a token the model needs; ValueError when the configuration lacks it."""
        if token not in self.token_ids:
            raise ValueError(f"config.token_ids has no {token!r}; it holds {sorted(self.token_ids)}")
        return self.token_ids[token]

    @property
    def prompt_token_ids(self) -> list[int]:
        """Return the token ids of <Prompt0> .. in order."""
        return [self.token_id(f"<Prompt{i}>") for i in range(self.num_visual_prompts)]
