"""The EVE base: routed weights equal both mixed, packed equals alone, prompts work with cached images, and the plan
counts its parameters."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from counting import counted_operations
from one_device import step_on_one_device
from running import launcher, load_tool, start
from safetensors.torch import load_file, save_file
from shared_data import parity_folder
from torch.nn import functional as F
from varlen_kernels import new_varlen

from pixel_sail.config import ConfigError, LoraConfig, TrainConfig, load_config
from pixel_sail.data.collate import collate
from pixel_sail.data.packing import PackedSequence, StreamState
from pixel_sail.distillation.ours import ours
from pixel_sail.distillation.teacher import Teacher
from pixel_sail.evaluation.batch_view import view_samples
from pixel_sail.evaluation.predict import BatchPredictor, PredictConfig
from pixel_sail.losses.mask import PointSampling
from pixel_sail.losses.total import LossConfig, combine, count, loss_sums
from pixel_sail.model.configuration_pixel_sail import Architecture, PixelSailConfig
from pixel_sail.model.eve_embedding import EveEmbedding
from pixel_sail.model.generation import encode_images, generate
from pixel_sail.model.image_layout import image_span, image_tokens, patch_places
from pixel_sail.model.kernels import REFERENCE, Kernels
from pixel_sail.model.lora import add_lora
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation, load_model
from pixel_sail.model.patches import CLIP_MEAN, CLIP_STD, image_to_patches, resized_size
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.model.routed_decoder import Mixed, RoutedLayer, RoutedTokens
from pixel_sail.planning.activations import activation_bytes
from pixel_sail.planning.assumed import assumed_sample
from pixel_sail.planning.flops import forward_flops
from pixel_sail.planning.parameters import parameter_counts
from pixel_sail.planning.workload import of_batch
from pixel_sail.training.build import lora_targets
from pixel_sail.types import DataError, VisualPrompt

EVE = {
    "base": "eve",
    "attention": "causal",
    "modality_experts": ["self_attn", "layernorm", "mlp"],
    "patch_hidden_size": 12,
    "max_long_side": 32,
}
PARTS = [[], ["self_attn"], ["layernorm"], ["mlp"], ["self_attn", "layernorm", "mlp"]]
CONFIG = LossConfig(points=PointSampling(num_points=64))
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def eve_model(tiny_model):
    return lambda **changes: tiny_model(**(EVE | changes))


@pytest.fixture(scope="module")
def eve(tokenizer, make_config):
    return PixelSailProcessor.for_model(tokenizer, make_config(**EVE))


@pytest.fixture
def examples(eve, make_sample):
    """A conversation with prompts, independent turns, another grid, an image without masks, and text alone."""
    rng = np.random.default_rng(5)
    sampled = [
        (make_sample(rng, masks_per_turn=(1, 2), prompts=(3, 7), sample_id="conversation"), False),
        (make_sample(rng, masks_per_turn=(1, 0, 2), sample_id="branches"), True),
        (make_sample(rng, size_hw=(40, 9), masks_per_turn=(2,), sample_id="tall"), False),
        (make_sample(rng, size_hw=(8, 8), masks_per_turn=(0,), prompts=(1,), sample_id="no mask"), False),
        (make_sample(rng, size_hw=None, masks_per_turn=(0, 0), sample_id="text"), False),
    ]
    return [eve.encode_sample(*pair, independent_turns=independent) for pair, independent in sampled]


@pytest.fixture
def batch(examples, make_batch):
    return make_batch([examples[i] for i in (1, 4, 0)], [examples[i] for i in (3, 2)])


def losses_and_gradients(model, batch, kernels, checkpointing="none"):
    model.use(kernels, checkpointing)
    model.zero_grad()
    output = model(**batch.training_inputs())
    sums = loss_sums(output, batch, CONFIG)
    combine(sums, count(batch), CONFIG).backward(retain_graph=True)
    output.zero_loss.backward()
    found = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return torch.cat((sums.text_S, sums.bce_S, sums.dice_S)).detach(), found, output


@pytest.mark.parametrize("attention", ["segments", "varlen"])
@pytest.mark.parametrize("parts", PARTS, ids="-".join)
def test_routing_equals_computing_both_weights_and_mixing(eve_model, batch, monkeypatch, parts, attention):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", new_varlen)
    model = eve_model(modality_experts=parts).train()
    assert any("decoder.layers.0.image." in name for name, _ in model.named_parameters()) == bool(parts)
    expected, slow, reference = losses_and_gradients(model, batch, REFERENCE)
    found, fast, output = losses_and_gradients(model, batch, Kernels(attention=attention))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    real = batch.sample_index_BT >= 0
    torch.testing.assert_close(output.hidden_BTD[real], reference.hidden_BTD[real], rtol=1e-4, atol=1e-5)
    for name, gradient in slow.items():
        torch.testing.assert_close(fast[name], gradient, rtol=1e-3, atol=2e-5 * float(gradient.abs().max()), msg=name)
    learned = [name for name, gradient in slow.items() if ".image." in name and gradient.abs().max() > 1e-6]
    assert len(learned) == sum(".image." in name for name in slow)


def test_a_token_is_computed_by_the_weights_of_its_kind_only(eve_model, batch):
    model = eve_model()
    is_image = torch.isin(batch.input_ids_BT, torch.tensor([model.config.token_id(t) for t in IMAGE]))
    seen = {}

    def note(module, inputs, output):
        seen[module] = len(inputs[0])

    layer = model.decoder.layers[0]
    for mlp in (layer.mlp, layer.image.mlp):
        mlp.register_forward_hook(note)
    model(**batch.model_inputs())
    assert seen == {layer.mlp: int((~is_image).sum()), layer.image.mlp: int(is_image.sum())}


IMAGE = ("<vision>", "<vpatch>", "</vision>")


def test_reordering_puts_text_first_and_is_invertible():
    routing = RoutedTokens(torch.tensor([[False, True, True], [True, False, False]]), 3)
    x = torch.arange(6.0)[:, None]
    assert routing.reorder(x)[:, 0].tolist() == [0.0, 4.0, 5.0, 1.0, 2.0, 3.0]
    assert routing.restore_order(routing.reorder(x)).equal(x)
    for own in (routing, Mixed(torch.tensor([[False, True, True], [True, False, False]]))):
        mapped = own.restore_order(own.apply(lambda t: t * 10, lambda t: -t, own.reorder(x)))
        assert mapped[:, 0].tolist() == [0.0, -1.0, -2.0, -3.0, 40.0, 50.0]


@pytest.mark.parametrize("rows", [([4, 0, 3, 1, 2],), ([0, 4], [1], [3, 2])], ids=["one row", "three rows"])
@pytest.mark.parametrize("attention", ["dense", "segments", "flex"])
def test_packed_samples_equal_each_sample_alone(eve_model, make_batch, examples, rows, attention):
    model = eve_model()
    model.use(Kernels(attention=attention))
    packed_batch = make_batch(*[[examples[i] for i in row] for row in rows])
    with torch.no_grad():
        packed = model(**packed_batch.model_inputs())
        for example in examples:
            alone = model(**make_batch([example]).model_inputs())
            sample = packed_batch.sample_ids.index(example.sample_id)
            own = packed.hidden_BTD[packed_batch.sample_index_BT == sample]
            torch.testing.assert_close(own, alone.hidden_BTD[0], **TOLERANCE)
            if example.masks:
                found = packed.mask_logits[packed_batch.image_samples.index(sample)]
                torch.testing.assert_close(found, alone.mask_logits[0], **TOLERANCE)


def test_image_tokens_attend_only_to_previous_tokens(eve_model, eve, make_sample, make_batch):
    model = eve_model()
    rng = np.random.default_rng(1)
    sample, image = make_sample(rng, sample_id="a")
    example = eve.encode_sample(sample, image, independent_turns=False)
    changed = example.patches_PK.clone()
    changed[-1] = 255 - changed[-1]
    with torch.no_grad():
        states = [
            model(**make_batch([replace(example, patches_PK=patches)]).model_inputs()).hidden_BTD[0]
            for patches in (example.patches_PK, changed)
        ]
    last = int((example.patch_index_T >= 0).nonzero()[-1])
    assert torch.equal(states[0][:last], states[1][:last])
    assert not torch.allclose(states[0][last:], states[1][last:])


@pytest.mark.parametrize("which", [[4], [3]], ids=["text alone", "image without masks"])
def test_every_parameter_has_a_gradient_for_any_batch(eve_model, make_batch, examples, which):
    model = eve_model().train()
    _, gradients, _ = losses_and_gradients(model, make_batch([examples[i] for i in which]), Kernels())
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    of_images = [float(g.abs().max()) for name, g in gradients.items() if ".image." in name or "piece_proj" in name]
    assert (max(of_images) > 0) == (which == [3])


def test_every_weight_is_called_once_per_pass_for_any_batch(eve_model, make_batch, examples):
    """ZeRO-3 gathers at each call, so every rank needs the same calls in the same order."""
    model = eve_model().train()
    calls = []
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    per_batch = []
    for which in ([4], [0], [1, 4, 3]):
        calls.clear()
        model(**make_batch([examples[i] for i in which]).training_inputs())
        per_batch.append([name for name in calls if name.startswith(("decoder", "patch_embedding"))])
    assert per_batch[0] == per_batch[1] == per_batch[2]
    assert len(set(per_batch[0])) == len(per_batch[0])


RUN = (
    *("model=tiny", "data=refshapes_all", "name=eve", "evals=[]", "log.every=1", "log.tensorboard=false"),
    *(
        f"model.architecture.{name}={value}".replace("'", "").replace(" ", "")
        for name, value in (EVE | {"max_long_side": 64}).items()
    ),
    *("model.architecture.hidden_size=32", "model.architecture.intermediate_size=48", "log.progress=false"),
    *("model.architecture.num_hidden_layers=2", "model.architecture.mask_dim=16", "loss.points.num_points=64"),
    # One sample a sequence and one sequence a micro-batch: mostly text alone, beside an image on the other process.
    *("data.packing.max_samples=1", "data.packing.packing_buffer=1", "+data.repeats.llava_mix665k=40"),
    *("data.global_batch_size=4", "data.micro_batch_size=1", "optim.steps=3"),
)


def run_losses(data_root, folder, by, stage):
    command = [*launcher(by), "scripts/train.py", *RUN, f"run_dir={folder}", f"deepspeed={stage}"]
    done = start(command, data_root)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_process(data_root, tmp_path_factory):
    return run_losses(data_root, tmp_path_factory.mktemp("plain") / "run", "python", "none")


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_two_processes_with_and_without_images_train_as_one(data_root, tmp_path, one_process, stage):
    found = run_losses(data_root, tmp_path / "run", "torchrun", stage)
    for own, expected in zip(found, one_process, strict=True):
        assert 0 < expected["llava_mix665k/samples"] < 4, "no step has text alone beside images"
        for name in ("loss/total", "optim/grad_norm"):
            assert own[name] == pytest.approx(expected[name], rel=1e-4), name


@pytest.mark.parametrize("checkpointing", ["feed_forward", "layers"])
def test_recomputed_layers_change_nothing(eve_model, batch, checkpointing):
    model = eve_model().train()
    expected, gradients, _ = losses_and_gradients(model, batch, Kernels())
    found, again, _ = losses_and_gradients(model, batch, Kernels(), checkpointing)
    assert torch.equal(found, expected)
    # Parts of a gradient may be summed in another order.
    for name, value in gradients.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()), msg=name)
    assert max(float(value.abs().max()) for value in gradients.values()) > 0.01


@pytest.mark.parametrize("kernels", [Kernels(attention="varlen"), REFERENCE], ids=["fast", "reference"])
def test_a_step_runs_on_any_single_device(eve_model, batch, kernels):
    for parts in PARTS:
        model = eve_model(modality_experts=parts)
        model.use(kernels)
        assert step_on_one_device(model, batch, torch.bfloat16, CONFIG) == [], parts


def test_a_compiled_feed_forward_is_the_plain_one(eve_model):
    layer = eve_model().decoder.layers[0]
    compiled = torch.compile(RoutedLayer.feed_forward, dynamic=True, backend="aot_eager")
    for num_text, num_image in ((5, 4), (3, 8), (7, 0)):
        x = torch.randn(num_text + num_image, 32)
        routing = RoutedTokens(torch.arange(len(x))[None] >= num_text, num_image)
        torch.testing.assert_close(compiled(layer, x, routing), layer.feed_forward(x, routing), **TOLERANCE)


QUESTIONS = ("red star", "the small box behind it")


def answers_with_cache(model, eve, example, span_length):
    prompts = example.prompt_ids_T[None, :span_length]
    prefix = encode_images(
        model,
        example.patches_PK[None],
        example.grid_hw,
        example.position_ids_2T[:, :span_length],
        prompts,
        lead_ids=eve.lead_ids,
    )
    texts = [eve.question_ids(question, follows_image=True) for question in QUESTIONS]
    return generate(model, prefix, [texts], max_new_tokens=6, end_ids=())[0], prefix, texts


@torch.no_grad()
def test_generation_with_cached_images_equals_one_without(eve_model, eve, make_sample):
    model = eve_model()
    sample, image = make_sample(np.random.default_rng(2), prompts=(4,), sample_id="a")
    example = eve.encode_sample(sample, image, independent_turns=False)
    span = eve.image_span(example.grid_hw)
    length = len(span.token_ids_S)
    answers, prefix, texts = answers_with_cache(model, eve, example, length)
    for answer, text in zip(answers, texts, strict=True):
        ids = torch.tensor([*span.token_ids_S.tolist(), *text])
        for token in answer.token_ids:
            output = whole_pass(model, ids, span, example)
            assert int(output.logits[0, -1].argmax()) == token
            ids = torch.cat((ids, torch.tensor([token])))
        whole = whole_pass(model, ids, span, example).hidden_BTD[0]
        torch.testing.assert_close(
            prefix.patch_states(0).flatten(0, 1), whole[:length][span.patch_index_S >= 0], **TOLERANCE
        )


def whole_pass(model, ids, span, example):
    num_text = len(ids) - len(span.token_ids_S)
    zeros = torch.zeros(1, len(ids), dtype=torch.long)
    prompts = example.prompt_ids_T[: len(span.token_ids_S)]
    return model(
        input_ids_BT=ids[None],
        position_ids_2BT=torch.arange(len(ids)).expand(2, 1, -1),
        sample_index_BT=zeros,
        branch_ids_BT=zeros,
        in_image_BT=zeros > 0,
        patch_index_BT=F.pad(span.patch_index_S, (0, num_text), value=-1)[None],
        prompt_ids_BT=F.pad(prompts, (0, num_text), value=-1)[None],
        patches_SK=example.patches_PK,
        grids=[example.grid_hw],
        masks_per_image=[0],
    )


def test_visual_prompts_have_an_effect_on_what_is_predicted(eve_model, eve, make_image):
    model = eve_model()
    predictor = BatchPredictor(model, eve, PredictConfig(answer="forced"))
    image = make_image(np.random.default_rng(3), (24, 24))
    mask = np.zeros((24, 24), dtype=bool)
    mask[:12, :12] = True
    prompt = VisualPrompt(prompt_id=2, mask=mask)
    with_prompt, without, again = (
        predictor.ask(image, ["the <Prompt2>"], prompts)[0].scores for prompts in ((prompt,), (), (prompt,))
    )
    assert with_prompt == again
    assert with_prompt != without


def test_a_prompt_is_added_unprojected_to_exactly_the_patches_it_covers(eve_model, eve, make_sample, make_batch):
    model = eve_model()
    sample, image = make_sample(np.random.default_rng(2), size_hw=(16, 24))
    example = eve.encode_sample(sample, image, independent_turns=False)
    plain = make_batch([example])
    mask = np.zeros((16, 24), dtype=bool)
    mask[0, 0] = True
    painted = eve.paint_prompts((VisualPrompt(prompt_id=5, mask=mask),), example.grid_hw, "test")
    assert (painted >= 0).nonzero().tolist() == [[len(eve.lead_ids) + 1]]
    marked = F.pad(painted, (0, len(example) - len(painted)), value=-1)[None]
    embed = (plain.input_ids_BT, plain.patches_SK, plain.patch_index_BT)
    difference = (model.embed(*embed, marked) - model.embed(*embed, plain.prompt_ids_BT))[0]
    expected = torch.zeros_like(difference)
    expected[len(eve.lead_ids) + 1] = model.embed_tokens.weight[model.config.token_id("<Prompt5>")]
    torch.testing.assert_close(difference, expected, **TOLERANCE)


def test_the_embedding_equals_convolutions_over_the_full_image(eve_model, eve, make_image):
    """An image of 2 x 3 patches: class token, rows of patches, and a row end behind each, of every image."""
    model = eve_model()
    embedding = model.patch_embedding
    assert isinstance(embedding, EveEmbedding)
    torch.nn.init.normal_(embedding.piece_projection.bias)
    image = make_image(np.random.default_rng(0), (16, 24))
    patches, grid = image_to_patches(image, 8, math.isqrt(16 * 24), "area")
    assert grid == (2, 3)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255.0
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    hidden = F.gelu(embedding.piece_projection((pixels - mean) / std))
    map_Dhw = embedding.patch_projection(hidden)[0]
    span = eve.image_span(grid)
    ids = torch.cat((span.token_ids_S, torch.tensor([7])))[None]
    index = F.pad(span.patch_index_S, (0, 1), value=-1)[None]
    found = model.embed(ids, patches, index, torch.full_like(ids, -1))[0, len(eve.lead_ids) :]
    row_end = embedding.row_end_embedding
    rows = [[*map_Dhw[:, r].T, row_end] for r in range(2)]
    expected = torch.stack([embedding.class_embedding, *rows[0], *rows[1], model.embed_tokens.weight[7]])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("size_hw", "side", "resized"),
    [
        ((480, 640), 800, (704, 928)),  # 692.8 x 923.8
        ((640, 480), 800, (928, 704)),
        ((480, 640), 1600, (1408, 1856)),  # 1385.6 x 1847.5
        ((800, 800), 800, (800, 800)),  # exact: nothing is rounded up
        ((300, 1200), 800, (416, 1600)),  # 400 x 1600: 400 is 12.5 patches, 1600 is exactly 50
        ((10, 10), 800, (800, 800)),  # enlarged
        ((3, 3000), 800, (32, 25312)),  # 25.3 x 25298
        ((801, 799), 800, (832, 800)),  # 801.0 x 799.0
    ],
)
def test_images_are_scaled_to_one_area(size_hw, side, resized):
    assert resized_size(size_hw, 32, side, "area") == resized


def test_the_layout_of_an_image_is_class_token_rows_and_row_ends():
    span = image_span("eve", (2, 3), (50, 51, 52), (8, 9))
    assert span.token_ids_S.tolist() == [8, 9, 50, 51, 51, 51, 52, 51, 51, 51, 52]
    assert span.patch_index_S.tolist() == [-1, -1, -1, 0, 1, 2, -1, 3, 4, 5, -1]
    assert span.position_ids_2S.tolist() == [list(range(11))] * 2
    assert span.next_position == 11
    assert patch_places("eve", (2, 3), 2).tolist() == [3, 4, 5, 7, 8, 9]
    assert image_tokens("eve", (2, 3)) == 9 and image_tokens("sail", (2, 3)) == 8


def test_a_sample_is_the_chat_template_with_the_image_in_the_first_question(eve, make_sample, tokenizer):
    sample, image = make_sample(np.random.default_rng(0), masks_per_turn=(1, 0))
    example = eve.encode_sample(sample, image, independent_turns=False)
    rows, columns = example.grid_hw
    image_text = "<vision>" + ("<vpatch>" * columns + "</vision>") * rows
    first, second = sample.turns
    header = "<|im_end|>\n<|im_start|>assistant\n"
    expected = f"<|im_start|>user\n{image_text}\n{first.question}{header}{first.answer}<|im_end|>"
    expected += f"<|im_start|>user\n{second.question}{header}{second.answer}<|im_end|>"
    assert tokenizer.decode(example.input_ids_T) == expected
    supervised = tokenizer.decode(example.labels_T[example.labels_T >= 0])
    assert supervised == f"{first.answer}<|im_end|>{second.answer}<|im_end|>"
    assert example.position_ids_2T.tolist() == [list(range(len(example)))] * 2
    assert not example.in_image_T.any()


def test_independent_turns_start_at_the_end_of_the_image(eve, make_sample, tokenizer):
    sample, image = make_sample(np.random.default_rng(0), masks_per_turn=(1, 0))
    example = eve.encode_sample(sample, image, independent_turns=True)
    for branch, turn in enumerate(sample.turns, start=1):
        own = example.branch_ids_T == branch
        assert tokenizer.decode(example.input_ids_T[own]).startswith(f"\n{turn.question}<|im_end|>")
        assert int(example.position_ids_2T[0, own][0]) == int((example.branch_ids_T == 0).sum())


def test_text_that_names_an_image_token_is_rejected(eve, make_sample):
    sample, image = make_sample(np.random.default_rng(0))
    with pytest.raises(DataError, match="found in the text"):
        eve.question_ids("what is a <vpatch>?")
    turn = replace(sample.turns[0], answer="a </vision> [SEG]")
    with pytest.raises(DataError, match="found in the text"):
        eve.encode_sample(replace(sample, turns=(turn,)), image, independent_turns=False)


def test_a_batch_shows_the_image_as_one_piece(eve, batch):
    shown = view_samples(batch, eve)
    pieces = [run.text for view in shown for run in view.runs if run.is_image]
    assert len(pieces) == len(batch.grids)
    assert all(text.startswith("[image ") for text in pieces)


def test_an_exported_folder_records_the_base(eve_model, eve, tmp_path, batch):
    model = eve_model()
    model.save_pretrained(tmp_path)
    eve.save_pretrained(tmp_path)
    loaded, processor = load_model(tmp_path), PixelSailProcessor.from_pretrained(tmp_path)
    assert processor.settings == eve.settings and processor.lead_ids == eve.lead_ids
    with torch.no_grad():
        assert torch.equal(loaded(**batch.model_inputs()).logits, model(**batch.model_inputs()).logits)


def test_an_eve_model_as_a_teacher_gives_the_pixel_map_of_a_forward_pass(
    eve_model, eve, make_sample, make_batch, tmp_path
):
    model = eve_model()
    model.use(Kernels(mask_head="maps"))
    model.save_pretrained(tmp_path)
    eve.save_pretrained(tmp_path)
    # An image of the wanted area, so that nothing is resized.
    sample, image = make_sample(np.random.default_rng(3), size_hw=(16, 64))
    (feature,) = Teacher(ours(str(tmp_path)), device="cpu", precision="fp32", max_batch=4).features(
        [torch.from_numpy(np.array(image))]
    )
    with torch.no_grad():
        example = eve.encode_sample(sample, image, independent_turns=False)
        (expected,) = model(**make_batch([example]).model_inputs()).pixel_features
    assert example.grid_hw == (2, 8)
    torch.testing.assert_close(feature, expected.permute(2, 0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": "solo"}, "base is 'solo'"),
        ({"attention": "prefix"}, "only attention=causal"),
        ({"modality_experts": ["mlp", "norm"]}, "modality_experts is"),
        ({"modality_experts": ["mlp", "mlp"]}, "each once"),
        ({"base": "sail"}, "needs base=eve"),
        ({"patch_size": 15}, "even number"),
    ],
)
def test_inconsistent_fields_are_rejected(make_config, fields, message):
    with pytest.raises(ValueError, match=message):
        make_config(**(EVE | fields))


def test_a_sail_model_may_attend_causally(tiny_model, tokenizer, make_config, make_sample):
    config = make_config(attention="causal")
    processor = PixelSailProcessor.for_model(tokenizer, config)
    model = tiny_model(attention="causal")
    example = processor.encode_sample(*make_sample(np.random.default_rng(0)), independent_turns=False)
    assert not example.in_image_T.any()
    batch = collate([PackedSequence(stream=0, after=StreamState(next=1), examples=(example,))], seg_id=processor.seg_id)
    length = image_tokens("sail", example.grid_hw)
    with torch.no_grad():
        hidden = model(**batch.model_inputs()).hidden_BTD[0]
        prefix = encode_images(
            model,
            example.patches_PK[None],
            example.grid_hw,
            example.position_ids_2T[:, :length],
            example.prompt_ids_T[None, :length],
        )
    torch.testing.assert_close(prefix.hidden_ISD[0], hidden[:length], **TOLERANCE)


@pytest.mark.parametrize("parts", PARTS, ids="-".join)
def test_the_plan_counts_the_parameters(make_config, parts):
    config = make_config(**(EVE | {"modality_experts": parts}))
    named = dict(PixelSailForSegmentation(config).named_parameters())
    counts = parameter_counts(config, {})
    for part, prefix in (("image_embedding", "patch_embedding."), ("decoder", "decoder.")):
        assert counts[part] == sum(p.numel() for name, p in named.items() if name.startswith(prefix))
    assert sum(counts.values()) == sum(p.numel() for p in named.values())


def test_the_7b_configuration_has_the_planned_parameters():
    architecture = load_config("train", TrainConfig, ["name=x", "model=eve_7b"]).model.architecture
    architecture.vocab_size = 151680
    names = ["<vision>", "<vpatch>", "</vision>"]
    architecture.token_ids = {name: index for index, name in enumerate(names)}
    with torch.device("meta"):
        model = PixelSailForSegmentation(PixelSailConfig.from_architecture(architecture))
    counts = parameter_counts(architecture, {})
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    # Qwen2.5-7B without its embeddings has 6.53 billion; a second set of everything but the last norm doubles them.
    assert (
        counts["decoder"] == 28 * 2 * (3584 * 3584 * 2 + 3584 + 2 * (3584 * 512 + 512) + 3 * 3584 * 18944 + 7168) + 3584
    )


@pytest.mark.parametrize("experts", ["routed", "mixed"])
@pytest.mark.usefixtures("as_large_images")
def test_the_plan_counts_operations_and_activations(eve_model, batch, experts):
    model = eve_model(hidden_size=64, intermediate_size=176).train()
    kernels = Kernels(experts=experts)
    model.use(kernels)
    with counted_operations() as counter:
        model(**batch.model_inputs())
    said = forward_flops(model.config, of_batch(batch), {}, kernels)
    assert said.total == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_plan_counts_causal_attention_for_an_eve_image():
    architecture = Architecture(base="eve", attention="causal", patch_size=32, max_long_side=800)
    work = assumed_sample(architecture, (480, 640), text_tokens=100, supervised=50, masks=4)
    length = 1 + 22 * 30 + 100
    assert (work.images[0].rows, work.images[0].columns) == (22, 29)
    assert work.seen_pairs == length * (length + 1) // 2
    assert activation_bytes(architecture, work, element=2, num_points=9, checkpointing="none").total > 0


def test_adapters_and_groups_reach_the_weights_of_images(eve_model):
    model = eve_model()
    targets = lora_targets(model, LoraConfig(rank=2))
    assert "decoder.layers.0.self_attn.q_proj" in targets
    assert "decoder.layers.1.image.mlp.gate_proj" in targets
    assert not [name for name in targets if not name.startswith("decoder.layers.")]
    add_lora(model, targets, rank=2, alpha=4.0, seed=0)
    text_only = lora_targets(eve_model(), LoraConfig(rank=2, targets=[r"decoder\.layers\.\d+\.self_attn\..*_proj"]))
    assert len(text_only) == 2 * 4
    with pytest.raises(ConfigError):
        lora_targets(eve_model(modality_experts=[]), LoraConfig(rank=2, targets=[r"decoder\.layers\.\d+\.image\..*"]))


def test_recorded_outputs_of_the_released_eve_model_are_reproduced(tmp_path, capsys):
    tool, folder = load_tool("check_parity"), parity_folder("eve_moe")
    assert tool.main([str(folder)]) == 0
    printed = capsys.readouterr().out
    for tensor in ("hidden_last", "logits", "llm_loss", "feature_low", "feature_high", "seg_query", "mask_logits"):
        assert printed.count(f"\n  {tensor} ") == 2
    # A missing prompt or a changed image weight is detected.
    for name in ("cases.safetensors", "config.json", "reference_state.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    cases = load_file(folder / "cases.safetensors")
    save_file(
        cases | {"0.visual_prompt_indexes": cases["0.visual_prompt_indexes"] * 0 - 1}, tmp_path / "cases.safetensors"
    )
    assert tool.main([str(tmp_path)]) == 1
    (tmp_path / "cases.safetensors").write_bytes((folder / "cases.safetensors").read_bytes())
    state = load_file(folder / "reference_state.safetensors")
    state["single_transformer.model.layers.1.moe_mlp.up_proj.weight"] += 0.01
    save_file(state, tmp_path / "reference_state.safetensors")
    assert tool.main([str(tmp_path)]) == 1
    config = json.loads((folder / "config.json").read_text())
    config["experts"] = "self_attn-mlp"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert tool.main([str(tmp_path)]) == 2


def test_a_layer_without_kinds_is_a_plain_decoder_layer(eve_model):
    layer = eve_model().decoder.layers[0]
    assert isinstance(layer, RoutedLayer)
    x = torch.randn(2, 3, 32)
    assert torch.equal(layer.feed_forward(x), x + layer.mlp(layer.post_attention_layernorm(x)))
