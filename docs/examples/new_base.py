"""A custom base: initialize a Pixel-SAIL model from a Qwen2-type language model.

Hugging Face language model -> `start_from` -> exported folder -> `model.init_from=FOLDER`. Parts that the language
model lacks (patch embedding, mask head) are initialized randomly. The hidden states of text do not change.
"""

from pathlib import Path

import torch
from tiny import make_data, work_folder
from transformers import Qwen2Config, Qwen2ForCausalLM

from pixel_sail.config import ModelConfig, TrainConfig, load_config
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation
from pixel_sail.training.build import build_model


def start_from(language: Qwen2ForCausalLM, config: ModelConfig, folder: Path) -> PixelSailForSegmentation:
    """Write an exported folder whose decoder and token embedding are those of `language`; return the model.

    Rows of tokens that the language model lacks keep their random initialization.
    """
    model, processor = build_model(config, seed=0, teachers={})
    state = model.state_dict()
    for name, tensor in language.model.state_dict().items():
        ours = "embed_tokens.weight" if name == "embed_tokens.weight" else f"decoder.{name}"
        rows = len(tensor)
        assert state[ours][:rows].shape == tensor.shape, f"{ours}: {tuple(state[ours].shape)}, {tuple(tensor.shape)}"
        state[ours][:rows] = tensor
    model.load_state_dict(state)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def main(folder: Path) -> tuple[PixelSailForSegmentation, Qwen2ForCausalLM]:
    """Convert a small random language model, load it through `model.init_from`, and return both models."""
    make_data(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_theta": 10000.0, "rope_type": "default"}
    language = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=400, **sizes, **heads, rope_parameters=rope, tie_word_embeddings=True)
    ).eval()
    overrides = [f"model.architecture.{key}={value}" for key, value in {**sizes, **heads}.items()]
    overrides += ["model.architecture.rope_theta=10000.0", "model.architecture.mask_dim=16", "name=example"]
    config = load_config("train", TrainConfig, overrides).model
    start = folder / "base"
    model = start_from(language, config, start)

    # A training run does the same with model.init_from=FOLDER on the command line.
    config.init_from = str(start)
    again, _ = build_model(config, seed=1, teachers={})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    print(f"{start}: {sum(p.numel() for p in model.parameters()):,} parameters, use it as model.init_from")
    return model.eval(), language


if __name__ == "__main__":
    main(work_folder())
