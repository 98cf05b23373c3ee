"""Benchmark the cost of distillation per training step: none, the released method, online, and from the cache.

    python tools/bench_distill.py                                   small teachers and student, minutes on two cores
    python tools/bench_distill.py --scale gpu --images 8            Swin-L, Hiera-L and the 0.5B student on one GPU
    python tools/bench_distill.py --image-dir data/coco/val2017 --json runs/bench_distill.json

Weights are random; times do not depend on them. A step is forward, losses, backward and AdamW on `--images` images of
one size with one mask each. The variants alternate `--repeats` times, and medians are reported:

    none      no teacher
    released  per image: PIL preprocessing, the whole Mask2Former and the whole SAM 2 image path, batch of one
    online    Teachers.maps: preprocessing on the device, only the needed layers, batched by image size
    cached    Teachers.maps on stored maps read by a loader worker, whose own time is reported separately

The small scale roughly keeps the compute ratio of teachers to student; both are printed as counted floating-point
operations. On a CPU, one thread is used and CPU time is reported, which is less sensitive to other load. On a GPU, wall
time is reported.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Sam2Config, Sam2Model
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from pixel_sail.data.collate import collate
from pixel_sail.data.images import load_image
from pixel_sail.data.packing import PackedSequence, StreamState
from pixel_sail.distillation.cache import FeatureCache, cache_identity, encode_map
from pixel_sail.distillation.cache_writer import finish, plan_cache, start_folder, write_shard
from pixel_sail.distillation.mask2former import mask2former
from pixel_sail.distillation.sam2 import sam2
from pixel_sail.distillation.teacher import Teacher, TeacherSpec
from pixel_sail.distillation.teachers import Teachers, student_grid
from pixel_sail.entry import one_message
from pixel_sail.files import replace_text
from pixel_sail.losses.distill import DistillTerm, resized_features
from pixel_sail.losses.total import LossConfig, combine, count, loss_sums
from pixel_sail.model.configuration_pixel_sail import Architecture, PixelSailConfig
from pixel_sail.model.distill_head import DistillSite
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.model.tokenization import model_token_ids, train_tokenizer
from pixel_sail.types import DTYPES, Batch, DataError, Example, Sample, SizeHW, TeacherTarget, Turn

TERMS = (DistillTerm(name="mask2former", weight=0.5), DistillTerm(name="sam2", weight=0.5))
SITES = {"mask2former": "pixel_map", "sam2": "patch_states"}
NUM_PROMPTS = 15


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of models and images."""

    image_hw: SizeHW
    student: dict[str, Any]
    mask2former: dict[str, Any]
    shortest_edge: int
    longest_edge: int
    sam2: dict[str, Any]
    sam_side: int
    precision: str


def swin(embed_dim: int, num_heads: list[int], depths: list[int], window: int) -> dict[str, Any]:
    """Return the fields of a Swin backbone with four feature maps."""
    sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "depths": depths, "window_size": window}
    return {"model_type": "swin", **sizes, "out_features": ["stage1", "stage2", "stage3", "stage4"]}


def hiera(width: int, heads: int, blocks: list[int], global_blocks: list[int], side: int, fpn: int) -> dict[str, Any]:
    """Return the fields of SAM 2 with a Hiera backbone for square images."""
    widths = [width * 2**stage for stage in range(4)]
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": width,
        "num_attention_heads": heads,
        "image_size": [side, side],
        "blocks_per_stage": blocks,
        "embed_dim_per_stage": widths,
        "num_attention_heads_per_stage": [heads * 2**stage for stage in range(4)],
        "window_size_per_stage": [8, 4, 16, 8],
        "global_attention_blocks": global_blocks,
    }
    sizes = [[side // stride, side // stride] for stride in (4, 8, 16)]
    vision = {
        "backbone_config": backbone,
        "backbone_channel_list": widths[::-1],
        "backbone_feature_sizes": sizes,
        "fpn_hidden_size": fpn,
    }
    prompts = {"hidden_size": fpn, "image_size": side}
    return {"vision_config": vision, "prompt_encoder_config": prompts, "mask_decoder_config": {"hidden_size": fpn}}


def decoder(channels: int, feedforward: int) -> dict[str, Any]:
    """Return the fields of Mask2Former after its backbone."""
    widths = {"feature_size": channels, "mask_feature_size": channels, "hidden_dim": channels}
    return {**widths, "encoder_feedforward_dim": feedforward, "dim_feedforward": 2 * feedforward}


SCALES = {
    "cpu": Scale(
        image_hw=(240, 320),
        student={
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "mask_dim": 128,
        },
        mask2former={"backbone_config": swin(24, [1, 2, 4, 8], [2, 2, 6, 2], 7), **decoder(64, 128)},
        shortest_edge=400,
        longest_edge=667,
        sam2=hiera(32, 1, [1, 2, 8, 2], [5, 8], 512, 64),
        sam_side=512,
        precision="fp32",
    ),
    "gpu": Scale(
        image_hw=(480, 640),
        student={
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "mask_dim": 512,
        },
        mask2former={"backbone_config": swin(192, [6, 12, 24, 48], [2, 2, 18, 2], 12), **decoder(256, 1024)},
        shortest_edge=800,
        longest_edge=1333,
        sam2=hiera(144, 2, [2, 6, 36, 4], [23, 33, 43], 1024, 256),
        sam_side=1024,
        precision="bf16",
    ),
}


class Bench:
    """The student, both implementations of the teachers, and a batch of images."""

    def __init__(self, scale: Scale, images: Sequence[Image.Image], device: torch.device, folder: Path) -> None:
        torch.manual_seed(0)
        self.device, self.scale, self.pil_images = device, scale, images
        self.dtype = DTYPES[scale.precision]
        tokenizer = train_tokenizer([], vocab_size=320, num_visual_prompts=NUM_PROMPTS)
        architecture = Architecture(
            **scale.student,
            vocab_size=512,
            patch_size=16,
            mask_stride=4,
            num_visual_prompts=NUM_PROMPTS,
            token_ids=model_token_ids(tokenizer, num_visual_prompts=NUM_PROMPTS),
        )
        self.processor = PixelSailProcessor.for_model(tokenizer, architecture)
        specs = {
            "mask2former": mask2former(
                random=True,
                architecture=scale.mask2former,
                shortest_edge=scale.shortest_edge,
                longest_edge=scale.longest_edge,
            ),
            "sam2": sam2(random=True, architecture=scale.sam2, side=scale.sam_side),
        }
        self.model = PixelSailForSegmentation(PixelSailConfig.from_architecture(architecture))
        sites = {name: DistillSite(site=SITES[name], channels=specs[name].channels) for name in specs}
        self.model.add_distill_head(sites, seed=0)
        plain: nn.Module = self.model.train()
        plain.to(device=device, dtype=self.dtype)
        self.optimizer = AdamW(self.model.parameters(), lr=1e-5)
        self.teachers = Teachers(
            networks={
                name: Teacher(spec, device=device, precision=scale.precision, max_batch=8)
                for name, spec in specs.items()
            }
        )
        self.whole = {
            "mask2former": _frozen(
                Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**scale.mask2former)), device, self.dtype
            ),
            "sam2": _frozen(Sam2Model(Sam2Config(**scale.sam2)), device, self.dtype),
        }
        size = {"shortest_edge": scale.shortest_edge, "longest_edge": scale.longest_edge}
        self.pil = Mask2FormerImageProcessorPil(size=size)
        square = {"height": scale.sam_side, "width": scale.sam_side}
        self.pil_square = Mask2FormerImageProcessorPil(size=square, size_divisor=0)
        self.images_HW3 = [torch.from_numpy(np.array(image)) for image in images]
        self.examples = [self.example(index) for index in range(len(images))]
        self.caches = {name: self.write_cache(name, spec, folder / name) for name, spec in specs.items()}

    def example(self, index: int) -> Example:
        """Return one image with one masked object and a short text, as training sees it."""
        mask = np.zeros((self.pil_images[index].height, self.pil_images[index].width), dtype=bool)
        mask[20:120, 30:150] = True
        turn = Turn(question="Please segment the object in this image.", answer="It is [SEG].", masks=(mask,))
        sample = Sample(sample_id=str(index), source="images", image_path=None, image_hw=mask.shape, turns=(turn,))
        return self.processor.encode_sample(sample, self.pil_images[index], independent_turns=False)

    def write_cache(self, name: str, spec: TeacherSpec, folder: Path) -> FeatureCache:
        """Write the feature maps as float16 at the student's size, and open them."""
        grid = student_grid(self.model.config, SITES[name])
        identity = cache_identity(spec.identity(), precision=self.scale.precision, grid=grid)
        plan = plan_cache(
            [self.key(i) for i in range(len(self.images_HW3))], identity, dtype="fp16", images_per_shard=64
        )
        own = self.teachers.networks[name].features(self.images_HW3)
        maps = {}
        for index, features in enumerate(own):
            grid_hw = self.examples[index].grid_hw
            assert grid_hw is not None
            maps[self.key(index)] = encode_map(resized_features(features, grid.map_hw(grid_hw)), "fp16")
        start_folder(folder, plan)
        write_shard(folder, plan, 0, lambda keys: ({key: maps[key] for key in keys}, {}))
        finish(folder, plan)
        return FeatureCache(folder, identity, where=name)

    @staticmethod
    def key(index: int) -> str:
        """Return a placeholder for the hash of an image file."""
        return f"{index:04d}"

    def batch(self, way: str) -> Batch:
        """Return the images as a batch for one variant; `cached` reads the stored maps."""
        sequences = []
        for index, example in enumerate(self.examples):
            targets: tuple[TeacherTarget, ...] = ()
            if way in ("online", "released"):
                targets = tuple(TeacherTarget(teacher=term.name, features_EYX=None) for term in TERMS)
            elif way == "cached":
                targets = tuple(self.stored(term.name, index) for term in TERMS)
            image = self.images_HW3[index] if way in ("online", "released") else None
            changed = replace(example, teacher_targets=targets, image_HW3=image)
            sequences.append(PackedSequence(stream=index, after=StreamState(), examples=(changed,)))
        return collate(sequences, seg_id=self.processor.seg_id)

    def stored(self, name: str, index: int) -> TeacherTarget:
        """Read one map from disk."""
        grid_hw = self.examples[index].grid_hw
        assert grid_hw is not None
        map_hw = student_grid(self.model.config, SITES[name]).map_hw(grid_hw)
        stored = self.caches[name].read(self.key(index), name, map_hw=map_hw)
        assert stored is not None
        return TeacherTarget(teacher=name, features_EYX=stored.features_EYX, scales_E=stored.scales_E)

    @torch.no_grad()
    def released_maps(self) -> dict[str, list[Tensor]]:
        """Return the maps as the released code computes them: image by image, whole models, PIL on the CPU."""
        maps: dict[str, list[Tensor]] = {"mask2former": [], "sam2": []}
        for image in self.pil_images:
            pixels = self.pil(image, return_tensors="pt")["pixel_values"].to(self.device, self.dtype)
            features = self.whole["mask2former"](pixels).pixel_decoder_last_hidden_state
            maps["mask2former"].append(features[0].float())
            pixels = self.pil_square(image, return_tensors="pt")["pixel_values"].to(self.device, self.dtype)
            encoder: Any = self.whole["sam2"]
            maps["sam2"].append(encoder.get_image_embeddings(pixels)[-1][0].float())
        return maps

    def step(self, way: str, batch: Batch) -> None:
        """Run one training step."""
        batch = batch.to(self.device)
        terms = TERMS if way != "none" else ()
        maps: dict[str, list[Tensor]] = {}
        if way == "released":
            maps = self.released_maps()
        elif way != "none":
            maps = self.teachers.maps(batch)
        output = self.model(**batch.model_inputs())
        sums = loss_sums(output, batch, LossConfig(), terms, maps)
        loss = combine(sums, count(batch, terms), LossConfig(), terms) + output.zero_loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _frozen(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    return model.eval().requires_grad_(False).to(device=device, dtype=dtype)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call, GPU work included; on a CPU, the CPU time of this process."""
    if device.type == "cpu":
        began = time.process_time()
        call()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def operations(call: Callable[[], object]) -> float:
    """Return the floating-point operations of a call, without attention kernels, which torch does not count."""
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def measure(bench: Bench, repeats: int) -> dict[str, Any]:
    """Time the variants alternately and return medians and ratios."""
    ways = ("none", "released", "online", "cached")
    times: dict[str, list[float]] = {way: [] for way in ways}
    reading: list[float] = []
    batches = {way: bench.batch(way) for way in ways}
    for way in ways:
        bench.step(way, batches[way])
    for turn in range(repeats):
        for shift in range(len(ways)):
            way = ways[(turn + shift) % len(ways)]
            times[way].append(seconds_of(partial(bench.step, way, batches[way]), bench.device))
        for index in range(len(bench.images_HW3)):
            began = time.perf_counter()
            for term in TERMS:
                bench.stored(term.name, index)
            reading.append(time.perf_counter() - began)
    median = {way: statistics.median(times[way]) for way in ways}
    none, num_images = median["none"], len(bench.images_HW3)
    student = operations(lambda: bench.step("none", batches["none"]))
    online = operations(lambda: bench.teachers.maps(batches["online"].to(bench.device)))
    whole = operations(bench.released_maps)
    return {
        "seconds": {way: round(value, 5) for way, value in median.items()},
        "spread": {way: [round(min(times[way]), 5), round(max(times[way]), 5)] for way in ways},
        "relative": {way: round(value / none, 4) for way, value in median.items()},
        "online_of_released_overhead": round((median["online"] - none) / (median["released"] - none), 4),
        "reading_ms_per_image": round(1000 * statistics.median(reading), 3),
        "reading_fraction_of_step": round(statistics.median(reading) * num_images / none, 4),
        "gflop_per_image": {
            "student_step": round(student / num_images / 1e9, 2),
            "teachers_online": round(online / num_images / 1e9, 2),
            "teachers_released": round(whole / num_images / 1e9, 2),
        },
        "teachers_to_student": round(whole / student, 3),
    }


def images_of(folder: Path | None, size_hw: SizeHW, num_images: int) -> list[Image.Image]:
    """Return real images squeezed to one size, or noise without a folder."""
    height, width = size_hw
    if folder is None:
        rng = np.random.default_rng(0)
        return [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(num_images)]
    paths = sorted(folder.rglob("*.jpg"))[:num_images]
    if len(paths) < num_images:
        raise DataError(f"{folder}: {len(paths)} images found, {num_images} expected; give another folder")
    return [load_image(path, where="--image-dir").resize((width, height)) for path in paths]


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; wrong input ends with one message and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=sorted(SCALES), default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=4, help="images per step (4)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, of which medians are reported (5)")
    parser.add_argument("--image-dir", type=Path, help="folder of images (default: noise)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args(None if arguments is None else list(arguments))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    scale = SCALES[options.scale]
    images = images_of(options.image_dir, scale.image_hw, options.images)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Bench(scale, images, device, Path(folder)), options.repeats)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "one CPU thread, CPU time"
    setting = {"scale": options.scale, "images": options.images, "repeats": options.repeats, "device": name}
    result = {**setting, "torch": torch.__version__, **result, "sizes": asdict(scale)}
    print(
        f"{options.scale} scale, {options.images} images of {scale.image_hw} a step, {name}, torch {torch.__version__}"
    )
    for way, seconds in result["seconds"].items():
        low, high = result["spread"][way]
        print(f"  {way:9s} {seconds:8.4f} s  {result['relative'][way]:6.3f} x  ({low:.4f} .. {high:.4f})")
    print(f"  online adds {result['online_of_released_overhead']:.0%} of what the released way adds")
    reading = f"{result['reading_ms_per_image']:.2f} ms per image in a worker"
    print(f"  reading the cache: {reading}, {result['reading_fraction_of_step']:.1%} of a step's time")
    print(f"  GFLOP per image: {result['gflop_per_image']}; whole teachers to student {result['teachers_to_student']}")
    if options.json is not None:
        replace_text(options.json, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
