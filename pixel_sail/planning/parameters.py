"""Parameter counts of the parts of a model, computed from its sizes.

`plan.py` derives memory and disk space from them. For the 0.5B model:

    {"token_embedding": 135905280, "image_embedding": 1490944, "decoder": 357898112, "text_head": 0,
     "mask_head": 10579200, "distill_head": 0}
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pixel_sail.config import ModelConfig
from pixel_sail.distillation.settings import TeacherSettings
from pixel_sail.model.configuration_pixel_sail import Architecture
from pixel_sail.model.tokenization import load_tokenizer

QWEN_VOCABULARY = 151_680
"""Rows of the token embedding with Qwen2.5's tokenizer and the added tokens."""

UPSAMPLE_TAPS = {"transposed": 4, "bilinear": 1, "pixel_shuffle": 36}
"""Weights per pair of channels of the 2x upsampling in a block; all are applied once per input cell."""


@dataclass(frozen=True, kw_only=True)
class TrainingParts:
    """Trained parameters of a run."""

    adapters: int
    """Parameters of low-rank adapters."""
    trained: int
    """Parameters that are not frozen, adapters among them."""
    orthogonal: int = 0
    """Trained parameters that Muon updates (training/roles.py)."""


def fill_in_vocabulary(config: ModelConfig) -> str:
    """Set the vocabulary size as training does; return a remark if the tokenizer is missing."""
    architecture, folder = config.architecture, Path(config.tokenizer)
    if not folder.is_dir():
        architecture.vocab_size = QWEN_VOCABULARY
        return f"{folder}: no tokenizer there, the vocabulary is assumed to have {QWEN_VOCABULARY:,} rows"
    tokenizer = load_tokenizer(str(folder), num_visual_prompts=architecture.num_visual_prompts)
    architecture.vocab_size = -(-len(tokenizer) // config.vocab_multiple) * config.vocab_multiple
    return ""


def linear(size_in: int, size_out: int, *, bias: bool = True) -> int:
    """Return the parameters of one linear layer."""
    return size_in * size_out + (size_out if bias else 0)


def layer_parameters(architecture: Architecture) -> int:
    """Return the parameters of one decoder layer, including those for image tokens."""
    width, inner = architecture.hidden_size, architecture.intermediate_size
    key_value = architecture.num_key_value_heads * architecture.head_dim
    bias = architecture.attention_bias
    attention = linear(width, width, bias=bias) + 2 * linear(width, key_value, bias=bias)
    attention += linear(width, width, bias=False)
    parts = {"self_attn": attention, "mlp": 3 * width * inner, "layernorm": 2 * width}
    return sum(parts.values()) + sum(parts[name] for name in architecture.modality_experts)


def image_embedding_parameters(architecture: Architecture) -> int:
    """Return the parameters that embed patches and visual prompts."""
    width, pixels = architecture.hidden_size, 3 * architecture.patch_size**2
    if architecture.base == "eve":
        pieces = architecture.patch_hidden_size
        return linear(pixels // 4, pieces) + linear(4 * pieces, width) + 2 * width
    return pixels * width + (width * width if architecture.projects_prompts else 0)


def mask_head_parameters(architecture: Architecture) -> int:
    """Return the parameters of pre-projection, upsampler and both projections."""
    width, channels, mask_dim = architecture.hidden_size, architecture.feature_size, architecture.mask_dim
    total = linear(width, width) + linear(width, channels) if width > channels else 0
    doubling = UPSAMPLE_TAPS[architecture.upsampler] * channels * channels
    doubling += (4 if architecture.upsampler == "pixel_shuffle" else 1) * channels
    depthwise = 9 * channels + channels
    block = doubling + depthwise + linear(channels, channels) + 2 * channels
    total += architecture.num_upsample_blocks * block
    return (
        total
        + linear(channels, channels)
        + linear(channels, mask_dim)
        + linear(width, channels)
        + linear(channels, mask_dim)
    )


def teacher_width(architecture: Architecture, settings: TeacherSettings) -> int:
    """Return the input channels of a teacher's linear layer."""
    return architecture.mask_dim if settings.site == "pixel_map" else architecture.hidden_size


def parameter_counts(architecture: Architecture, teachers: Mapping[str, TeacherSettings]) -> dict[str, int]:
    """Return the parameters of every part; a tied text head has none.

    The vocabulary size must be set, see `fill_in_vocabulary`.
    """
    width = architecture.hidden_size
    embedding = architecture.vocab_size * width
    return {
        "token_embedding": embedding,
        "image_embedding": image_embedding_parameters(architecture),
        "decoder": architecture.num_hidden_layers * layer_parameters(architecture) + width,
        "text_head": 0 if architecture.tie_word_embeddings else embedding,
        "mask_head": mask_head_parameters(architecture),
        "distill_head": sum(linear(teacher_width(architecture, own), own.channels) for own in teachers.values()),
    }
