"""Old names: rejected on the command line with a pointer to the new name, translated in files of earlier versions."""

import json

import pytest

from pixel_sail import renamed
from pixel_sail.config import ConfigError, TrainConfig, build, load_config
from pixel_sail.renamed import current_config, current_log_line, hint, renamed_override, with_old_log_keys


@pytest.fixture
def tables(monkeypatch):
    """Names of a fictitious earlier version."""
    monkeypatch.setattr(
        renamed, "CONFIG_KEYS", {"speed.fast": "kernels.quick", "speed": "kernels", "old.*.a": "new.*.b"}
    )
    monkeypatch.setattr(renamed, "CONFIG_GROUPS", {"speed": "kernels", "leak": "clean"})
    monkeypatch.setattr(renamed, "CONFIG_CHOICES", {("speed", "most"): "all"})
    monkeypatch.setattr(renamed, "CONFIG_VALUES", {"kernels.quick": {"yes": True}})
    monkeypatch.setattr(renamed, "TARGETS", {"project.before.": "project.now."})
    monkeypatch.setattr(renamed, "LOG_KEYS", {"total": "loss/total", "distill/*": "loss/distill/*"})


def test_a_saved_configuration_gets_todays_keys_values_and_targets(tables):
    saved = {
        "speed": {"fast": "yes", "other": [1, {"_target_": "project.before.f"}]},
        "old": {"x": {"a": 1, "c": 2}, "y": {"a": 3}},
        "seed": 0,
    }
    before = json.dumps(saved)
    assert current_config(saved) == {
        "kernels": {"quick": True, "other": [1, {"_target_": "project.now.f"}]},
        "old": {"x": {"c": 2}, "y": {}},
        "new": {"x": {"b": 1}, "y": {"b": 3}},
        "seed": 0,
    }
    assert json.dumps(saved) == before
    assert current_config(current_config(saved)) == current_config(saved)


def test_a_key_under_both_names_keeps_the_value_of_the_new_one(tables):
    assert current_config({"speed": {"a": 1, "b": 2}, "kernels": {"a": 3}}) == {"kernels": {"a": 3, "b": 2}}
    assert current_log_line({"total": 1, "loss/total": 2}) == {"loss/total": 2}


def test_a_log_line_gets_todays_keys(tables):
    line = {"step": 1, "total": 2.0, "distill/sam2": 3.0}
    assert current_log_line(line) == {"step": 1, "loss/total": 2.0, "loss/distill/sam2": 3.0}


@pytest.mark.parametrize(
    ("override", "written"),
    [
        ("speed.fast=yes", "kernels.quick=true"),
        ("+speed.other=1", "+kernels.other=1"),
        ("~speed.other", "~kernels.other"),
        ("speed=most", "kernels=all"),
        ("leak@speed.leak=none", "clean@kernels.leak=none"),
        ("old.x.a=1", "new.x.b=1"),
        ("old.x.c=1", None),
        ("seed=1", None),
        ("kernels.quick=true", None),
        ("kernels.quick=yes", "kernels.quick=true"),
        ("speed.model._target_=project.before.f", "kernels.model._target_=project.now.f"),
        ("+a._target_=project.before.f", "+a._target_=project.now.f"),
    ],
)
def test_an_old_override_is_rejected_with_the_new_name(tables, override, written):
    assert renamed_override(override) == written


def test_an_old_key_on_the_command_line_is_rejected_with_the_new_one(monkeypatch):
    monkeypatch.setattr(renamed, "CONFIG_KEYS", {"optim.rate": "optim.lr"})
    with pytest.raises(ConfigError, match=r"found 'optim\.rate=1', which was renamed; write optim\.lr=1"):
        load_config("train", TrainConfig, ["experiment=quickstart", "optim.rate=1"])


@pytest.mark.parametrize("name", ["loss", "perf"])
def test_a_source_is_not_named_like_a_group_of_the_log(name):
    with pytest.raises(ConfigError, match=f"named '{name}', expected a name other than loss"):
        load_config("train", TrainConfig, ["experiment=quickstart", f"+data.sources.{name}={{_target_: x}}"])


def test_a_line_has_earlier_and_current_keys():
    line = {
        "step": 1,
        "loss/total": 2.0,
        "optim/lr/head.muon": 3.0,
        "data/distill/sam2_images": 4,
        "x/distill/sam2": 5.0,
    }
    old = {"total": 2.0, "lr/head.muon": 3.0, "distill/sam2_images": 4}
    assert with_old_log_keys(line) == {**line, **old}
    assert (
        current_log_line(with_old_log_keys(line)) == line == current_log_line({**old, "step": 1, "x/distill/sam2": 5.0})
    )


def test_hydras_message_about_a_file_gets_the_new_name(tables):
    assert hint("Key 'fast' not in 'Speed'\n    full_key: speed.fast\n") == "; speed.fast was renamed to kernels.quick"
    assert hint("Could not override 'speed'. No match in the defaults list.") == "; speed was renamed to kernels"
    assert hint("Could not override 'leak@speed.leak'.") == "; leak@speed.leak was renamed to clean@kernels.leak"
    assert hint("Key 'x' not in 'Speed'") == ""


def test_a_run_with_experts_is_one_with_distillation_today():
    own = {"model": {"_target_": "pixel_sail.experts.sam2.sam2"}, "weight": 0.5}
    drawn = {"model": {"_target_": "pixel_sail.experts.drawn.attributes"}}
    saved = {"experts": {"sam2": own, "drawn_states": drawn, "drawn_pixels": drawn}, "allow_random_experts": True}
    attributes = {"model": {"_target_": "pixel_sail.distillation.attributes.attributes"}}
    assert current_config(saved) == {
        "distillation": {
            "sam2": {"model": {"_target_": "pixel_sail.distillation.sam2.sam2"}, "weight": 0.5},
            "attribute_states": attributes,
            "attribute_pixels": attributes,
        },
        "allow_random_teachers": True,
    }


@pytest.mark.parametrize(
    ("override", "written"),
    [
        ("experts=drawn", "distillation=attributes"),
        ("experts=none", "distillation=none"),
        ("experts.sam2.weight=1", "distillation.sam2.weight=1"),
        ("experts.drawn_states.cache=x", "distillation.attribute_states.cache=x"),
        ("+experts.edges.model={a: 1}", "+distillation.edges.model={a: 1}"),
        ("allow_random_experts=true", "allow_random_teachers=true"),
        ("speed.experts=mixed", "kernels.experts=mixed"),
    ],
)
def test_experts_on_a_command_line_are_rejected_as_distillation(override, written):
    assert (renamed_override(override) or override) == written


def test_an_old_choice_in_a_list_and_an_old_argument_of_a_source_are_rejected_with_the_new_ones(data_root):
    options = ["experiment=quickstart", "evals=[refshapes_val_text_hidden]"]
    with pytest.raises(ConfigError, match="refshapes_val_text_hidden was renamed to refshapes_val_language_blind"):
        load_config("train", TrainConfig, options)
    node = {"_target_": "pixel_sail.data.sources.refer.load", "root": str(data_root / "refshapes"), "hide": "text"}
    with pytest.raises(ConfigError, match=r"hide was renamed to data\.sources\.shapes\.blind_baseline"):
        build(node | {"dataset": "refshapes"}, "data.sources.shapes")
    assert renamed_override("data.sources.a.draws=released") == "data.sources.a.expression_sampling=released"
    assert renamed_override("data.sources.shapes.hide=text") == "data.sources.shapes.blind_baseline=language"


def test_an_old_argument_of_a_source_is_rejected_with_the_new_one():
    node = {"_target_": "pixel_sail.data.sources.coco_vp.load", "prompt_shares": {"box": 1.0}}
    with pytest.raises(ConfigError, match=r"prompt_shares was renamed to data\.sources\.x\.prompt_fractions"):
        build(node, "data.sources.x")


def test_an_old_target_is_refused_with_the_new_one():
    node = {"_target_": "pixel_sail.experts.sam2.sam2", "weights": "x"}
    with pytest.raises(ConfigError, match=r"a\.model: _target_ is .* write pixel_sail\.distillation\.sam2\.sam2"):
        build(node, "a.model")


def test_no_old_name_is_a_name_of_today():
    """A name in both columns would be rejected although it is valid, or translated twice."""
    for old in renamed.CONFIG_KEYS:
        assert renamed.renamed_key(renamed.CONFIG_KEYS[old]) is None, old
    assert not renamed.LOG_KEYS.keys() & set(renamed.LOG_KEYS.values())
    assert not renamed.CONFIG_GROUPS.keys() & set(renamed.CONFIG_GROUPS.values())
