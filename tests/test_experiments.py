"""Every experiment with every ablation: the table of docs/ablations.md lists the valid pairs; others raise a named
error.

Valid pairs compose, match the functions they name, and take a step with all losses, each distinct model once
and on meta tensors, so that the paper's sizes need no memory.
"""

import re
from dataclasses import dataclass, replace
from fnmatch import filter as matching_names
from functools import cache

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from running import ROOT
from test_configs import bind_targets, names
from torch._subclasses.fake_tensor import FakeTensorMode

from pixel_sail.config import CONFIG_FOLDER, ConfigError, TrainConfig, build, load_config
from pixel_sail.data.mixture import Mixture
from pixel_sail.losses.distill import DistillTerm
from pixel_sail.losses.total import combine, count, loss_sums
from pixel_sail.model.configuration_pixel_sail import PixelSailConfig
from pixel_sail.model.mask_head import PointLogits
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.model.tokenization import model_token_ids
from pixel_sail.training.build import add_training_parts

EXPERIMENTS = names("experiment")
ABLATIONS = names("ablation")
CARDS = [name for name in EXPERIMENTS if name.startswith("pixel_sail_")]


def named(text, there):
    """Return the names that match the patterns of a cell, `stride_2` or `data_*`."""
    found = [name for pattern in re.findall(r"`([^`]+)`", text) for name in matching_names(there, pattern)]
    assert found, f"docs/ablations.md: {text!r} names none of {there}"
    return found


def experiments_of(cell):
    """Return the experiments of a cell, for example "all but `pixel_sail_7b`"."""
    if not cell.startswith("all"):
        return set(named(cell, EXPERIMENTS))
    return set(EXPERIMENTS) - (set(named(cell, EXPERIMENTS)) if " but " in cell else set())


@cache
def taken_by():
    """Return the experiments that accept each ablation according to the page."""
    rows = re.findall(r"^\|[^|]*\| ([^|]*`[^|]*) \| ([^|]+) \|$", (ROOT / "docs" / "ablations.md").read_text(), re.M)
    pairs = [(name, experiments_of(cell)) for files, cell in rows for name in named(files, ABLATIONS)]
    assert sorted(name for name, _ in pairs) == ABLATIONS, "docs/ablations.md must name every ablation once"
    return dict(pairs)


@cache
def unresolved(experiment):
    """Return the composed config of an experiment before its ablation is merged."""
    with initialize_config_dir(str(CONFIG_FOLDER), version_base=None):
        composed = compose("train", [f"experiment={experiment}"])
    OmegaConf.set_struct(composed, False)
    return composed


def composed(experiment, ablation):
    """Return what `load_config` returns, without Hydra (ten times as slow) if only a merge is needed."""
    change = OmegaConf.load(CONFIG_FOLDER / "ablation" / f"{ablation}.yaml")
    if "defaults" in change:
        return load_config("train", TrainConfig, [f"experiment={experiment}", f"ablation={ablation}"])
    merged = OmegaConf.merge(unresolved(experiment), change)
    OmegaConf.resolve(merged)
    if missing := OmegaConf.missing_keys(merged):
        raise ConfigError(f"no value for {sorted(missing)}")
    return OmegaConf.to_object(merged)


@cache
def outcome(experiment, ablation):
    """Return the config, or the error raised before a model or file is read."""
    try:
        config = composed(experiment, ablation)
        PixelSailConfig.from_architecture(config.model.architecture)
        for name, node in config.data.sources.items():
            if "_target_" not in node:
                build(node, f"data.sources.{name}")
        data = config.data
        sources = {name: [None] for name in data.sources}
        Mixture(sources, data.repeats, seed=0, weights=data.weights, epoch_samples=data.epoch_samples)
    except ValueError as error:
        return error
    bind_targets(config.data.sources)
    bind_targets({name: own.model for name, own in config.distillation.items()})
    return config


@pytest.mark.parametrize("ablation", ["stride_8", "teacher_weight_1", "language_blind", "data_more_chat"])
def test_merging_an_ablation_here_is_composing_it(ablation):
    (experiment, *_) = sorted(taken_by()[ablation])
    overrides = [f"experiment={experiment}", f"ablation={ablation}"]
    assert composed(experiment, ablation) == load_config("train", TrainConfig, overrides)


NAMES_WHAT_IS_WRONG = r"^(model: \w+|data\.sources\.\w+:|no value for \['distillation\.\w+\.model|.*llava_mix665k)"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_takes_the_ablations_of_the_table_and_rejects_the_others_by_name(experiment):
    wrong = {}
    for ablation in ABLATIONS:
        found = outcome(experiment, ablation)
        if isinstance(found, ValueError) == (experiment in taken_by()[ablation]):
            wrong[ablation] = found if isinstance(found, ValueError) else "taken, but not so in the table"
        elif isinstance(found, ValueError):
            assert re.match(NAMES_WHAT_IS_WRONG, str(found)), f"{ablation}: {found}"
    assert not wrong


def distinct_models():
    """Return one configuration for every different architecture with its teachers, by where it was met first."""
    found = {}
    for experiment in EXPERIMENTS:
        base = load_config("train", TrainConfig, [f"experiment={experiment}"])
        for ablation in (None, *ABLATIONS):
            config = base if ablation is None else outcome(experiment, ablation)
            if isinstance(config, ValueError):
                continue
            teachers = [(name, own.site, own.channels, own.loss) for name, own in sorted(config.distillation.items())]
            found.setdefault(str((config.model.architecture, teachers)), (f"{experiment} {ablation}", config))
    return list(found.values())


@dataclass(frozen=True)
class Sampling:
    """Builds a batch of one image with a marked region and two masks, for any architecture."""

    tokenizer: object
    make_sample: object
    make_batch: object

    def batch(self, architecture, teachers):
        config = PixelSailConfig.from_architecture(architecture)
        sampled = self.make_sample(np.random.default_rng(0), size_hw=(64, 96), masks_per_turn=(2,), prompts=(3,))
        example = PixelSailProcessor.for_model(self.tokenizer, config).encode_sample(*sampled, independent_turns=False)
        # Features of any size: targets are passed to the losses.
        return replace(
            self.make_batch([example]),
            teacher_names=tuple(teachers),
            teacher_images=(0,) * len(teachers),
            teacher_maps=tuple(torch.zeros(1, 1, 1) for _ in teachers),
            teacher_scales=(None,) * len(teachers),
        )


def step(config, sampling):
    """Make the forward pass, all losses and the backward pass; return the parameters without a gradient of their own
    shape."""
    token_ids = model_token_ids(sampling.tokenizer, num_visual_prompts=config.model.architecture.num_visual_prompts)
    architecture = replace(config.model.architecture, vocab_size=151_680, token_ids=token_ids, num_hidden_layers=2)
    batch = sampling.batch(architecture, sorted(config.distillation))
    terms = [DistillTerm(name=name, loss=own.loss) for name, own in sorted(config.distillation.items())]
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = PixelSailForSegmentation(PixelSailConfig.from_architecture(architecture)).train()
    # Outside the mode: layers created without initialization cannot be created within it.
    add_training_parts(model, config.model.lora, seed=0, teachers=config.distillation)
    with FakeTensorMode(allow_non_fake_inputs=True):
        output = model(**batch.training_inputs())
        maps = {name: [torch.zeros(own.channels, 8, 8)] for name, own in config.distillation.items()}
        sums = loss_sums(output, batch, config.loss, terms, maps)
        loss = combine(sums, count(batch, terms), config.loss, terms) + output.zero_loss
        loss.backward()
    assert sums.distill_SX.shape == (1, len(terms)) and loss.shape == ()
    (masks,) = output.mask_logits
    map_hw = masks.pixel_embed_YXC.shape[:2] if isinstance(masks, PointLogits) else masks.shape[1:]
    assert len(masks) == 2
    assert tuple(map_hw) == tuple(cells * 2**architecture.num_upsample_blocks for cells in batch.grids[0])
    return [name for name, own in model.named_parameters() if own.grad is None or own.grad.shape != own.shape]


def test_every_different_model_with_its_teachers_makes_a_step(tokenizer, make_sample, make_batch):
    """Two layers, as all layers are alike; other sizes are those of the experiments."""
    sampling = Sampling(tokenizer=tokenizer, make_sample=make_sample, make_batch=make_batch)
    models = distinct_models()
    assert len(models) > 60
    for where, config in models:
        assert step(config, sampling) == [], where
