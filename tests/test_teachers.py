"""Teachers: preprocessing equals that of transformers, features equal those of the full models, weights are loaded
strictly."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from shared_data import shared_data
from tiny_teachers import MASK2FORMER, RADIO, SAM2, whole_mask2former, whole_radio, whole_sam2
from torch.nn import functional as F

from pixel_sail.config import ConfigError, TrainConfig, build, load_config
from pixel_sail.distillation.mask2former import mask2former
from pixel_sail.distillation.ours import ours
from pixel_sail.distillation.preprocess import IMAGENET_MEAN, IMAGENET_STD, ShortestEdge, resize_levels
from pixel_sail.distillation.radio import radio
from pixel_sail.distillation.sam2 import sam2
from pixel_sail.distillation.settings import TeacherSettings
from pixel_sail.distillation.teacher import Teacher
from pixel_sail.distillation.teachers import checked_spec, load_teachers
from pixel_sail.model.kernels import REFERENCE
from pixel_sail.model.patches import image_to_patches
from pixel_sail.types import DataError

ONE_LEVEL = 1.001 / 255 / min(IMAGENET_STD)
"""One level of 255 after normalization. Pillow filters in fixed point; sometimes one of its two passes rounds to the
other side, so a few pixels differ by one level and very few by two."""


@pytest.fixture(scope="module")
def images():
    folder = shared_data("coco128_lightly") / "images"
    paths = sorted(folder.rglob("*.jpg"))[:3]
    return [torch.from_numpy(np.array(Image.open(path).convert("RGB"))) for path in paths]


@pytest.fixture
def random_images():
    rng = np.random.default_rng(0)
    return [
        torch.from_numpy(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((60, 80), (50, 90), (60, 80))
    ]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1088)),  # 1066 rounded up to a multiple of 32
        ((427, 640), (800, 1216)),  # 1199
        ((640, 427), (1216, 800)),
        ((800, 800), (800, 800)),
        ((500, 2000), (352, 1344)),  # the long side would be 3200: 333 x 1333 instead
        ((800, 1000), (800, 1024)),
    ],
)
def test_sizes_of_mask2former_by_hand(size, expected):
    assert ShortestEdge(short=800, long=1333, divisor=32)(size) == expected


def test_sizes_are_those_of_transformers():
    from transformers.image_transforms import get_resize_output_image_size, get_size_with_aspect_ratio

    rng = np.random.default_rng(1)
    for height, width in rng.integers(30, 2500, (300, 2)).tolist():
        found = ShortestEdge(short=800, long=1333)((height, width))
        assert found == get_size_with_aspect_ratio((height, width), 800, 1333)
        image = np.empty((3, height, width), dtype=np.uint8)
        expected = get_resize_output_image_size(image, 768, default_to_square=False)
        assert ShortestEdge(short=768)((height, width)) == tuple(expected)


def test_mask2former_sees_what_the_processor_of_transformers_makes(images):
    processor = transformers.models.mask2former.image_processing_pil_mask2former.Mask2FormerImageProcessorPil()
    preprocessing = mask2former(random=True, architecture=MASK2FORMER).preprocessing
    for image in images:
        expected = processor(Image.fromarray(image.numpy()), return_tensors="pt")["pixel_values"][0]
        found = preprocessing(image)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 2 * ONE_LEVEL
        assert (found - expected).abs().mean() < 0.05 * ONE_LEVEL


def test_sam2_sees_what_the_settings_of_its_processor_make_of_an_image(images):
    processor = transformers.models.mask2former.image_processing_pil_mask2former.Mask2FormerImageProcessorPil(
        size={"height": 1024, "width": 1024}, size_divisor=0
    )
    preprocessing = sam2(random=True, architecture=SAM2).preprocessing
    for image in images:
        expected = processor(Image.fromarray(image.numpy()), return_tensors="pt")["pixel_values"][0]
        found = preprocessing(image)
        assert found.shape == (3, 1024, 1024)
        assert (found - expected).abs().max() <= 2 * ONE_LEVEL


def test_the_settings_of_sams_processor_are_still_those():
    # It cannot run here: it needs torchvision, which is not installed.
    folder = Path(transformers.__file__).parent / "models" / "sam2"
    tree = ast.parse((folder / "image_processing_sam2.py").read_text())
    (processor,) = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == "Sam2ImageProcessor"]
    settings = {
        node.targets[0].id: ast.unparse(node.value)
        for node in processor.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert settings["resample"] == "PILImageResampling.BILINEAR"
    assert settings["size"] == "{'height': 1024, 'width': 1024}"
    assert settings["image_mean"] == "IMAGENET_DEFAULT_MEAN" and settings["image_std"] == "IMAGENET_DEFAULT_STD"
    assert tuple(transformers.image_utils.IMAGENET_DEFAULT_MEAN) == IMAGENET_MEAN
    assert tuple(transformers.image_utils.IMAGENET_DEFAULT_STD) == IMAGENET_STD


def test_radio_sees_bicubic_levels_at_the_nearest_multiple_of_its_patches(images):
    preprocessing = radio(random=True, architecture=RADIO | {"patch_size": 16}, shortest_edge=300).preprocessing
    image = images[0]
    height, width = image.shape[:2]
    size = ShortestEdge(short=300)((height, width))
    levels = np.array(Image.fromarray(image.numpy()).resize(size[::-1], Image.Resampling.BICUBIC))
    pixels = torch.from_numpy(levels).permute(2, 0, 1)[None].float() / 255
    snapped = tuple(round(side / 16) * 16 for side in size)
    expected = F.interpolate(pixels, snapped, mode="bilinear", align_corners=False)[0]
    assert preprocessing.size((height, width)) == snapped
    assert (preprocessing(image) - expected).abs().max() <= 1.001 / 255


def test_an_image_of_the_right_size_is_not_filtered():
    image = torch.arange(48, dtype=torch.uint8).view(4, 4, 3)
    assert torch.equal(resize_levels(image.permute(2, 0, 1), (4, 4), mode="bilinear"), image.permute(2, 0, 1).float())


WHOLE = {
    "mask2former": (
        mask2former,
        whole_mask2former,
        {"shortest_edge": 64, "longest_edge": 110},
        lambda model, pixels: model(pixels).pixel_decoder_last_hidden_state,
    ),
    "sam2": (
        sam2,
        whole_sam2,
        {"side": 64},
        lambda model, pixels: model.get_image_embeddings(pixels)[-1],
    ),
    "radio": (
        radio,
        whole_radio,
        {"shortest_edge": 64},
        lambda model, pixels: (
            model(pixels).features.transpose(1, 2).unflatten(2, (pixels.shape[2] // 8, pixels.shape[3] // 8))
        ),
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_features_equal_those_of_the_full_published_model(name, random_images, tmp_path):
    function, make_whole, arguments, features_of = WHOLE[name]
    whole = make_whole()
    whole.save_pretrained(tmp_path)
    spec = function(str(tmp_path), **arguments)
    teacher = Teacher(spec, device="cpu", precision="fp32", max_batch=8)
    found = teacher.features(random_images)
    for image, feature in zip(random_images, found, strict=True):
        with torch.no_grad():
            expected = features_of(whole, spec.preprocessing(image)[None])[0]
        assert feature.shape == expected.shape and feature.shape[0] == spec.channels
        torch.testing.assert_close(feature, expected, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in teacher.network.parameters()) <= sum(p.numel() for p in whole.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    assert not teacher.network.training


def test_only_the_pixel_decoder_is_held(tmp_path):
    whole = whole_mask2former()
    whole.save_pretrained(tmp_path)
    network = mask2former(str(tmp_path)).build()
    assert not [name for name, _ in network.named_parameters() if "pixel_level_module" not in name]
    assert sum(p.numel() for p in network.parameters()) == sum(
        p.numel() for p in whole.model.pixel_level_module.parameters()
    )


OLD_SWIN_NAMES = (
    ("encoder.swin.encoder.", "encoder.encoder."),
    ("encoder.swin.embeddings.", "encoder.embeddings."),
    ("attention.relative_position_bias.relative_position_bias_table", "attention.self.relative_position_bias_table"),
    ("attention.o_proj", "attention.output.dense"),
    ("attention.q_proj", "attention.self.query"),
    ("attention.k_proj", "attention.self.key"),
    ("attention.v_proj", "attention.self.value"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
)
"""Names of transformers 5 -> those of the weights on the hub, which were saved years before."""


def test_weights_with_the_names_of_the_hub_load_into_the_part_as_into_the_whole(random_images, tmp_path):
    whole = whole_mask2former()
    whole.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    renamed = {}
    for name, tensor in state.items():
        if ".pixel_level_module.encoder." in name:
            for new, old in OLD_SWIN_NAMES:
                name = name.replace(new, old)
        renamed[name] = tensor
    file.unlink()
    save_file(renamed, file, metadata={"format": "pt"})
    pixels = torch.randn(1, 3, 64, 96)
    network = mask2former(str(tmp_path)).build().eval()
    with torch.no_grad():
        torch.testing.assert_close(network(pixels), whole(pixels).pixel_decoder_last_hidden_state)


def test_weights_with_a_missing_tensor_are_rejected_by_its_name(tmp_path):
    whole_sam2().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    del state["no_memory_embedding"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match="no_memory_embedding"):
        sam2(str(tmp_path)).build()


def test_the_image_encoder_loads_from_the_video_model_of_the_hub(tmp_path, random_images):
    whole = whole_sam2()
    whole.save_pretrained(tmp_path)
    file, config = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "sam2_video", "num_maskmem": 7}))
    video = {
        name: torch.zeros(2)
        for name in ("no_object_pointer", "memory_attention.layers.0.linear1.bias", "memory_encoder.projection.bias")
    }
    save_file(load_file(file) | video, file, metadata={"format": "pt"})
    spec = sam2(str(tmp_path), side=64)
    (found,) = Teacher(spec, device="cpu", precision="fp32", max_batch=1).features(random_images[:1])
    with torch.no_grad():
        expected = whole.get_image_embeddings(spec.preprocessing(random_images[0])[None])[-1][0]
    torch.testing.assert_close(found, expected)
    save_file(load_file(file) | {"vision_encoder.extra": torch.zeros(2)}, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"unexpected_keys.*vision_encoder\.extra"):
        sam2(str(tmp_path), side=64).build()


def test_weights_of_another_model_are_rejected(tmp_path):
    whole_sam2().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["fpn_hidden_size"] = 24
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="mismatched_keys"):
        sam2(str(tmp_path)).build()


def test_pickled_weights_and_unpinned_names_are_rejected(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds no \*\.safetensors"):
        mask2former(str(tmp_path))
    with pytest.raises(DataError, match="give its revision"):
        mask2former("someone/some-model")
    with pytest.raises(DataError, match="found no weights"):
        sam2()


def test_batches_of_like_images_give_what_each_gives_alone(random_images):
    spec = mask2former(random=True, architecture=MASK2FORMER, shortest_edge=64, longest_edge=110)
    teacher = Teacher(spec, device="cpu", precision="fp32", max_batch=8)
    together = teacher.features(random_images)
    for image, feature in zip(random_images, together, strict=True):
        torch.testing.assert_close(feature, teacher.features([image])[0], rtol=1e-4, atol=1e-5)
    limited = Teacher(spec, device="cpu", precision="fp32", max_batch=1).features(random_images)
    for feature, alone in zip(together, limited, strict=True):
        torch.testing.assert_close(feature, alone, rtol=1e-4, atol=1e-5)
    # Two different images differ by far more.
    assert (together[0][:, :4, :4] - together[1][:, :4, :4]).abs().max() > 1e-2


def test_random_weights_are_equal_in_every_process_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    first, second = (mask2former(random=True, architecture=MASK2FORMER).build().state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("function", [mask2former, sam2, radio])
def test_half_precision_stays_close(function, random_images):
    architecture = {mask2former: MASK2FORMER, sam2: SAM2, radio: RADIO}[function]
    arguments = {mask2former: {"shortest_edge": 64}, sam2: {"side": 64}, radio: {"shortest_edge": 64}}[function]
    spec = function(random=True, architecture=architecture, **arguments)
    full, half = (
        Teacher(spec, device="cpu", precision=p, max_batch=2).features(random_images[:1])[0] for p in ("fp32", "bf16")
    )
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().max() < 0.05 * full.abs().max()


def test_our_own_model_gives_the_pixel_map_it_has_in_a_forward_pass(
    tiny_model, processor, make_sample, make_batch, tmp_path
):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    sample, image = make_sample(np.random.default_rng(3), size_hw=(16, 24))
    spec = ours(str(tmp_path))
    (feature,) = Teacher(spec, device="cpu", precision="fp32", max_batch=4).features(
        [torch.from_numpy(np.array(image))]
    )
    example = processor.encode_sample(sample, image, independent_turns=False)
    assert image_to_patches(image, 8, 64)[1] == (2, 3)
    model.use(REFERENCE)
    with torch.no_grad():
        (expected,) = model(**make_batch([example]).model_inputs()).pixel_features
    torch.testing.assert_close(feature, expected.permute(2, 0, 1), rtol=1e-4, atol=1e-5)
    assert spec.channels == model.config.mask_dim


def settings(**changes):
    fields = {
        "model": {
            "_target_": "pixel_sail.distillation.sam2.sam2",
            "random": True,
            "architecture": SAM2,
        },
        "site": "patch_states",
        "channels": 16,
    }
    return TeacherSettings(**(fields | changes))


def test_random_weights_are_rejected_in_a_real_run(tiny_config):
    with pytest.raises(DataError, match=r"distillation\.sam2: its weights are random"):
        checked_spec("sam2", settings(), build, allow_random=False)
    assert checked_spec("sam2", settings(), build, allow_random=True).is_random


def test_wrong_channels_and_sources_are_rejected_before_anything_is_loaded(tiny_config):
    with pytest.raises(DataError, match=r"distillation.sam2.channels is 17, expected 16, those of this sam2"):
        checked_spec("sam2", settings(channels=17), build, allow_random=True)
    with pytest.raises(DataError, match=r"distillation.sam2.sources names \['no'\]"):
        load_teachers(
            {"sam2": settings(sources=["no"])},
            tiny_config,
            build,
            sources=["yes"],
            allow_random=True,
            device=torch.device("cpu"),
        )


@pytest.mark.parametrize(
    ("change", "named"), [({"loss": "l1"}, "loss"), ({"fraction": 1.5}, "fraction"), ({"on_miss": "skip"}, "on_miss")]
)
def test_wrong_settings_are_rejected(change, named):
    with pytest.raises(DataError, match=named):
        settings(**change)


@pytest.mark.parametrize("name", ["none", "mask2former", "sam2", "radio", "sam2_mask2former", "ours"])
def test_every_teacher_group_composes(name):
    teachers = load_config("train", TrainConfig, ["name=x", f"distillation={name}"]).distillation
    assert sorted(teachers) == sorted([] if name == "none" else name.split("_"))
    for own in teachers.values():
        assert own.weight == (0.5 if name in ("sam2_mask2former", "ours") else 1.0)


def test_an_unknown_key_of_a_teacher_is_an_error():
    with pytest.raises(ConfigError, match="wieght"):
        load_config("train", TrainConfig, ["name=x", "distillation=sam2", "distillation.sam2.wieght=2"])
