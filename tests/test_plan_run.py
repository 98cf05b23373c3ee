"""Planned costs equal the measured costs of a tiny run."""

import json
import sys

import numpy as np
import pytest
import torch
from counting import counted_operations
from running import launcher, load_tool, start
from torch.nn import functional as F

from pixel_sail.config import DeepSpeedConfig, OptimConfig, TrainConfig, load_config
from pixel_sail.distillation.settings import TeacherSettings
from pixel_sail.losses.total import Counts, LossConfig, combine, count, loss_sums
from pixel_sail.model.attention_mask import attention_mask
from pixel_sail.model.configuration_pixel_sail import Architecture, PixelSailConfig
from pixel_sail.model.distill_head import DistillSite
from pixel_sail.model.kernels import CHECKPOINTING, REFERENCE, Kernels
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation
from pixel_sail.model.recompute import Norm
from pixel_sail.planning.activations import activation_bytes
from pixel_sail.planning.assumed import assumed_sample
from pixel_sail.planning.disk import checkpoint_bytes
from pixel_sail.planning.flops import forward_flops, training_flops
from pixel_sail.planning.memory import training_state
from pixel_sail.planning.parameters import parameter_counts
from pixel_sail.planning.workload import of_batch
from pixel_sail.training.optim import build_optimizer

TEACHERS = {
    "sam2": TeacherSettings(model={}, site="patch_states", channels=256),
    "mask2former": TeacherSettings(model={}, site="pixel_map", channels=128),
}
SIZES = {
    "small": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "mask_dim": 32},
    "wide": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "mask_dim": 64, "mask_stride": 2},
}


@pytest.fixture
def batch(make_sample, processor, make_batch):
    """Two rows: images of two sizes with masks, one without, and a sample of text alone."""
    rng = np.random.default_rng(0)
    rows = [
        [((64, 48), (2, 1)), ((40, 64), (1,)), (None, (0,))],
        [((64, 64), (3,)), ((48, 48), (0, 0))],
    ]
    examples = []
    for row in rows:
        samples = [make_sample(rng, size_hw=size, masks_per_turn=masks) for size, masks in row]
        examples.append([processor.encode_sample(sample, image, independent_turns=False) for sample, image in samples])
    return make_batch(*examples)


def loss_of(model, batch, config):
    output = model(**batch.training_inputs())
    terms = loss_sums(output, batch, config)
    return combine(terms, count(batch), config) + output.zero_loss


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"num_visual_prompts": 0, "mask_stride": 8},
        {"attention_bias": False},
    ],
)
def test_parameters_by_part_are_those_of_the_real_model(make_config, changes):
    config = make_config(**changes)
    model = PixelSailForSegmentation(config)
    model.add_distill_head({n: DistillSite(site=e.site, channels=e.channels) for n, e in TEACHERS.items()}, seed=0)
    parts = {"token_embedding": "embed_tokens", "image_embedding": "patch_embedding", "text_head": "lm_head"}
    counts = parameter_counts(config, TEACHERS)
    named = dict(model.named_parameters())
    for part, number in counts.items():
        own = [p.numel() for name, p in named.items() if name.startswith(parts.get(part, part) + ".")]
        assert number == sum(own), part
    assert sum(counts.values()) == sum(p.numel() for p in named.values())


@pytest.mark.parametrize("hidden", [896, 2048])
def test_parameters_of_the_paper_sizes_are_those_of_models_without_memory(hidden):
    sizes = {896: (4864, 24, 14), 2048: (11008, 36, 16)}[hidden]
    architecture = Architecture(
        vocab_size=151680,
        hidden_size=hidden,
        intermediate_size=sizes[0],
        num_hidden_layers=sizes[1],
        num_attention_heads=sizes[2],
        mask_dim=512,
    )
    with torch.device("meta"):
        model = PixelSailForSegmentation(PixelSailConfig.from_architecture(architecture))
    assert sum(parameter_counts(architecture, {}).values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kernels", [Kernels(), REFERENCE], ids=["default", "reference"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.usefixtures("as_large_images")
def test_operations_of_a_training_step_are_those_torch_counts(tiny_model, batch, size, kernels):
    model = tiny_model(**SIZES[size]).train()
    model.use(kernels)
    with counted_operations() as counter:
        output = model(**batch.model_inputs())
        forward = counter.get_total_flops()
        loss = loss_sums(output, batch, LossConfig())
        (combine(loss, Counts(tokens=9, masks=7, samples=5), LossConfig()) + output.zero_loss).backward()
    said = forward_flops(model.config, of_batch(batch), {}, kernels)
    assert said.total == pytest.approx(forward, rel=0.02)
    said_in_all = training_flops(said, model.config, checkpointing="none")["model"]
    assert said_in_all == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_visible_pairs_are_those_of_the_mask(batch):
    mask = attention_mask(batch.sample_index_BT, batch.branch_ids_BT, batch.in_image_BT)[:, 0]
    is_real = batch.sample_index_BT >= 0
    assert of_batch(batch).seen_pairs == int((mask & is_real[:, :, None]).sum())


def saved_bytes(model, batch, config):
    """Return the bytes of all storages that the forward pass saves, parameters apart."""
    # Identified by the storage object: meta tensors have no address.
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages, alive = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(model, batch, config)
    assert loss.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("kernels", [Kernels(), REFERENCE], ids=["default", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.usefixtures("as_large_images")
def test_kept_activations_are_those_that_autograd_saves(tiny_model, batch, size, dtype, kernels):
    model, config = tiny_model(**SIZES[size]).train().to(dtype), LossConfig()
    model.use(kernels)
    config.points.num_points = 300
    said = activation_bytes(
        model.config, of_batch(batch), element=dtype.itemsize, num_points=300, checkpointing="none", kernels=kernels
    )
    assert said.total == pytest.approx(saved_bytes(model, batch, config), rel=0.15)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.usefixtures("as_large_images")
def test_kept_activations_are_those_of_variable_length_kernels(tiny_model, batch, monkeypatch, size):
    """On the meta device, which has no norm kernel; ours saves the same tensors."""
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: Norm.apply(x, weight, eps))
    model, config = tiny_model(**SIZES[size]).train().to("meta").to(torch.bfloat16), LossConfig()
    kernels = Kernels(attention="varlen")
    model.use(kernels)
    config.points.num_points = 300
    said = activation_bytes(
        model.config, of_batch(batch), element=2, num_points=300, checkpointing="none", kernels=kernels
    )
    assert said.total == pytest.approx(saved_bytes(model, batch.to("meta"), config), rel=0.15)


def test_checkpointing_keeps_one_map_in_place_of_what_is_recomputed(tiny_model, batch):
    architecture, work = tiny_model(**SIZES["small"]).config, of_batch(batch)
    whole, half, thin = (
        activation_bytes(architecture, work, element=4, num_points=300, checkpointing=kind) for kind in CHECKPOINTING
    )
    layers, slots = SIZES["small"]["num_hidden_layers"], work.rows * work.tokens_per_row
    key_value = architecture.num_key_value_heads * architecture.head_dim
    # A norm's input, one number and its output; queries, attention output, keys and values, a log-sum per head.
    attention = 2 * 64 + 1 + 2 * 64 + 2 * key_value + architecture.num_attention_heads
    norm_and_swiglu = 2 * 64 + 1 + 2 * 176
    ends = 4 * slots * (layers * (attention + norm_and_swiglu)) - whole.decoder
    again = norm_and_swiglu + 2 * 176  # and the plain way's two further maps, in one layer at a time
    assert half.decoder + ends == pytest.approx(4 * slots * (layers * (attention + 64) + again))
    assert thin.decoder + ends == pytest.approx(4 * slots * (layers * 64 + attention + again))
    assert thin.mask_head == half.mask_head == whole.mask_head
    assert thin.dense_masks == whole.dense_masks == 0


@pytest.mark.usefixtures("as_large_images")
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_recomputed_operations_equal_the_count_of_torch(tiny_model, batch, checkpointing):
    """The backward pass with and without it, products alone."""
    model, counted = tiny_model(**SIZES["small"]).train(), []
    for kind in ("none", checkpointing):
        model.use(Kernels(), kind)
        loss = loss_of(model, batch, LossConfig())
        with counted_operations() as counter:
            loss.backward()
        counted.append(counter.get_total_flops())
    said = training_flops(
        forward_flops(model.config, of_batch(batch), {}, Kernels()), model.config, checkpointing=checkpointing
    )
    assert said["recomputed"] == pytest.approx(counted[1] - counted[0], rel=0.03)


def test_plain_training_allocates_exactly_these_bytes(tiny_model, batch):
    model = tiny_model().train()
    optimizer = build_optimizer(model, OptimConfig())
    loss_of(model, batch, LossConfig()).backward()
    gradients = sum(p.grad.nbytes for p in model.parameters())
    optimizer.step()
    moments = sum(s[key].nbytes for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
    count = sum(parameter_counts(model.config, {}).values())
    said = training_state(count, DeepSpeedConfig(enabled=False), precision="fp32", world_size=1, largest_gathered=0)
    held = (sum(p.nbytes for p in model.parameters()), gradients, moments)
    assert held == (said.weights, said.gradients, said.moments)
    assert said.masters == said.buckets == 0


SHARDED = """
import json, sys
import torch
from pixel_sail import dist
from pixel_sail.config import TrainConfig, load_config
from pixel_sail.training.accelerator import build_accelerator
from pixel_sail.training.build import build_model
from pixel_sail.training.optim import build_optimizer

config = load_config("train", TrainConfig, sys.argv[2:])
dist.ensure_launch_environment()
accelerator = build_accelerator(config, 1)
model, _ = build_model(config.model, seed=0, teachers={})
count = sum(p.numel() for p in model.parameters())
engine, optimizer = accelerator.prepare(model, build_optimizer(model, config.optim))
for parameter in engine.module.parameters():
    parameter.grad = None
sharded = optimizer.optimizer
state = sharded.optimizer.state
masters = sum(flat.nbytes for flat in sharded.single_partition_of_fp32_groups)
tokens = torch.zeros(1, 4, dtype=torch.long)
loss = engine(tokens, torch.zeros(2, 1, 4), tokens, tokens, tokens.bool(), tokens - 1, tokens - 1,
    torch.zeros(0, 768, dtype=torch.uint8)).zero_loss
accelerator.backward(loss)
moments = sum(s[key].nbytes for s in state.values() for key in ("exp_avg", "exp_avg_sq"))
weights = sum(p.nbytes for p in engine.module.parameters())
if dist.rank() == 0:
    open(sys.argv[1], "w").write(json.dumps([count, weights, masters, moments]))
dist.shutdown()
"""


@pytest.mark.slow
def test_zero_2_in_bf16_shares_masters_and_moments_over_two_processes(data_root, tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    overrides = (
        *("experiment=quickstart", "optim=adamw", "deepspeed=zero2", "distillation=none"),
        *("optim.precision=bf16", "data.micro_batch_size=1"),
    )
    done = start([*launcher("torchrun"), str(script), str(tmp_path / "held.json"), *overrides], data_root)
    assert done.returncode == 0, done.stderr[-3000:]
    count, weights, masters, moments = json.loads((tmp_path / "held.json").read_text())
    said = training_state(count, DeepSpeedConfig(stage=2), precision="bf16", world_size=2, largest_gathered=0)
    # DeepSpeed pads every group to a multiple of the processes and of its alignment.
    assert weights == said.weights
    assert masters == pytest.approx(said.masters, abs=64) and masters >= said.masters
    assert moments == pytest.approx(said.moments, abs=128)


def test_a_checkpoint_has_the_planned_size(data_root, tmp_path):
    command = [
        sys.executable,
        "scripts/train.py",
        "experiment=quickstart",
        "optim=adamw",
        "distillation=none",
        f"run_dir={tmp_path}",
    ]
    done = start(
        [
            *command,
            "deepspeed=none",
            "optim.steps=1",
            "evals=[]",
            "data.global_batch_size=2",
            "data.micro_batch_size=2",
        ],
        data_root,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "checkpoints").iterdir()
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    architecture = Architecture(**{key: config[key] for key in vars(Architecture())})
    said = checkpoint_bytes(sum(parameter_counts(architecture, {}).values()))
    assert said == pytest.approx(sum(path.stat().st_size for path in folder.iterdir()), rel=0.15)


def tool():
    return load_tool("plan_run")


def test_the_tool_measures_existing_data_and_reports_it(data_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIXEL_SAIL_DATA", str(data_root))
    out = tmp_path / "plan.json"
    assert tool().main(["experiment=quickstart", "gpu=cpu", "gpus=2", "sequences=8", "--json", str(out)]) == 0
    plan = json.loads(out.read_text())
    steps = load_config("train", TrainConfig, ["experiment=quickstart"]).optim.steps
    assert plan["data"]["source"] == "measured" and plan["data"]["samples"] == 16 and plan["data"]["masks"] > 16
    said = capsys.readouterr().out
    assert "measured on the data" in said and "a step: 16 sequences, 16.0 samples expected" in said
    assert plan["length"]["passes"] == pytest.approx(steps * 16 / plan["length"]["items"])
    assert plan["time"]["hours"] == pytest.approx(plan["flops"]["step"] * steps / (2 * 0.4 * 0.1e12) / 3600)
    assert [row["sharding"] for row in plan["memory"] if row["chosen"]] == ["none"]


def test_the_tool_states_its_assumptions_where_data_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIXEL_SAIL_DATA", str(tmp_path / "nothing"))
    assert tool().main(["model=sail_0_5b", "data=refcoco", "gpus=8", "masks_per_image=7", "--json", "-"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["data"]["source"] == "assumed" and plan["assumptions"]["masks_per_image"] == 7
    assert plan["parameters"]["total"] == pytest.approx(0.506e9, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["gpu=abacus"], "abacus"), (["gpus=3"], "multiple of"), (["mfu=2"], "mfu 2")],
)
def test_a_wrong_machine_is_rejected_by_name(arguments, named, capsys):
    assert tool().main(["model=sail_0_5b", "data=refcoco", "sequences=0", *arguments]) == 2
    assert named in capsys.readouterr().err


def test_assumed_samples_have_the_grid_of_their_image():
    architecture = Architecture(patch_size=16)
    work = assumed_sample(architecture, (480, 640), text_tokens=100, supervised=50, masks=4)
    # 480 x 640 is a grid of 30 x 40.
    assert (work.samples, work.real_tokens, work.num_masks) == (1, 1302, 4)
    assert work.seen_pairs == 1202**2 + 100 * 1202 + 5050
