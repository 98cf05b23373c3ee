"""The architecture of a Pixel-SAIL model.

Hydra's `model` group fills `Architecture`. `PixelSailConfig` writes the same fields to the `config.json` of a
checkpoint. The 0.5B model:

    Architecture(vocab_size=151680, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                 num_attention_heads=14, num_key_value_heads=2, patch_size=16, mask_stride=4, mask_dim=512)
"""

from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from pixel_sail.types import DataError

BASES = ("sail", "eve")
ATTENTION = ("prefix", "causal")
EXPERT_PARTS = ("self_attn", "layernorm", "mlp")
UPSAMPLERS = ("transposed", "bilinear", "pixel_shuffle")
VISUAL_PROMPTS = ("injection", "pooled", "off")
POSITIVE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "patch_size", "mask_dim"),
)
"""Sizes that must be at least 1."""

MAX_FEATURE_SIZE = 1024
"""Maximum channel count of the upsampler. Wider decoders are projected down first (release: `min(hidden, 1024)`)."""


@dataclass(kw_only=True)
class Architecture:
    """Everything that determines the shapes of the parameters and what the forward pass computes."""

    base: str = "sail"
    """How images are embedded. sail: raw patches through one linear layer, two delimiters, 2-D positions; images are
    never enlarged. eve (as EVEv2): patches through two convolutions, a class token first and a token after every row,
    1-D positions; images are scaled to one area and placed in a chat template."""
    attention: str = "prefix"
    """prefix: image tokens attend to each other in both directions. causal: every token attends to earlier tokens."""
    modality_experts: list[str] = field(default_factory=list)
    """Parts of a layer with separate weights for image tokens: self_attn, layernorm, mlp. eve only."""
    patch_hidden_size: int = 1024
    """Channels between the two convolutions of an eve patch."""
    vocab_size: int = 512
    """Rows of the token embedding."""
    hidden_size: int = 128
    intermediate_size: int = 352
    """Width of the SwiGLU."""
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    attention_bias: bool = True
    """Whether the query, key and value projections have a bias: true for Qwen2, false for Mistral (SOLO)."""
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    """Standard deviation of the normal initialization of the decoder and of the embeddings."""
    patch_size: int = 16
    """Side of a square patch, pixels."""
    max_long_side: int = 1024
    """Maximum long side of a resized image, pixels. For eve: images are scaled to the area of a square of this side."""
    mask_stride: int = 4
    """Output stride of the masks, pixels: 2 in the released code, 4 in the paper. `patch_size`: no upsampler."""
    upsampler: str = "transposed"
    """How an upsampling block doubles the resolution: transposed convolution (paper), bilinear interpolation after a
    1x1 convolution, or pixel shuffle after a 3x3 convolution."""
    mask_dim: int = 256
    """Width of the dot product between a [SEG] state and a pixel feature."""
    num_visual_prompts: int = 15
    """Number of `<Prompt{i}>` tokens; 0 disables visual prompts."""
    visual_prompts: str = "injection"
    """injection: a prompt's token embedding is added to the patches it covers (paper). pooled: the mean embedding of
    these patches replaces the prompt's token in the text (the paper's plain baseline). off: neither."""
    prompt_projection: bool = True
    """Whether a linear layer projects the injected embedding first (release: vp_embed)."""
    token_ids: dict[str, int] = field(default_factory=dict)
    """Ids of the special tokens the model uses: `<vision>`, `<vpatch>`, `</vision>`, [SEG], `<Prompt0>` .., end."""

    def validate(self) -> None:
        """Raise DataError if sizes do not fit together."""
        self._validate_types()
        self._validate_base()
        if self.hidden_size % self.num_attention_heads:
            raise DataError(
                f"model: hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; change one of them"
            )
        if self.head_dim % 4:
            raise DataError(
                f"model: head_dim is {self.head_dim}; rotary rows and columns take a quarter of it each, so it must be "
                "a multiple of 4"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise DataError(
                f"model: num_attention_heads {self.num_attention_heads} must be a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.max_long_side < self.patch_size:
            raise DataError(
                f"model: max_long_side is {self.max_long_side}, expected at least one patch ({self.patch_size} pixels)"
            )
        if not 1 <= self.mask_stride <= self.patch_size:
            raise DataError(
                f"model: mask_stride is {self.mask_stride}, expected 1 .. patch_size ({self.patch_size}); "
                "patch_size itself switches the upsampler off"
            )
        choices = {"upsampler": UPSAMPLERS, "visual_prompts": VISUAL_PROMPTS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise DataError(f"model: {name} is {getattr(self, name)!r}, expected one of {allowed}")

    def _validate_types(self) -> None:
        """Raise DataError for a value whose type differs from its default's, for example in a damaged config.json."""
        kinds: dict[type, tuple[type, ...]] = {float: (int, float), list: (list, tuple)}
        for name, default in vars(Architecture()).items():
            value, kind = getattr(self, name), type(default)
            if not isinstance(value, kinds.get(kind, (kind,))) or isinstance(value, bool) != (kind is bool):
                raise DataError(f"model: {name} is {value!r:.100}, expected a {kind.__name__}")

    def _validate_base(self) -> None:
        """Raise DataError for an unknown base or attention, an unsupported combination, or a size below 1."""
        small = {name: getattr(self, name) for name in POSITIVE if getattr(self, name) < 1}
        if small:
            raise DataError(f"model: {small}, expected sizes of at least 1")
        for name, value, allowed in (("base", self.base, BASES), ("attention", self.attention, ATTENTION)):
            if value not in allowed:
                raise DataError(f"model: {name} is {value!r}, expected one of {allowed}")
        unknown = sorted(set(self.modality_experts) - set(EXPERT_PARTS))
        if unknown or len(set(self.modality_experts)) < len(self.modality_experts):
            raise DataError(
                f"model: modality_experts is {list(self.modality_experts)}, expected some of {EXPERT_PARTS}, each once"
            )
        if self.base == "eve":
            if self.attention != "causal":
                raise DataError("model: base eve has text before its image, which only attention=causal supports")
            if self.patch_size % 2 or self.patch_hidden_size < 1:
                raise DataError(
                    f"model: patch_size is {self.patch_size} and patch_hidden_size {self.patch_hidden_size}; base eve "
                    "expects an even number (each patch is 2 x 2 pieces) and at least 1"
                )
            if self.visual_prompts != "injection":
                raise DataError(f"model: visual_prompts is {self.visual_prompts!r}; base eve supports injection only")
        elif self.modality_experts:
            raise DataError(f"model: modality_experts is {list(self.modality_experts)}, which needs base=eve")

    @property
    def sizing(self) -> str:
        """Return the rule by which images are resized (see `patches.resized_size`)."""
        return "area" if self.base == "eve" else "long_side"

    @property
    def head_dim(self) -> int:
        """Return the width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def feature_size(self) -> int:
        """Return the channel count of the upsampler."""
        return min(self.hidden_size, MAX_FEATURE_SIZE)

    @property
    def projects_prompts(self) -> bool:
        """Return whether there is a linear layer between prompt tokens and patches."""
        injects = self.num_visual_prompts > 0 and self.visual_prompts == "injection"
        return self.base == "sail" and injects and self.prompt_projection

    @property
    def num_upsample_blocks(self) -> int:
        """Return how many doublings of the patch grid give cells of at most `mask_stride` pixels."""
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
        # By name: Hugging Face adds its own `validate` to every configuration class.
        Architecture.validate(self)

    @classmethod
    def from_architecture(cls, architecture: Architecture) -> "PixelSailConfig":
        """Return the configuration with these fields."""
        return cls(**vars(architecture))

    def token_id(self, token: str) -> int:
        """Return the id of a special token. Raises: DataError if the configuration lacks it."""
        if token not in self.token_ids:
            raise DataError(f"config.token_ids has no {token!r}; it holds {sorted(self.token_ids)}")
        return self.token_ids[token]

    @property
    def prompt_token_ids(self) -> list[int]:
        """Return the token ids of `<Prompt0>` .. in order."""
        return [self.token_id(f"<Prompt{i}>") for i in range(self.num_visual_prompts)]


# Lets Hugging Face loaders that read a folder's config.json, such as AutoTokenizer, recognize the model type.
AutoConfig.register(PixelSailConfig.model_type, PixelSailConfig)
