"""The configs of the visual-prompt and chat sources find their files, and samples are tokenized."""

import pickle
import shutil
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from region_samples import get

from pixel_sail.config import CONFIG_FOLDER
from pixel_sail.data.images import load_image
from pixel_sail.data.templates.region import SINGLE_WORD_SUFFIX


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXEL_SAIL_CACHE", str(tmp_path / "cache"))


FILES = {
    "osprey_conversation": ("osprey/osprey_conversation.json", "osprey-724k/osprey_conversation.json"),
    "osprey_part_level": ("osprey/osprey_conversation.json", "osprey-724k/osprey_part_level.json"),
    "osprey_positive_negative": ("osprey/osprey_conversation.json", "osprey-724k/osprey_lvis_positive_negative.json"),
    "osprey_short_form": ("osprey/osprey_short_form.json", "osprey-724k/osprey_short_form.json"),
    "osprey_detail": ("osprey/osprey_detail_description.json", "osprey-724k/osprey_detail_description.json"),
    "refcocog_vp": ("refshapes", "ref_seg/refcocog"),
    "sam_captions": ("perbench/STBench_Detailed_Caption.json", "perbench/object_caption_data_train_split.json"),
    "llava_mix665k": ("llava/llava_v1_5_mix665k.json", "llava_data/LLaVA-Instruct-150K/llava_v1_5_mix665k.json"),
}
"""Path of the synthetic file, and the path where the config expects the real one."""


@pytest.mark.parametrize("name", FILES)
def test_the_config_reads_files_in_their_places_and_samples_become_tokens(data_root, tmp_path, processor, name):
    sampled = data_root / "refshapes"
    origin, place = (Path(path) for path in FILES[name])
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).symlink_to(sampled / origin)
    if name == "refcocog_vp":
        (tmp_path / place).unlink()
        shutil.copytree(sampled / origin, tmp_path / place)
        (tmp_path / place / "refs(unc).p").rename(tmp_path / place / "refs(umd).p")
    images = ["coco/train2017", "ref_seg/images/train2014", "perbench/images", "llava_data/llava_images/train2014"]
    for folder in images:
        (tmp_path / folder).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / folder).symlink_to(sampled / "images/train2014")
    config = OmegaConf.load(CONFIG_FOLDER / "source" / f"{name}.yaml")
    source = instantiate(OmegaConf.merge({"paths": {"data": str(tmp_path)}, "data": {"details": "ours"}}, config)[name])
    assert source.name == name and len(source) >= 3
    copy = pickle.loads(pickle.dumps(source))  # what a worker process receives
    for index in range(len(source)):
        sample = get(source, index)
        assert [turn.answer for turn in get(copy, index).turns] == [turn.answer for turn in sample.turns]
        assert source.image_path(index) == sample.image_path
        image = None
        if sample.image_path is not None:
            image = load_image(sample.image_path, where=sample.sample_id, expected_hw=sample.image_hw)
        example = processor.encode_sample(sample, image, independent_turns=False)
        painted = set(example.prompt_ids_T.tolist()) - {-1}
        assert painted == {prompt.prompt_id for prompt in sample.prompts}
        if name != "llava_mix665k":
            assert painted
            assert (SINGLE_WORD_SUFFIX in sample.turns[-1].question) == (name == "osprey_short_form")
