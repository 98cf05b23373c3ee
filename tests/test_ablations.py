"""Every ablation file is one change: it composes with its experiment, differs from it only in the keys it
sets, matches the signatures of the functions it names, and builds a model that runs."""

from dataclasses import asdict, replace
from functools import cache

import numpy as np
import pytest
import torch
from counting import counted_operations
from test_configs import bind_targets, names
from test_plan_run import saved_bytes

from pixel_sail.config import TrainConfig, load_config
from pixel_sail.data.loader import StreamAssignment, training_batches
from pixel_sail.data.packing import StreamState
from pixel_sail.losses.total import LossConfig, combine, count, loss_sums
from pixel_sail.model.configuration_pixel_sail import PixelSailConfig
from pixel_sail.model.generation import encode_images, generate
from pixel_sail.model.image_embedding import PooledPrompts
from pixel_sail.model.kernels import REFERENCE, Kernels
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation
from pixel_sail.model.upsampler import Upsampler
from pixel_sail.planning.activations import activation_bytes
from pixel_sail.planning.flops import forward_flops
from pixel_sail.planning.parameters import parameter_counts
from pixel_sail.planning.workload import of_batch
from pixel_sail.training.build import build_model
from pixel_sail.training.checkpoint import differing_leaves
from pixel_sail.training.prepare import build_mixture

ARCHITECTURE = "model.architecture."
BLIND = {"data.sources.refshapes.blind_baseline", "data.sources.groupshapes.blind_baseline"}

CARD = "pixel_sail_0_5b"
BOTH = ("mask2former", "sam2")
FRACTIONS = "data.sources.osprey_short_form.prompt_fractions"

CHANGES = {
    "stride_16": ("quickstart", {ARCHITECTURE + "mask_stride"}),
    "stride_8": ("quickstart", {ARCHITECTURE + "mask_stride"}),
    "stride_4": ("quickstart", set()),
    "stride_2": ("quickstart", {ARCHITECTURE + "mask_stride"}),
    "upsampler_off": ("quickstart", {ARCHITECTURE + "mask_stride"}),
    "upsampler_transposed": ("quickstart", set()),
    "upsampler_bilinear": ("quickstart", {ARCHITECTURE + "upsampler"}),
    "upsampler_pixel_shuffle": ("quickstart", {ARCHITECTURE + "upsampler"}),
    "mask_dim_256": ("quickstart", {ARCHITECTURE + "mask_dim"}),
    "mask_dim_512": ("quickstart", {ARCHITECTURE + "mask_dim"}),
    "prompts_injection": ("quickstart", set()),
    "prompts_pooled": ("quickstart", {ARCHITECTURE + "visual_prompts"}),
    "prompts_off": ("quickstart", {ARCHITECTURE + "visual_prompts"}),
    "prompts_unprojected": ("quickstart", {ARCHITECTURE + "prompt_projection"}),
    "attention_prefix": ("quickstart", set()),
    "attention_causal": ("quickstart", {ARCHITECTURE + "attention"}),
    "patch_14": ("quickstart", {ARCHITECTURE + "patch_size"}),
    "patch_16": ("quickstart", set()),
    "patch_32": ("quickstart", {ARCHITECTURE + "patch_size"}),
    "text_factor_1": ("quickstart", {"loss.text_factor_with_masks"}),
    "text_factor_0_1": ("quickstart", set()),
    "language_blind": ("quickstart", BLIND),
    "image_blind": ("quickstart", BLIND),
    "text_factor_0": ("quickstart", {"loss.text_factor_with_masks"}),
    **{f"teacher_{kind}": (CARD, {"distillation."}) for kind in ("none", "mask2former", "sam2", "radio")},
    "teacher_both": (CARD, set()),
    **{f"teacher_weight_{w}": (CARD, {f"distillation.{name}.weight" for name in BOTH}) for w in ("0_1", "1")},
    **{
        f"teacher_loss_{kind}": (CARD, {f"distillation.{name}.loss" for name in BOTH})
        for kind in ("cosine", "normalized")
    },
    **{f"ours_weight_{weight}": ("refshapes_distill", {"distillation.ours.weight"}) for weight in ("0_1", "1")},
    **{f"ours_loss_{kind}": ("refshapes_distill", {"distillation.ours.loss"}) for kind in ("cosine", "normalized")},
    **{name: (CARD, {"data.sources.", "data.repeats."}) for name in names("ablation") if name.startswith("data_")},
    "data_more_chat": (CARD, {"data.repeats.llava_mix665k"}),
    **{f"marks_{kind}": ("refshapes_ladder", {FRACTIONS}) for kind in ("mask", "box", "point", "scribble")},
    # Two keys, the only exception: the paper's plain baseline has neither upsampler nor injected prompts.
    "ladder_1_baseline": ("refshapes_ladder", {ARCHITECTURE + "mask_stride", ARCHITECTURE + "visual_prompts"}),
    "ladder_2_upsampler": ("refshapes_ladder", {ARCHITECTURE + "visual_prompts"}),
    "ladder_3_prompts": ("refshapes_ladder", set()),
    "ladder_4_distillation": ("refshapes_ladder", {"distillation.attribute_states", "distillation.attribute_pixels"}),
}
"""Ablation -> its experiment, and the keys in which it differs: none if it states what the
experiment does anyway, as a named baseline of sweeps. A key that ends in a full stop is a group that is
replaced as a whole; `MIXES` and `TEACHERS` list its contents."""

REF = {"refcoco": 4, "refcoco_plus": 4, "refcocog": 4}
SEG = REF | dict.fromkeys(("coco_semantic", "coco_panoptic", "openpsg_gcg", "flickr30k_gcg", "refcocog_gcg", "muse"), 1)
SEG |= {"grandf": 10, "pix2cap_seg": 2}
CHAT = {"llava_mix665k": 1}
OSPREY_REST = ("osprey_short_form", "osprey_conversation", "osprey_part_level", "osprey_positive_negative")
OSPREY = {"osprey_detail": 10} | dict.fromkeys(OSPREY_REST, 1)
REGIONS = {"pix2cap_vp": 10} | OSPREY
COCO = {"coco_vp": 1}
MIXES = {
    "data_segmentation": SEG | CHAT,
    "data_segmentation_3b": SEG | {"grefcoco": 4} | CHAT | {"pix2cap_vp": 5} | dict.fromkeys(OSPREY, 1),
    "data_regions": CHAT | REGIONS | COCO | {"sam_captions": 1},
    "data_grefcoco": {"grefcoco": 4},
    "data_refcoco_chat": REF | CHAT,
    "data_refcoco_grefcoco_chat": REF | {"grefcoco": 4} | CHAT,
    "data_sam_captions": {"sam_captions": 1},
    "data_pix2cap": {"pix2cap_vp": 5},
    "data_pix2cap_osprey": REGIONS,
    "data_pix2cap_osprey_coco": REGIONS | COCO,
    "data_pix2cap_osprey_coco_chat": REGIONS | COCO | CHAT,
    "data_marks_pix2cap": {"pix2cap_vp": 10, "pix2cap_vp_marked": 10},
    "data_boxes_pix2cap": {"pix2cap_vp": 10, "pix2cap_vp_marked": 10},
    "data_marks_all": REGIONS | {f"{name}_marked": repeats for name, repeats in REGIONS.items()} | COCO,
    "data_more_chat": SEG | {"grefcoco": 3, "llava_mix665k": 2} | REGIONS | COCO,
}
"""Data ablation -> source and how often it occurs in an epoch: the released lists."""

ALL = SEG | {"grefcoco": 3} | CHAT | REGIONS | COCO
LISTS = {
    "cotrain_0_5b": ALL,
    "cotrain_3b": ALL | {"sam_captions": 1},
    "cotrain_3b_more_chat": ALL | {"sam_captions": 1, "llava_mix665k": 2},
    "refcoco": REF,
    "reasonseg": {"reasonseg": 16},
    "refcocog_captions": {"refcocog_vp": 4},
}
"""The same for released lists that are no ablation."""

MARKED = {"mask": 0.2, "box": 0.4, "point": 0.4}
FRACTIONS_OF = {"data_boxes_pix2cap": {"mask": 0.2, "box": 0.8, "point": 0.0}}
"""Fractions of the kinds of marks in sources whose names end in _marked, if different from `MARKED`."""

TEACHERS = {
    "teacher_none": {},
    "teacher_mask2former": {"mask2former": ("pixel_map", 256, 1.0, "mse")},
    "teacher_sam2": {"sam2": ("patch_states", 256, 1.0, "mse")},
    "teacher_radio": {"radio": ("patch_states", 1024, 1.0, "mse")},
    "teacher_both": {"mask2former": ("pixel_map", 256, 0.5, "mse"), "sam2": ("patch_states", 256, 0.5, "mse")},
    **{
        f"teacher_weight_{name}": {
            "mask2former": ("pixel_map", 256, weight, "mse"),
            "sam2": ("patch_states", 256, weight, "mse"),
        }
        for name, weight in (("0_1", 0.1), ("1", 1.0))
    },
    **{
        f"teacher_loss_{name}": {
            "mask2former": ("pixel_map", 256, 0.5, loss),
            "sam2": ("patch_states", 256, 0.5, loss),
        }
        for name, loss in (("cosine", "cosine"), ("normalized", "normalized_mse"))
    },
    **{
        f"ours_weight_{name}": {"ours": ("pixel_map", 128, weight, "mse")}
        for name, weight in (("0_1", 0.1), ("1", 1.0))
    },
    "ours_loss_cosine": {"ours": ("pixel_map", 128, 0.5, "cosine")},
    "ours_loss_normalized": {"ours": ("pixel_map", 128, 0.5, "normalized_mse")},
    "ladder_4_distillation": {
        "attribute_states": ("patch_states", 43, 3.0, "kl"),
        "attribute_pixels": ("pixel_map", 43, 3.0, "kl"),
    },
}
"""Ablation of the teachers -> each with its site, channels, weight and loss."""


@cache
def base_of(experiment):
    return load_config("train", TrainConfig, [f"experiment={experiment}"])


@cache
def changed_by(ablation):
    return load_config("train", TrainConfig, [f"experiment={CHANGES[ablation][0]}", f"ablation={ablation}"])


@pytest.mark.parametrize("ablation", names("ablation"))
def test_every_ablation_changes_exactly_the_leaves_it_names(ablation):
    experiment, leaves = CHANGES[ablation]
    changed = changed_by(ablation)
    found = {key for key, _ in differing_leaves(asdict(base_of(experiment)), asdict(changed))}
    # Only of plans: mixes differ in size.
    found -= {"data.planned_samples"} if ablation.startswith("data_") else set()
    whole = {leaf for leaf in leaves if leaf.endswith(".")}
    assert {next((one for one in whole if key.startswith(one)), key) for key in found} == leaves
    assert len(leaves) <= 2 or whole or ablation in ("language_blind", "image_blind")
    bind_targets(changed.data.sources)
    bind_targets({name: own.model for name, own in changed.distillation.items()})
    with torch.device("meta"):
        model = PixelSailForSegmentation(PixelSailConfig.from_architecture(changed.model.architecture))
    assert sum(p.numel() for p in model.parameters()) == sum(parameter_counts(changed.model.architecture, {}).values())


@cache
def source_alone(name):
    return load_config("train", TrainConfig, ["name=x", "data.sources={}", f"+source@data.sources={name}"]).data.sources


@pytest.mark.parametrize("mix", [*MIXES, *LISTS])
def test_a_mix_has_exactly_the_sources_and_repeats_of_the_release(mix):
    data = changed_by(mix).data if mix in MIXES else load_config("train", TrainConfig, ["name=x", f"data={mix}"]).data
    assert {name: data.repeats.get(name, 1) for name in data.sources} == (MIXES | LISTS)[mix]
    assert not set(data.repeats) - set(data.sources) and not data.weights
    for name, node in data.sources.items():
        expected = source_alone(name)[name]
        if name.endswith("_marked"):
            shares = FRACTIONS_OF.get(mix, MARKED)
            assert {kind: node["prompt_fractions"].get(kind, 0.0) for kind in shares} == shares
            expected = expected | {"prompt_fractions": node["prompt_fractions"]}
        assert node == expected, name


@pytest.mark.parametrize("ablation", [name for name in names("ablation") if name.startswith(("teacher_", "ours_"))])
def test_teachers_are_those_of_the_table_with_their_weights_and_losses(ablation):
    teachers = changed_by(ablation).distillation
    assert {name: (own.site, own.channels, own.weight, own.loss) for name, own in teachers.items()} == TEACHERS[
        ablation
    ]
    for name, own in teachers.items():
        alone = load_config("train", TrainConfig, ["name=x", f"distillation={name}"]).distillation[name]
        assert own == replace(alone, weight=own.weight, loss=own.loss)


DESIGNS = ("transposed", "bilinear", "pixel_shuffle")


@pytest.mark.parametrize("design", DESIGNS)
def test_upsamplers_give_the_same_map_with_channels_first_and_last(design):
    upsampler = Upsampler(6, 2, design).double()
    torch.nn.init.normal_(upsampler.blocks[0].norm.weight)
    x_ICYX = torch.randn(2, 6, 3, 5, dtype=torch.double)
    last = torch.nn.Linear(6, 4).double()
    expected = last(upsampler(x_ICYX).permute(0, 2, 3, 1))
    for upsampler.recompute in (False, True):
        found = upsampler.channels_last(x_ICYX.permute(0, 2, 3, 1), last)
        assert found.shape == (2, 12, 20, 4)
        torch.testing.assert_close(found, expected)


def test_bilinear_doubling_by_hand():
    """Cell centers are a quarter cell off the old ones: 3/4 of the nearer and 1/4 of the farther."""
    upsampler = Upsampler(1, 1, "bilinear")
    block = upsampler.blocks[0]
    torch.nn.init.ones_(block.mixed.weight)
    torch.nn.init.constant_(block.mixed.bias, 10.0)
    found = block.upsample(torch.tensor([[[[0.0, 4.0]]]]))
    torch.testing.assert_close(found[0, 0], torch.tensor([[10.0, 11.0, 13.0, 14.0]] * 2))


def test_pixel_shuffle_turns_four_channels_into_four_cells():
    block = Upsampler(1, 1, "pixel_shuffle").blocks[0]
    torch.nn.init.zeros_(block.shuffled.weight)
    block.shuffled.bias.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    expected = torch.tensor([[1.0, 2.0, 1.0, 2.0], [3.0, 4.0, 3.0, 4.0]])
    torch.testing.assert_close(block.upsample(torch.zeros(1, 1, 1, 2))[0, 0], expected)


VARIANTS = [
    *({"upsampler": design, "mask_stride": 2} for design in DESIGNS),
    *({"visual_prompts": kind} for kind in ("pooled", "off")),
    {"prompt_projection": False},
]


@pytest.fixture
def batch(processor, make_sample, make_batch):
    """Two rows: prompts that are named in the text, one that is named but not painted, and a text without image."""
    rng = np.random.default_rng(0)
    sampled = [
        make_sample(rng, size_hw=(16, 24), masks_per_turn=(1, 2), prompts=(3, 7), sample_id="two"),
        make_sample(rng, size_hw=(40, 16), masks_per_turn=(1,), prompts=(3,), sample_id="tall"),
        make_sample(rng, size_hw=None, masks_per_turn=(0,), sample_id="text only"),
    ]
    named = ["what is <Prompt3> and <Prompt7>", "where is <Prompt3>, not <Prompt9>", "no image, but <Prompt3>"]
    examples = []
    for (sample, image), question in zip(sampled, named, strict=True):
        turns = (replace(sample.turns[0], question=question), *sample.turns[1:])
        examples.append(processor.encode_sample(replace(sample, turns=turns), image, independent_turns=False))
    return make_batch(examples[:2], examples[2:])


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_variant_gives_the_same_on_the_fast_path_and_packed_and_every_weight_learns(tiny_model, batch, changes):
    model = tiny_model(**changes).train()
    outputs = []
    for kernels in (REFERENCE, Kernels()):
        model.use(kernels)
        outputs.append(model(**batch.model_inputs()))
    slow, fast = outputs
    is_real = batch.sample_index_BT >= 0
    torch.testing.assert_close(fast.hidden_BTD[is_real], slow.hidden_BTD[is_real], rtol=1e-4, atol=1e-5)
    for found, expected in zip(fast.mask_logits, slow.mask_logits, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    fast.zero_loss.backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []
    assert sum(p.numel() for p in model.parameters()) == sum(parameter_counts(model.config, {}).values())


@pytest.mark.parametrize("kernels", [Kernels(), REFERENCE], ids=["default", "reference"])
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.usefixtures("as_large_images")
def test_the_plan_counts_what_an_upsampler_computes_and_keeps(tiny_model, batch, design, kernels):
    model = tiny_model(hidden_size=64, num_hidden_layers=1, mask_dim=32, mask_stride=1, upsampler=design).train()
    model.use(kernels)
    with counted_operations() as counter:
        model(**batch.model_inputs())
    work = of_batch(batch)
    assert forward_flops(model.config, work, {}, kernels).total == pytest.approx(counter.get_total_flops(), rel=0.02)
    config = LossConfig()
    config.points.num_points = 300
    said = activation_bytes(model.config, work, element=4, num_points=300, checkpointing="none", kernels=kernels)
    assert said.mask_head > 0.5 * said.total
    assert said.total == pytest.approx(saved_bytes(model, batch, config), rel=0.2)


def pooled_by_hand(model, batch):
    """Return the embeddings with pooled prompts, token by token."""
    embedded = model.embed(batch.input_ids_BT, batch.patches_SK, batch.patch_index_BT, batch.prompt_ids_BT)
    expected = embedded.clone()
    changed = []
    for row, token in np.ndindex(*batch.input_ids_BT.shape):
        for prompt, token_id in enumerate(model.config.prompt_token_ids):
            own = batch.sample_index_BT[row] == batch.sample_index_BT[row, token]
            covered = own & (batch.prompt_ids_BT[row] == prompt)
            if int(batch.input_ids_BT[row, token]) == token_id and covered.any():
                expected[row, token] = embedded[row, covered].mean(0)
                changed.append((row, int(batch.sample_index_BT[row, token]), prompt))
    return embedded, expected, changed


def test_pooled_prompts_are_means_of_the_patches_of_their_own_image(tiny_model, batch):
    model = tiny_model(visual_prompts="pooled")
    embedded, expected, changed = pooled_by_hand(model, batch)
    assert sorted(changed) == [(0, 0, 3), (0, 0, 7), (0, 1, 3)]
    size = (len(batch.sample_ids), model.config.num_visual_prompts)
    pooled = PooledPrompts.of(embedded, batch.sample_index_BT, batch.prompt_ids_BT, size)
    found = pooled.put_into(embedded, batch.sample_index_BT, model.named_prompts(batch.input_ids_BT))
    torch.testing.assert_close(found, expected)
    plain = model.embed(
        batch.input_ids_BT, batch.patches_SK, batch.patch_index_BT, torch.full_like(batch.prompt_ids_BT, -1)
    )
    assert torch.equal(plain, embedded), "nothing is added to patches"


def test_prompts_reach_the_states_in_every_way_but_off(tiny_model, batch):
    moved = {}
    for kind in ("injection", "pooled", "off"):
        model = tiny_model(visual_prompts=kind)
        inputs = batch.model_inputs()
        marked = model(**inputs).hidden_BTD
        unmarked = model(**(inputs | {"prompt_ids_BT": torch.full_like(batch.prompt_ids_BT, -1)})).hidden_BTD
        is_moved = (marked - unmarked).abs().amax(-1) > 1e-3
        moved[kind] = (bool((is_moved & batch.in_image_BT).any()), bool((is_moved & ~batch.in_image_BT).any()))
    assert moved == {"injection": (True, True), "pooled": (False, True), "off": (False, False)}


def test_unprojected_prompts_are_added_as_they_are(tiny_model, batch):
    model = tiny_model(prompt_projection=False)
    assert model.patch_embedding.prompt_projection is None
    embed = (batch.input_ids_BT, batch.patches_SK, batch.patch_index_BT)
    none = torch.full_like(batch.prompt_ids_BT, -1)
    difference = model.embed(*embed, batch.prompt_ids_BT) - model.embed(*embed, none)
    seven = model.embed_tokens.weight[model.config.token_id("<Prompt7>")]
    covered = difference[batch.prompt_ids_BT == 7]
    assert len(covered) > 0
    torch.testing.assert_close(covered, seven.expand_as(covered))


def test_pooled_prompts_are_the_same_in_generation(tiny_model, processor, make_sample, make_batch):
    """Two images with the same prompt: generation equals one forward pass over the full sequence."""
    model = tiny_model(seed=5, tie_word_embeddings=False, visual_prompts="pooled")
    rng, examples, texts = np.random.default_rng(4), [], []
    for _ in range(2):
        sample, image = make_sample(rng, size_hw=(16, 24), masks_per_turn=(0,), prompts=(3,))
        turn = replace(sample.turns[0], question="what is <Prompt3>", answer="")
        examples.append(processor.encode_sample(replace(sample, turns=(turn,)), image, independent_turns=False))
        texts.append([processor.question_ids(turn.question)])
    span = examples[0].in_image_T
    prefix = encode_images(
        model,
        torch.stack([example.patches_PK for example in examples]),
        examples[0].grid_hw,
        examples[0].position_ids_2T[:, span],
        torch.stack([example.prompt_ids_T[span] for example in examples]),
    )
    answers = generate(model, prefix, texts, max_new_tokens=1, end_ids=())
    for example, (answer,) in zip(examples, answers, strict=True):
        inputs = make_batch([example]).model_inputs() | {"logit_positions_M2": None}
        # The empty answer is only the end token, which the previous token predicts.
        assert answer.token_ids == [int(model(**inputs).logits[0, -2].argmax())]
    state = model(**(make_batch([examples[1]]).model_inputs())).hidden_BTD[0]
    torch.testing.assert_close(prefix.hidden_ISD[1], state[: int(span.sum())], rtol=1e-4, atol=1e-5)


RUN_HERE = [name for name in names("ablation") if CHANGES[name][0] != CARD]


@pytest.mark.parametrize("ablation", RUN_HERE)
def test_every_tiny_ablation_takes_a_first_step(data_root, ablation):
    """Model, data and losses as the run builds them; gradients of all trained parameters, without teachers."""
    overrides = [
        f"experiment={CHANGES[ablation][0]}",
        f"ablation={ablation}",
        f"paths.data={data_root}",
        "data.micro_batch_size=2",
    ]
    config = load_config("train", TrainConfig, overrides)
    model, processor = build_model(config.model, seed=0, teachers={})
    rows = config.data.micro_batch_size
    assignment = StreamAssignment(global_batch_size=rows, rank=0, world_size=1, micro_batch_size=rows)
    batches = training_batches(
        build_mixture(config.data, seed=0),
        processor,
        config.data.packing,
        assignment,
        start=[StreamState()] * rows,
        num_workers=0,
        max_skipped_fraction=config.data.max_skipped_fraction,
    )
    (batch,) = next(batches).batches
    output = model(**batch.training_inputs())
    terms = loss_sums(output, batch, config.loss)
    loss = combine(terms, count(batch), config.loss) + output.zero_loss
    loss.backward()
    assert torch.isfinite(loss) and loss.item() > 0
    assert [name for name, value in model.named_parameters() if value.grad is None] == []
