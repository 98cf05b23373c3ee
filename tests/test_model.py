"""Packed samples give the outputs of single ones, nothing leaks, every parameter learns, generation equals the forward
pass."""

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pixel_sail.model import configuration_pixel_sail, generation
from pixel_sail.model.attention_mask import attention_mask
from pixel_sail.model.configuration_pixel_sail import Architecture
from pixel_sail.model.decoder import Decoder, MaskedAttention, rotary_tables
from pixel_sail.model.generation import encode_images, generate
from pixel_sail.model.kernels import CHECKPOINTING, Kernels
from pixel_sail.model.mask_head import MaskHead, mask_logits
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation, load_model
from pixel_sail.model.upsampler import Upsampler
from pixel_sail.types import DataError, Sample, Turn, VisualPrompt

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def mixed_examples(processor, make_sample):
    """Five samples that differ in image size, text length, masks and prompts; the last two lack a mask and an image."""
    rng = np.random.default_rng(3)
    sampled = [
        make_sample(rng, size_hw=(16, 24), masks_per_turn=(1, 2), prompts=(3, 7), sample_id="two turns"),
        make_sample(rng, size_hw=(40, 9), masks_per_turn=(3,), sample_id="tall"),
        make_sample(rng, size_hw=(16, 24), masks_per_turn=(1,), prompts=(0,), sample_id="same grid"),
        make_sample(rng, size_hw=(8, 8), masks_per_turn=(0,), prompts=(14,), sample_id="no mask"),
        make_sample(rng, size_hw=None, masks_per_turn=(0, 0), sample_id="text only"),
    ]
    return [processor.encode_sample(sample, image, independent_turns=False) for sample, image in sampled]


def _tokens_of(output, batch, name):
    """Return the states of one sample's tokens in order."""
    return output.hidden_BTD[batch.sample_index_BT == batch.sample_ids.index(name)]


@pytest.mark.parametrize("rows", [([4, 0, 3, 1, 2],), ([0, 4], [1], [3, 2])], ids=["one row", "three rows"])
def test_packed_samples_equal_each_sample_alone(tiny_model, make_batch, mixed_examples, rows):
    model = tiny_model()
    batch = make_batch(*[[mixed_examples[i] for i in row] for row in rows])
    packed = model(**batch.model_inputs())
    assert batch.input_ids_BT.shape[0] == len(rows)
    for example in mixed_examples:
        single = make_batch([example])
        alone = model(**single.model_inputs())
        sample = batch.sample_ids.index(example.sample_id)
        torch.testing.assert_close(_tokens_of(packed, batch, example.sample_id), alone.hidden_BTD[0], **TOLERANCE)
        own_logits = packed.logits[batch.target_samples_M == sample]
        torch.testing.assert_close(own_logits, alone.logits, **TOLERANCE)
        assert len(own_logits) == len(single.targets_M) > 0
        if example.grid_hw is None:
            assert alone.mask_logits == ()
            continue
        found, expected = packed.mask_logits[batch.image_samples.index(sample)], alone.mask_logits[0]
        torch.testing.assert_close(found, expected, **TOLERANCE)
        assert example.masks == () if expected is None else len(expected) == len(example.masks)


def test_mask_logits_belong_to_the_seg_tokens_in_order(tiny_model, make_batch, mixed_examples):
    model = tiny_model()
    batch = make_batch([mixed_examples[1]])
    output = model(**batch.model_inputs())
    features = model.mask_head.pixel_features(output.hidden_BTD[:, batch.patch_index_BT[0] >= 0].view(1, 5, 2, -1))
    for index, token in enumerate((batch.input_ids_BT[0] == model.config.token_id("[SEG]")).nonzero()[:, 0]):
        query = model.mask_head.seg_queries(output.hidden_BTD[0, token])
        torch.testing.assert_close(output.mask_logits[0][index], features[0] @ query, **TOLERANCE)
    assert output.mask_logits[0].shape == (3, 10, 4)


def test_a_mask_logit_is_the_dot_product_of_query_and_feature():
    queries, features = torch.randn(2, 5), torch.randn(3, 4, 5)
    logits = mask_logits(queries, features)
    for n, y, x in itertools.product(range(2), range(3), range(4)):
        assert logits[n, y, x].item() == pytest.approx(float(queries[n] @ features[y, x]), abs=1e-5)


def _may_see(sample, branch, in_image, query, key):
    """Return the attention mask from its definition: same sample; same or shared branch; earlier, or both in the
    image."""
    if sample[query] != sample[key]:
        return False
    if branch[key] != 0 and branch[key] != branch[query]:
        return False
    return key <= query or bool(in_image[query] and in_image[key])


def test_attention_mask_equals_a_double_loop(make_batch, mixed_examples, processor, make_sample):
    sample, image = make_sample(np.random.default_rng(0), masks_per_turn=(1, 0, 1), sample_id="branches")
    branches = processor.encode_sample(sample, image, independent_turns=True)
    batch = make_batch([mixed_examples[0], branches], [mixed_examples[4], mixed_examples[3]])
    mask = attention_mask(batch.sample_index_BT, batch.branch_ids_BT, batch.in_image_BT)
    num_rows, num_tokens = batch.input_ids_BT.shape
    assert mask.shape == (num_rows, 1, num_tokens, num_tokens)
    assert bool(mask.any(-1).all()), "a query without keys would give NaN"
    for row in range(num_rows):
        rule = [batch.sample_index_BT[row].tolist(), batch.branch_ids_BT[row].tolist(), batch.in_image_BT[row].tolist()]
        expected = [[_may_see(*rule, q, k) for k in range(num_tokens)] for q in range(num_tokens)]
        assert mask[row, 0].tolist() == expected


def _one_turn(sample, index):
    return Sample(
        sample_id=f"turn {index}",
        source=sample.source,
        image_path=None,
        image_hw=sample.image_hw,
        turns=(sample.turns[index],),
        prompts=sample.prompts,
    )


def _text_states(model, batch):
    """Return the states of every text token, per branch."""
    hidden = model(**batch.model_inputs()).hidden_BTD[0]
    branches = batch.branch_ids_BT[0]
    return {int(b): hidden[branches == b] for b in branches.unique() if b > 0}


def test_independent_turns_equal_asking_each_alone(tiny_model, processor, make_sample, make_batch):
    model = tiny_model()
    sample, image = make_sample(np.random.default_rng(1), masks_per_turn=(1, 2, 0), prompts=(1,))
    together = _text_states(model, make_batch([processor.encode_sample(sample, image, independent_turns=True)]))
    assert sorted(together) == [1, 2, 3]
    for index in range(3):
        example = processor.encode_sample(_one_turn(sample, index), image, independent_turns=True)
        alone = _text_states(model, make_batch([example]))
        torch.testing.assert_close(together[index + 1], alone[1], **TOLERANCE)


def test_turns_of_a_conversation_see_earlier_turns(tiny_model, processor, make_sample, make_batch):
    model = tiny_model()
    sample, image = make_sample(np.random.default_rng(1), masks_per_turn=(1, 1))
    states = _text_states(model, make_batch([processor.encode_sample(sample, image, independent_turns=False)]))[1]
    last_alone = _text_states(
        model, make_batch([processor.encode_sample(_one_turn(sample, 1), image, independent_turns=False)])
    )[1]
    first_alone = _text_states(
        model, make_batch([processor.encode_sample(_one_turn(sample, 0), image, independent_turns=False)])
    )[1]
    torch.testing.assert_close(states[: len(first_alone)], first_alone, **TOLERANCE)
    assert (states[-len(last_alone) :] - last_alone).abs().max() > 1e-2


def test_rotary_equals_a_loop_over_pairs_of_channels():
    positions = torch.tensor([[0, 3, 7, 40], [0, 5, 1, 40]])[:, None]
    x = torch.randn(1, 2, 4, 8)
    found = rotary_tables(positions, 8, 100.0, torch.float32)(x)
    for head, token, pair in itertools.product(range(2), range(4), range(4)):
        # The lower half of the pairs turns with the row, the upper half with the column.
        angle = int(positions[0 if pair < 2 else 1, 0, token]) * 100.0 ** (-2 * pair / 8)
        first, second = x[0, head, token, pair].item(), x[0, head, token, pair + 4].item()
        turned = [
            first * math.cos(angle) - second * math.sin(angle),
            second * math.cos(angle) + first * math.sin(angle),
        ]
        assert found[0, head, token, [pair, pair + 4]].tolist() == pytest.approx(turned, abs=1e-5)


def test_only_distances_between_positions_matter(tiny_model, make_batch, mixed_examples):
    model = tiny_model()
    inputs = make_batch(mixed_examples[:2]).model_inputs()
    hidden = model(**inputs).hidden_BTD
    inputs["position_ids_2BT"] = inputs["position_ids_2BT"] + torch.tensor([3, 8])[:, None, None]
    torch.testing.assert_close(model(**inputs).hidden_BTD, hidden, rtol=1e-4, atol=1e-4)


def test_gradient_reaches_a_state_from_exactly_the_tokens_it_may_see(tiny_model, make_batch, mixed_examples):
    model = tiny_model()
    batch = make_batch([mixed_examples[0], mixed_examples[3], mixed_examples[4]])
    visible = attention_mask(batch.sample_index_BT, batch.branch_ids_BT, batch.in_image_BT)[0, 0]
    embeddings = model.embed(batch.input_ids_BT, batch.patches_SK, batch.patch_index_BT, batch.prompt_ids_BT)
    embeddings = embeddings.detach().requires_grad_()
    hidden = model.decoder(embeddings, batch.position_ids_2BT, MaskedAttention(mask_B1TS=visible[None, None]))
    # Not the sum of squares: the norm makes it a constant, whose gradient is rounding noise.
    weights = torch.randn(hidden.shape[-1])
    for token in range(0, hidden.shape[1], 5):
        (gradient,) = torch.autograd.grad(hidden[0, token] @ weights, embeddings, retain_graph=True)
        reached = gradient[0].abs().sum(-1)
        assert reached[visible[token]].min() > 0.01 and not reached[~visible[token]].any()


def test_a_changed_later_token_leaves_earlier_text_and_other_samples_alone(tiny_model, make_batch, mixed_examples):
    model = tiny_model()
    batch = make_batch([mixed_examples[0], mixed_examples[4]])
    inputs = batch.model_inputs()
    before = model(**inputs).hidden_BTD[0]
    changed = len(mixed_examples[0]) - 4
    inputs["input_ids_BT"] = batch.input_ids_BT.clone()
    inputs["input_ids_BT"][0, changed] += 1
    moved = (model(**inputs).hidden_BTD[0] - before).abs().amax(-1)
    expected = [changed <= token < len(mixed_examples[0]) for token in range(len(moved))]
    assert (moved > 0.0).tolist() == (moved > 0.01).tolist() == expected


def test_visual_prompts_change_only_the_embeddings_of_covered_patches(tiny_model, processor, make_sample, make_batch):
    model = tiny_model()
    sample, image = make_sample(np.random.default_rng(2), size_hw=(16, 24))
    mask = np.zeros((16, 24), dtype=bool)
    mask[8:, 8:] = True
    plain = make_batch([processor.encode_sample(sample, image, independent_turns=False)])
    painted = processor.paint_prompts((VisualPrompt(prompt_id=5, mask=mask),), (2, 3), "test")
    marked = torch.nn.functional.pad(painted, (0, plain.input_ids_BT.shape[1] - len(painted)), value=-1)[None]
    embed = (plain.input_ids_BT, plain.patches_SK, plain.patch_index_BT)
    difference = model.embed(*embed, marked) - model.embed(*embed, plain.prompt_ids_BT)
    token = model.embed_tokens.weight[model.config.token_id("<Prompt5>")]
    expected = torch.zeros_like(difference)
    expected[0, [5, 6]] = model.patch_embedding.prompt_projection(token)  # patches (1, 1) and (1, 2) of a 2 x 3 grid
    torch.testing.assert_close(difference, expected, **TOLERANCE)
    assert expected.abs().max() > 1e-2


def test_a_model_without_visual_prompts_has_no_prompt_layer_and_runs(tiny_model, make_batch, mixed_examples):
    model = tiny_model(num_visual_prompts=0).train()
    assert model.patch_embedding.prompt_projection is None
    output = model(**make_batch([mixed_examples[1], mixed_examples[4]]).model_inputs())
    output.zero_loss.backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []
    assert output.mask_logits[0].shape == (3, 10, 4)


@pytest.mark.parametrize(
    ("patch_size", "mask_stride", "blocks"),
    [
        *[(16, 2, 3), (16, 4, 2), (16, 8, 1), (16, 16, 0)],
        *[(32, 2, 4), (32, 4, 3), (32, 8, 2), (32, 32, 0)],
        *[(14, 2, 3), (14, 4, 2), (14, 8, 1), (14, 14, 0)],
    ],
)
def test_the_map_is_doubled_until_a_cell_covers_at_most_the_stride(patch_size, mask_stride, blocks):
    config = Architecture(
        hidden_size=8, num_attention_heads=2, mask_dim=4, patch_size=patch_size, mask_stride=mask_stride
    )
    features = MaskHead(config).pixel_features(torch.randn(2, 2, 3, 8))
    assert features.shape == (2, 2 * 2**blocks, 3 * 2**blocks, 4)
    assert patch_size / 2**blocks <= mask_stride
    assert blocks == 0 or patch_size / 2 ** (blocks - 1) > mask_stride


def test_upsampler_cells_stay_at_their_place():
    upsampler = Upsampler(4, 2)
    quiet = torch.zeros(1, 4, 5, 5)
    loud = quiet.clone()
    loud[0, :, 1, 3] = 1.0
    difference = (upsampler(loud) - upsampler(quiet)).abs().amax((0, 1))
    # The difference at the faintest corner is 2e-4.
    rows, columns = (difference > 1e-5).nonzero().unbind(1)
    # Two 3 x 3 convolutions, the first at half resolution, widen the 4 x 4 cells of a patch by 3 on every side.
    assert (int(rows.min()), int(rows.max())) == (4 - 3, 7 + 3)
    assert (int(columns.min()), int(columns.max())) == (12 - 3, 15 + 3)


def test_upsample_blocks_start_with_weights_of_their_own(tiny_model):
    first, second = tiny_model(mask_stride=2).mask_head.upsampler.blocks
    assert not torch.equal(first.transposed.weight, second.transposed.weight)
    assert not torch.equal(first.depthwise.weight, second.depthwise.weight)
    assert not torch.equal(first.pointwise.weight, second.pointwise.weight)


def test_initialisation_follows_the_table(tiny_model):
    model = tiny_model(initializer_range=0.02, hidden_size=64, tie_word_embeddings=False).requires_grad_(False)
    assert model.decoder.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.patch_embedding.patch_projection.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.decoder.layers[1].self_attn.q_proj.bias.abs().max() == 0
    assert bool((model.decoder.norm.weight == 1).all())
    assert model.mask_head.seg_projector[0].weight.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert model.mask_head.seg_projector[0].bias.abs().max() == 0


def test_wide_decoders_are_projected_down_before_the_upsampler(make_config):
    wide = make_config(hidden_size=1056, num_hidden_layers=1)
    head = MaskHead(wide)
    assert head.pixel_features(torch.randn(1, 1, 2, 1056)).shape == (1, 2, 4, 16)
    assert head.pre_projector[2].weight.shape == (1024, 1056)
    assert MaskHead(make_config()).pre_projector is None


def test_the_pre_projector_takes_part_in_forward_and_zero_loss(monkeypatch, tiny_model, make_batch, mixed_examples):
    monkeypatch.setattr(configuration_pixel_sail, "MAX_FEATURE_SIZE", 24)
    model = tiny_model().train()
    output = model(**make_batch(mixed_examples).model_inputs())
    torch.cat([logits.flatten() for logits in output.mask_logits if logits is not None]).sum().backward()
    assert model.mask_head.pre_projector[0].weight.grad.abs().max() > 0
    assert model.mask_head.upsampler.blocks[0].depthwise.weight.shape[0] == 24


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded_models_give_equal_logits(tiny_model, make_batch, mixed_examples, tmp_path, tied):
    model = tiny_model(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    inputs = make_batch(mixed_examples).model_inputs()
    found, expected = loaded(**inputs), model(**inputs)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.mask_logits[0], expected.mask_logits[0])
    assert (loaded.lm_head.weight is loaded.embed_tokens.weight) == tied
    assert loaded.config.token_ids == model.config.token_ids
    assert not loaded.training


def _without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("mask_head.seg_projector.0.weight", _without),
        ("embed_tokens.weight", _without),
        ("decoder.extra.weight", lambda state, name: state | {name: torch.zeros(2)}),
        ("decoder.norm.weight", lambda state, name: state | {name: torch.ones(33)}),
    ],
    ids=["missing", "missing embedding", "extra", "misshapen"],
)
def test_a_folder_whose_weights_do_not_fit_is_rejected(tiny_model, tmp_path, tied, name, spoil):
    tiny_model(tie_word_embeddings=tied).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(spoil(load_file(file), name), file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        PixelSailForSegmentation.from_pretrained(tmp_path)


def test_a_folder_without_config_is_rejected(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 33}, "hidden_size 33"),
        ({"hidden_size": 24}, "head_dim is 6"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"mask_stride": 9}, "mask_stride is 9"),
        ({"mask_stride": 0}, "mask_stride is 0"),
    ],
)
def test_inconsistent_sizes_are_rejected(make_config, changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stride", [2, 8])
@pytest.mark.parametrize("case", ["text only", "image without masks", "no supervised text", "everything"])
def test_the_zero_loss_gives_every_parameter_a_gradient(tiny_model, make_batch, mixed_examples, case, stride, tied):
    model = tiny_model(mask_stride=stride, tie_word_embeddings=tied).train()
    chosen = {"text only": mixed_examples[4:], "image without masks": mixed_examples[3:4]}.get(case, mixed_examples)
    inputs = make_batch(chosen).model_inputs()
    if case == "no supervised text":
        inputs["logit_positions_M2"] = torch.zeros(0, 2, dtype=torch.long)
    zero_loss = model(**inputs).zero_loss
    zero_loss.backward()
    assert zero_loss.item() == 0.0
    assert [name for name, value in model.named_parameters() if value.grad is None] == []
    assert max(float(value.grad.abs().max()) for value in model.parameters()) == 0.0


def test_gradient_checkpointing_changes_no_gradient(tiny_model, make_batch, mixed_examples):
    inputs = make_batch(mixed_examples).model_inputs()
    gradients = []
    for checkpointing in CHECKPOINTING:
        model = tiny_model().train()
        model.use(Kernels(), checkpointing)
        output = model(**inputs)
        (output.logits.square().mean() + output.mask_logits[0].square().mean()).backward()
        gradients.append([value.grad for value in model.decoder.parameters()])
    for again in gradients[1:]:
        for plain, recomputed in zip(gradients[0], again, strict=True):
            torch.testing.assert_close(recomputed, plain, **TOLERANCE)


IMAGE_HW = (16, 24)
QUESTIONS = ("a", "which of these is the small red star", "left box?")


def _image(seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (*IMAGE_HW, 3), dtype=np.uint8)
    return Image.fromarray(values)


def _prefix(model, processor, image):
    """Return the encoded image, or None for no image."""
    if image is None:
        return None
    example = processor.encode_sample(_asking("x", image), image, independent_turns=False)
    span = example.in_image_T
    return encode_images(
        model,
        example.patches_PK[None],
        example.grid_hw,
        example.position_ids_2T[:, span],
        example.prompt_ids_T[span][None],
    )


def _asking(question, image):
    size_hw = (image.height, image.width) if image else None
    turn = Turn(question=question, answer="")
    return Sample(sample_id=question, source="test", image_path=None, image_hw=size_hw, turns=(turn,))


def _forward_states(model, processor, make_batch, question, image, answer_ids):
    """Return the states of question and answer from one training-style forward pass."""
    example = processor.encode_sample(_asking(question, image), image, independent_turns=False)
    batch = make_batch([example])
    inputs = batch.model_inputs() | {"logit_positions_M2": None, "spans": None}
    kept, added = len(example) - 1, len(answer_ids)  # the empty answer is only the end token
    for name in ("input_ids_BT", "sample_index_BT", "branch_ids_BT", "in_image_BT", "patch_index_BT", "prompt_ids_BT"):
        tail = inputs[name][:, -1:].expand(-1, added)
        inputs[name] = torch.cat((inputs[name][:, :kept], tail), dim=1)
    inputs["input_ids_BT"][0, kept:] = torch.tensor(answer_ids, dtype=torch.long)
    steps = torch.arange(added) + inputs["position_ids_2BT"][0, 0, kept]
    inputs["position_ids_2BT"] = torch.cat((inputs["position_ids_2BT"][..., :kept], steps.expand(2, 1, -1)), dim=-1)
    return model(**inputs).hidden_BTD[0], kept


def _slow_greedy(model, processor, make_batch, question, image, max_new_tokens, end_ids):
    """Decode with one full forward pass per token."""
    tokens = []
    while len(tokens) < max_new_tokens and not (tokens and tokens[-1] in end_ids):
        hidden, _ = _forward_states(model, processor, make_batch, question, image, tokens)
        tokens.append(int(model.lm_head(hidden[-1]).argmax()))
    return tokens


@pytest.mark.parametrize("with_image", [True, False], ids=["image", "text only"])
def test_generation_with_cache_equals_full_forward_passes(tiny_model, processor, make_batch, with_image):
    model = tiny_model(seed=5, tie_word_embeddings=False)
    image = _image() if with_image else None
    prefix = _prefix(model, processor, image)
    texts = [processor.question_ids(question) for question in QUESTIONS]
    (free,) = generate(model, prefix, [texts], max_new_tokens=6, end_ids=())
    assert len({tuple(answer.token_ids) for answer in free}) == len(QUESTIONS), "answers too alike to show a mix-up"
    # One text ends early, at its third token, while the others continue.
    end_ids = (free[1].token_ids[2],)
    (together,) = generate(model, prefix, [texts], max_new_tokens=6, end_ids=end_ids)
    assert len(together[1].token_ids) <= 3
    for question, text, answer in zip(QUESTIONS, texts, together, strict=True):
        assert answer.token_ids == _slow_greedy(model, processor, make_batch, question, image, 6, end_ids)
        ((alone,),) = generate(model, prefix, [[text]], max_new_tokens=6, end_ids=end_ids)
        assert answer.token_ids == alone.token_ids


def test_compiled_single_tokens_are_the_plain_ones_in_few_graphs(tiny_model, processor, make_batch, monkeypatch):
    """With a backend that only captures: code generation is torch's responsibility."""
    model = tiny_model(seed=5, tie_word_embeddings=False)
    captured = torch.compile(Decoder.forward, dynamic=True, backend="aot_eager")
    monkeypatch.setattr(generation, "through_compile", lambda forward: captured)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    texts = [processor.question_ids(question) for question in QUESTIONS]
    prefixes = [_prefix(model, processor, _image()), None]
    for length in (3, 6, 9):
        for prefix in prefixes:
            for some in (texts, texts[:2]):
                plain, compiled = (
                    generate(model, prefix, [some], max_new_tokens=length, end_ids=(), compiled=compiled)[0]
                    for compiled in (False, True)
                )
                assert [own.token_ids for own in compiled] == [own.token_ids for own in plain]
                for own, other in zip(compiled, plain, strict=True):
                    torch.testing.assert_close(own.seg_states_ND, other.seg_states_ND, rtol=1e-4, atol=1e-5)
    # With an image and without, and for all lengths and numbers of texts the same.
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


def _force_seg(monkeypatch, model):
    """Make the text head always predict [SEG], without changing the states."""
    head = torch.nn.functional.one_hot(torch.tensor(model.config.token_id("[SEG]")), model.config.vocab_size).float()
    monkeypatch.setattr(model.lm_head, "forward", lambda states: head.expand(*states.shape[:-1], -1))


@pytest.mark.parametrize("with_image", [True, False], ids=["image", "text only"])
@pytest.mark.parametrize("max_new_tokens", [1, 2])
def test_a_seg_at_the_length_limit_has_the_state_of_the_forward_pass(
    monkeypatch, tiny_model, processor, make_batch, max_new_tokens, with_image
):
    model = tiny_model(seed=5, tie_word_embeddings=False)
    _force_seg(monkeypatch, model)
    image = _image() if with_image else None
    texts = [processor.question_ids(question) for question in QUESTIONS]
    (answers,) = generate(model, _prefix(model, processor, image), [texts], max_new_tokens=max_new_tokens, end_ids=())
    for question, answer in zip(QUESTIONS, answers, strict=True):
        assert answer.token_ids == [model.config.token_id("[SEG]")] * max_new_tokens
        hidden, kept = _forward_states(model, processor, make_batch, question, image, answer.token_ids)
        torch.testing.assert_close(answer.seg_states_ND, hidden[kept:], **TOLERANCE)


def test_a_seg_in_the_question_counts_before_generated_ones(monkeypatch, tiny_model, processor, make_batch):
    model = tiny_model(seed=5)
    _force_seg(monkeypatch, model)
    prefix = _prefix(model, processor, _image())
    seg = model.config.token_id("[SEG]")
    text = [*processor.question_ids("a"), seg]
    ((answer,),) = generate(model, prefix, [[text]], max_new_tokens=1, end_ids=())
    assert answer.seg_states_ND.shape == (2, 32)
    hidden, kept = _forward_states(model, processor, make_batch, "a", _image(), [seg, seg])
    torch.testing.assert_close(answer.seg_states_ND, hidden[kept:], **TOLERANCE)


def test_an_answer_without_seg_has_no_states(tiny_model, processor):
    model = tiny_model(seed=5, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[model.config.token_id("[SEG]")] = 0.0
    (answers,) = generate(model, None, [[processor.question_ids("a")]], max_new_tokens=4, end_ids=())
    assert answers[0].seg_states_ND.shape == (0, 32)
    assert len(answers[0].token_ids) == 4


def test_no_text_gives_no_answer_and_an_empty_text_is_rejected(tiny_model, processor):
    model = tiny_model()
    assert generate(model, None, [], max_new_tokens=4, end_ids=()) == []
    assert generate(model, None, [[], []], max_new_tokens=4, end_ids=()) == [[], []]
    with pytest.raises(ValueError, match="text 1 of group 0"):
        generate(model, None, [[[5], []]], max_new_tokens=4, end_ids=())


def test_patch_states_of_the_prefix_are_those_of_the_forward_pass(tiny_model, processor, make_batch):
    model = tiny_model()
    image = _image()
    prefix = _prefix(model, processor, image)
    batch = make_batch([processor.encode_sample(_asking("a", image), image, independent_turns=False)])
    hidden = model(**batch.model_inputs()).hidden_BTD[0]
    expected = hidden[batch.patch_index_BT[0] >= 0].view(2, 3, -1)
    torch.testing.assert_close(prefix.patch_states(0), expected, **TOLERANCE)
    assert prefix.next_position == 5


@pytest.mark.parametrize(
    ("name", "value"), [("rms_norm_eps", None), ("hidden_size", 32.0), ("token_ids", True), ("attention_bias", 1)]
)
def test_a_value_of_another_type_is_rejected_by_its_name(make_config, name, value):
    with pytest.raises(DataError, match=f"model: {name} is {value}, expected a "):
        make_config(**{name: value})
