"""`data.details` sets every option in which sources follow the release, and is recorded with the run."""

import inspect
import json
from dataclasses import asdict

import pytest
from hydra.utils import get_method
from omegaconf import OmegaConf

from pixel_sail.config import CONFIG_FOLDER, ConfigError, TrainConfig, load_config
from pixel_sail.data.details import DETAIL_CHOICES, is_released
from pixel_sail.training.checkpoint import differing_leaves, with_defaults
from pixel_sail.training.prepare import build_mixture, identity_defaults, run_identity

FILES = sorted((CONFIG_FOLDER / "source").glob("*.yaml"))
OPTIONS = {
    "coco_panoptic": {"class_names", "crowds", "many_instances"},
    "coco_semantic": {"class_names", "crowds"},
    "coco_vp": {"class_names", "candidates"},
    "grandf": {"templates"},
    "flickr_gcg": {"templates"},
    "refcocog_gcg": {"templates", "letters"},
    "llava": {"long_conversations"},
    "osprey": {"absent_questions"},
    "reasonseg": {"templates", "ignored_pixels"},
    "refcocog_vp": {"templates"},
    "refer": {"expression_sampling"},
    "muse": set(),
    "pix2cap_seg": set(),
    "pix2cap_vp": set(),
    "sam_captions": set(),
}
"""By the module of the source."""


def config_of(*overrides):
    return load_config("train", TrainConfig, ["name=x", *overrides])


@pytest.fixture(scope="module")
def all_sources():
    """Return a function that gives the sources of every file of configs/source."""

    def sources_of(*overrides):
        names = ",".join(path.stem for path in FILES)
        return config_of(f"+source@data.sources=[{names}]", *overrides).data.sources

    return sources_of


def test_every_option_of_every_source_follows_the_setting(all_sources):
    for path in FILES:
        ((name, node),) = OmegaConf.to_container(OmegaConf.load(path), resolve=False).items()
        given = {key for key, value in node.items() if value == "${data.details}"}
        loader = get_method(node["_target_"])
        named = {key for key, argument in inspect.signature(loader).parameters.items() if argument.default == "ours"}
        assert given == named == OPTIONS[node["_target_"].split(".")[-2]], name
    for setting in DETAIL_CHOICES:
        for node in all_sources(f"data.details={setting}").values():
            options = OPTIONS[node["_target_"].split(".")[-2]]
            assert {node[option] for option in options} <= {setting}


def test_the_default_is_what_the_loaders_do_by_themselves():
    assert config_of().data.details == "ours"
    assert not is_released("x", "y", "ours") and is_released("x", "y", "released")


def test_one_detail_is_set_alone():
    sources = config_of("data=cotrain_0_5b", "data.sources.coco_vp.candidates=released").data.sources
    assert (sources["coco_vp"]["candidates"], sources["coco_vp"]["class_names"]) == ("released", "ours")
    sources = config_of(
        "data=cotrain_0_5b", "data.details=released", "data.sources.coco_vp.candidates=ours"
    ).data.sources
    assert (sources["coco_vp"]["candidates"], sources["coco_vp"]["class_names"]) == ("ours", "released")


def test_a_wrong_value_is_named():
    with pytest.raises(ConfigError, match=r"data\.details is 'mine', expected one of"):
        config_of("data.details=mine")
    with pytest.raises(ValueError, match="source refcoco: found expression_sampling 'mine', expected one of"):
        is_released("refcoco", "expression_sampling", "mine")


@pytest.mark.parametrize("setting", DETAIL_CHOICES)
def test_every_kind_of_source_gives_samples_with_either_setting(data_root, monkeypatch, setting):
    monkeypatch.setenv("PIXEL_SAIL_DATA", str(data_root))
    # The question is the expression alone.
    config = config_of("data=refshapes_all", f"data.details={setting}", "+data.sources.refshapes.question_style=short")
    mixture = build_mixture(config.data, seed=0)
    names = {mixture.item(position).source_name for position in range(0, mixture.epoch_length, 3)}
    assert names == set(config.data.sources)
    positions = [p for p in range(300) if mixture.stream_item(p).source_name == "refshapes"]
    asked = [[turn.question for turn in mixture.item(p).sample.turns] for p in positions]
    assert any(len(set(texts)) < len(texts) for texts in asked) == (setting == "released")


# The identity of a run


def identity_of(config):
    return json.loads(json.dumps(run_identity(asdict(config))))


def without_new_keys(identity):
    """Return the identity of a run older than the setting and its options."""
    data = {key: value for key, value in identity["data"].items() if key != "details"}
    data["sources"] = {
        name: {key: value for key, value in node.items() if value not in DETAIL_CHOICES}
        for name, node in data["sources"].items()
    }
    return {**identity, "data": data}


def differing(saved, config):
    defaults = identity_defaults(config)
    return dict(differing_leaves(with_defaults(saved, defaults), with_defaults(identity_of(config), defaults)))


def test_a_run_older_than_a_key_resumes_with_its_default():
    config = config_of("data=cotrain_0_5b")
    saved = without_new_keys(identity_of(config))
    assert len(dict(differing_leaves(saved, identity_of(config)))) > 15
    assert differing(saved, config) == {}
    changed = config_of("data=cotrain_0_5b", "data.details=released")
    found = differing(saved, changed)
    assert found["data.details"] == found["data.sources.grefcoco.expression_sampling"] == ("ours", "released")
    alone = config_of("data=cotrain_0_5b", "data.sources.refcoco.expression_sampling=released", "seed=3")
    assert differing(saved, alone) == {"data.sources.refcoco.expression_sampling": ("ours", "released"), "seed": (0, 3)}


def test_a_key_at_its_default_is_the_same_as_none_but_a_mapping_is_compared_as_it_is():
    plain, stated = (
        config_of("data=ablation_pix2cap"),
        config_of("data=ablation_pix2cap", "+data.sources.pix2cap_vp.regions_per_sample=5"),
    )
    assert differing(identity_of(plain), stated) == differing(identity_of(stated), plain) == {}
    marks = config_of("data=ablation_pix2cap", "+data.sources.pix2cap_vp.prompt_fractions={box: 1.0}")
    both = config_of("data=ablation_pix2cap", "+data.sources.pix2cap_vp.prompt_fractions={box: 1.0, mask: 1.0}")
    assert list(differing(identity_of(marks), both)) == ["data.sources.pix2cap_vp.prompt_fractions.mask"]
