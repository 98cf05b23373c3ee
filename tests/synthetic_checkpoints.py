"""Random checkpoints of other layouts with their tokenizers, for the tests of conversion."""

import json
import re

import torch
from safetensors.torch import save_file
from test_parity import _released_name
from tokenizers import AddedToken
from transformers import Qwen2Config, Qwen2ForCausalLM

from pixel_sail.conversion.convert import expected_shapes, to_ours
from pixel_sail.conversion.sizes import Chosen
from pixel_sail.model.tokenization import train_tokenizer

DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
CHOSEN = Chosen(patch_size=8, mask_stride=4, mask_dim=16, num_visual_prompts=2)
BASE_TOKENS = 280


def make_base_tokenizer():
    """A base model's tokenizer, without the tokens of phrases, masks and prompts."""
    full = train_tokenizer([], vocab_size=270, num_visual_prompts=0)
    model = json.loads(full.backend_tokenizer.to_str())
    late = ("[SEG]", "<p>", "</p>")
    model["added_tokens"] = [token for token in model["added_tokens"] if token["content"] not in late]
    kept = [token for token in sorted(model["model"]["vocab"], key=model["model"]["vocab"].get) if token not in late]
    model["model"]["vocab"] = {token: index for index, token in enumerate(kept)}
    for token in model["added_tokens"]:
        token["id"] = model["model"]["vocab"][token["content"]]
    tokenizer = type(full)(tokenizer_object=type(full.backend_tokenizer).from_str(json.dumps(model)))
    tokenizer.add_tokens([f"word{i}" for i in range(BASE_TOKENS - len(tokenizer))])
    return tokenizer


def text_model(kind, config_kind, **changes):
    torch.manual_seed(1)
    model = kind(config_kind(**(DECODER | {"vocab_size": BASE_TOKENS + 8} | changes))).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def save_base(folder, model, tokenizer, **arguments):
    model.save_pretrained(folder, **arguments)
    tokenizer.save_pretrained(folder)
    return folder


def write_qwen(folder, tokenizer):
    """Write a random Qwen2 checkpoint of several shards."""
    return save_base(folder, text_model(Qwen2ForCausalLM, Qwen2Config), tokenizer, max_shard_size="20KB")


def text_logits(model, ids):
    count = torch.arange(ids.shape[1]).expand_as(ids)
    none = torch.full_like(ids, -1)
    with torch.no_grad():
        return model(
            ids,
            torch.stack([count, count]),
            torch.zeros_like(ids),
            torch.zeros_like(ids),
            torch.zeros_like(ids, dtype=torch.bool),
            none,
            none,
            torch.zeros(0, 3 * model.config.patch_size**2),
        ).logits


def convert(source, layout, folder, **changes):
    arguments = {"base": source, "chosen": CHOSEN} | changes
    return to_ours(source, layout, folder, **arguments)


EVE_KEYS = (
    (r"decoder\.layers\.(\d+)\.image\.self_attn\.(.+)", r"model.layers.\1.self_attn.moe_\2"),
    (r"decoder\.layers\.(\d+)\.image\.(.+)", r"model.layers.\1.moe_\2"),
    (r"decoder\.(.+)", r"model.\1"),
    (r"embed_tokens\.(.+)", r"model.embed_tokens.\1"),
    (r"patch_embedding\.piece_projection\.(.+)", r"model.vision_tower.patch_embedding.0.\1"),
    (r"patch_embedding\.patch_projection\.(.+)", r"model.vision_tower.patch_embedding.2.\1"),
    (r"patch_embedding\.class_embedding", "model.vision_tower.class_embedding"),
    (r"patch_embedding\.row_end_embedding", "model.vision_tower.split_embedding"),
)
"""Our name -> name in the published base; the release has the prefix `single_transformer.` before these."""


def eve_key(name):
    return next((re.sub(own, key, name) for own, key in EVE_KEYS if re.fullmatch(own, name)), name)


def write_eve(folder, tokenizer, config):
    """Write a random EVEv2 base of the sizes of a configuration; return its weights under our names."""
    base = text_model(Qwen2ForCausalLM, Qwen2Config, vocab_size=config.vocab_size)
    base.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generator = torch.Generator().manual_seed(3)
    shapes = {name: shape for name, shape in expected_shapes(config).items() if not name.startswith("mask_head")}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file({eve_key(name): tensor for name, tensor in weights.items()}, folder / "model.safetensors")
    return weights


def release_checkpoint(folder, base_tokenizer, make_config, order, **changes):
    """Write a random checkpoint in the release's layout with its base folder; return its state."""
    tokenizer = base_tokenizer.from_pretrained(save_tokenizer(base_tokenizer, folder / "base"))
    missing = [token for token in order if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens([AddedToken(token, special=True) for token in missing], special_tokens=True)
    config = make_config(vocab_size=len(tokenizer), mask_stride=2, token_ids={}, **changes)
    model = text_model(Qwen2ForCausalLM, Qwen2Config, tie_word_embeddings=config.tie_word_embeddings)
    model.config.save_pretrained(folder / "base")
    shapes = expected_shapes(config)
    generator = torch.Generator().manual_seed(3)
    state = {_released_name(n): torch.randn(shape, generator=generator).bfloat16() for n, shape in shapes.items()}
    if config.tie_word_embeddings:
        state["single_transformer.lm_head.weight"] = state["single_transformer.model.embed_tokens.weight"].clone()
    return state, tokenizer


def save_tokenizer(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return folder


def other_tokenizer(folder):
    tokenizer = train_tokenizer([], vocab_size=320, num_visual_prompts=15)
    tokenizer.add_tokens([f"other{i}" for i in range(20)])
    tokenizer.save_pretrained(folder)
