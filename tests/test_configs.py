"""Every config file composes, fits its schema, and names existing functions with arguments that they accept."""

import ast
import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hydra.utils import get_method
from shared_data import SHARED_CONFIGS

from pixel_sail.config import CONFIG_FOLDER, ConfigError, EvalConfig, PredictConfig, TrainConfig, load_config
from pixel_sail.model.configuration_pixel_sail import PixelSailConfig
from pixel_sail.refshapes.focus import FOCI
from pixel_sail.sweep.checks import checked_config
from pixel_sail.sweep.grid import expand
from pixel_sail.training.accelerator import deepspeed_dictionary
from pixel_sail.types import DataError


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_FOLDER / group).glob("*.yaml"))


def bind_targets(nodes: dict[str, dict]) -> None:
    for name, node in nodes.items():
        arguments = {key: value for key, value in node.items() if key != "_target_"}
        try:
            inspect.signature(get_method(node["_target_"])).bind(**arguments)
        except TypeError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("experiment", names("experiment"))
def test_every_experiment_composes_and_binds(experiment):
    config = load_config("train", TrainConfig, [f"experiment={experiment}"])
    assert config.name == experiment
    bind_targets(config.data.sources)
    bind_targets(config.evals)
    PixelSailConfig.from_architecture(config.model.architecture)


@pytest.mark.parametrize("name", names("model"))
def test_every_model_has_sizes_that_fit_together(name):
    architecture = load_config("train", TrainConfig, ["name=x", f"model={name}"]).model.architecture
    assert PixelSailConfig.from_architecture(architecture).head_dim * architecture.num_attention_heads == (
        architecture.hidden_size
    )


@pytest.mark.parametrize("name", names("data"))
def test_every_data_mixture_names_sources_that_bind(name):
    data = load_config("train", TrainConfig, ["name=x", f"data={name}"]).data
    assert data.sources
    bind_targets(data.sources)


EVAL_GROUPS = {
    "refcoco_family": [
        *(f"{dataset}_{split}" for dataset in ("refcoco", "refcoco_plus") for split in ("val", "testA", "testB")),
        *("refcocog_val", "refcocog_test"),
        *(f"grefcoco_{split}" for split in ("val", "testA", "testB")),
    ],
    "perbench": ["perbench_caption", "perbench_choice", "perbench_visual_referring"],
    "refshapes_kinds": [f"refshapes_val_{focus}" for focus in FOCI],
}
EVAL_GROUPS["paper"] = [*EVAL_GROUPS["refcoco_family"], "refcocog_region_caption", *EVAL_GROUPS["perbench"]]


@pytest.mark.parametrize("name", EVAL_GROUPS)
def test_a_group_of_evals_is_named_like_one(name):
    evals = load_config("evaluate", EvalConfig, ["checkpoint=x", f"evals={name}"]).evals
    assert list(evals) == EVAL_GROUPS[name]
    beside = load_config("evaluate", EvalConfig, ["checkpoint=x", f"evals=[gcg_val,{name}]"]).evals
    assert beside == {"gcg_val": beside["gcg_val"], **evals}


@pytest.mark.parametrize("name", sorted(set(names("evals")) - set(EVAL_GROUPS)))
def test_every_eval_binds_and_carries_its_own_name(name):
    evals = load_config("evaluate", EvalConfig, ["checkpoint=x", f"evals=[{name}]"]).evals
    assert list(evals) == [name]
    bind_targets(evals)


@pytest.mark.parametrize("experiment", names("experiment"))
def test_every_experiment_composes_as_released(experiment):
    config = load_config("train", TrainConfig, [f"experiment={experiment}", "recipe=released"])
    assert (config.name, config.model.architecture.mask_stride, config.optim.decay_all) == (experiment, 2, True)
    assert (config.optim.precision, config.data.decontamination.enabled) == ("bf16", False)
    PixelSailConfig.from_architecture(config.model.architecture)


def test_an_ablation_and_the_command_line_change_one_thing_of_a_recipe_and_a_stage_does_not():
    card = "experiment=pixel_sail_0_5b"
    changed = load_config("train", TrainConfig, [card, "recipe=released", "ablation=stride_4", "optim.precision=fp32"])
    assert (changed.model.architecture.mask_stride, changed.optim.precision) == (4, "fp32")
    assert changed.optim.decay_all
    staged = load_config("train", TrainConfig, ["stage=pretrain", "model=sail_0_5b", "recipe=released"])
    assert staged.model.architecture.mask_stride == 2
    assert staged.name == "stage_pretrain_sail_0_5b"


def test_a_decontamination_group_beside_the_recipe_is_rejected_and_a_key_takes_it_back():
    card, group = (
        ["experiment=pixel_sail_0_5b", "recipe=released"],
        "decontamination@data.decontamination=refcoco_family",
    )
    assert not load_config("train", TrainConfig, card).data.decontamination.enabled
    with pytest.raises(ConfigError, match=r"has no effect.*add data\.decontamination\.enabled=true"):
        load_config("train", TrainConfig, [*card, group])
    kept = load_config("train", TrainConfig, [*card, group, "data.decontamination.enabled=true"])
    assert kept == load_config("train", TrainConfig, [*card, "data.decontamination.enabled=true"])
    assert len(kept.data.decontamination.held_out) == 4


def test_an_evaluation_as_released_is_another_half_of_the_same_recipe():
    plain = load_config("evaluate", EvalConfig, ["checkpoint=x", "evals=paper"])
    config = load_config("evaluate", EvalConfig, ["checkpoint=x", "evals=paper", "recipe=released"])
    assert config.precision == "bf16"
    assert config.predict == PredictConfig(max_new_tokens=512, prompt="paper", mask="first", answer="generated")
    assert replace(config, precision=plain.precision, predict=plain.predict) == plain
    one = load_config("evaluate", EvalConfig, ["checkpoint=x", "recipe=released", "predict.max_new_tokens=32"])
    assert (one.predict.max_new_tokens, one.predict.prompt) == (32, "paper")


def test_a_recipe_goes_with_experiments_of_another_folder_and_is_swept():
    config = load_config("train", TrainConfig, ["experiment=refer_mini", "recipe=released", *SHARED_CONFIGS])
    assert (config.name, config.optim.decay_all) == ("refer_mini", True)
    jobs = expand(["experiment=quickstart", "recipe=released", "ablation=stride_4,stride_8"])
    assert [checked_config(job).model.architecture.mask_stride for job in jobs] == [4, 8]


def test_a_recipe_that_does_not_exist_is_an_error_that_lists_those_that_do():
    with pytest.raises(ConfigError, match=r"(?s)recipe/nobody.*released"):
        load_config("evaluate", EvalConfig, ["checkpoint=x", "recipe=nobody"])


def test_null_for_a_group_is_an_error_that_says_how_to_remove_it():
    with pytest.raises(ConfigError, match=r"'recipe=null'.*omit it, or put ~ before its name"):
        load_config("train", TrainConfig, ["name=x", "recipe=null"])
    assert load_config("train", TrainConfig, ["name=x", "~recipe"]) == load_config("train", TrainConfig, ["name=x"])


@pytest.mark.parametrize("name", names("deepspeed"))
def test_the_deepspeed_dictionary_leaves_nothing_to_auto(name):
    config = load_config("train", TrainConfig, ["name=x", f"deepspeed={name}"])
    assert "auto" not in str(deepspeed_dictionary(config, 2))


def test_the_accumulation_of_micro_batches_is_written_into_the_deepspeed_dictionary():
    config = load_config("train", TrainConfig, ["name=x", "data.micro_batch_size=4", "optim.max_grad_norm=0.5"])
    written = deepspeed_dictionary(config, 3)
    assert written["train_batch_size"] == 12
    assert written["gradient_accumulation_steps"] == 3
    assert written["gradient_clipping"] == 0.5


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optim.lerning_rate=1", "optim.lerning_rate"),
        ("model.architecture.hidden=64", "model.architecture.hidden"),
        ("optim.steps=many", "many"),
        ("optim.precision=fp8", "fp8"),
        ("deepspeed.stage=4", "4"),
        ("model=giant", "giant"),
        ("predict.mask=last", "last"),
    ],
)
def test_a_wrong_key_or_value_is_an_error_that_names_it(override, named):
    with pytest.raises(ConfigError, match=named):
        load_config("train", TrainConfig, ["name=x", override])


def test_a_missing_value_is_an_error_that_names_its_key():
    with pytest.raises(ConfigError, match="name"):
        load_config("train", TrainConfig, [])


def values(node):
    """Yield every string of a config except its defaults list, which names other configs."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from () if key == "defaults" else values(value)
    elif isinstance(node, list):
        for value in node:
            yield from values(value)
    elif isinstance(node, str):
        yield node


PLACE = re.compile(r"/(?:home|mnt|root|work)/\S*|(?<!\.)\.\./\S*|~/\S*|\$\{oc\.env:[^}]*\}?")


def machine_paths(text: str) -> list[str]:
    """Return the machine-specific paths in a config file that do not use `paths`."""
    # Also in comments, whose commands a user copies.
    return PLACE.findall(text) + [value for value in values(yaml.safe_load(text)) if value.startswith("/")]


def test_no_config_but_paths_holds_a_machine_path():
    found = {path: machine_paths(path.read_text()) for path in CONFIG_FOLDER.rglob("*.yaml")}
    assert {path.parent.name for path, places in found.items() if places} == {"paths"}


@pytest.mark.parametrize(
    "text",
    [
        "s: {root: /data/coco}",
        "s: {image_dirs: [coco, /srv/coco]}",
        "s: {root: ../data/coco}",
        "s: {root: '${paths.data}/../coco'}",
        "s: {root: ~/coco}",
        "s: {root: '${oc.env:COCO,coco}'}",
        "s: {root: '${oc.env:COCO,../coco}/train2014'}",
        "# python tools/x.py --out /home/me/x\ns: {}",
    ],
)
def test_a_machine_specific_path_in_a_config_is_found(text):
    assert machine_paths(text)


def test_other_slashes_in_a_config_are_none():
    text = "# a/b, 1 / 2, 3/4 ...\ndefaults:\n  - /source@sources: [refcoco]\n  - /data/x\ns: {root: '${paths.data}/a'}"
    assert machine_paths(text) == []


def test_no_help_of_a_program_names_a_place_outside_of_the_repository():
    programs = [path for folder in ("scripts", "tools") for path in (CONFIG_FOLDER.parent / folder).glob("*.py")]
    texts = {path: ast.get_docstring(ast.parse(path.read_text())) or "" for path in programs}
    assert len(texts) > 20
    assert {path: PLACE.findall(text) for path, text in texts.items() if PLACE.search(text)} == {}


def test_configs_are_where_the_package_looks_for_them():
    assert Path(__file__).resolve().parent.parent / "configs" == CONFIG_FOLDER


@pytest.mark.parametrize(
    "setting",
    [
        *("optim.lr=-1", "optim.lr=nan", "optim.lr=inf", "optim.betas=[1,2]", "optim.max_grad_norm=nan"),
        *("optim.weight_decay=-1", "data.micro_batch_size=0", "data.stream_rounds=0", "data.num_workers=-1"),
        *(
            "data.max_skipped_fraction=nan",
            "data.max_skipped_fraction=-1",
            "model.vocab_multiple=0",
            "model.lora.alpha=nan",
        ),
        *("seed=-1", "seed=100000000000", "log.every=0", "validation.every=-1", "watchdog.limit_s=nan"),
        *("loss.points.importance_ratio=2", "loss.points.num_points=0", "run_dir=runs/\udcff"),
    ],
)
def test_a_number_out_of_its_range_is_rejected_by_its_name(setting):
    with pytest.raises((ConfigError, DataError)) as refusal:
        load_config("train", TrainConfig, ["name=x", setting])
    assert setting.partition("=")[0].rpartition(".")[2] in str(refusal.value)
    assert "expected" in str(refusal.value)
