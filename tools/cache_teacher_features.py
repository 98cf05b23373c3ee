"""Precompute the feature maps of teachers, once per image, and store them for training.

    python tools/cache_teacher_features.py distillation=sam2_mask2former data=cotrain_0_5b model=sail_0_5b --out cache
    torchrun --nproc-per-node 8 tools/cache_teacher_features.py ... --dtype int8         one GPU per process
    python tools/cache_teacher_features.py ... --plan-only                               sizes and times, writes nothing

Takes the overrides of scripts/train.py: the data determines the images, the model the size of the maps. The cache of
teacher NAME is written to OUT/NAME; training reads it with distillation.NAME.cache=OUT/NAME. Before writing, the tool
prints the size on disk, the build time, and the time of the teacher relative to the student in a training step,
measured on a few images. Repeat the command to resume an interrupted build; the resulting bytes are the same. Exit
status 2, with the reason, for a wrong config, wrong data or insufficient disk space.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from pixel_sail import dist
from pixel_sail.config import ConfigError, TrainConfig, build, load_config
from pixel_sail.data.images import load_image
from pixel_sail.data.mixture import Mixture
from pixel_sail.distillation.cache import (
    StoredMap,
    StudentGrid,
    cache_identity,
    checksum,
    encode_map,
    image_key,
)
from pixel_sail.distillation.cache_writer import (
    CachePlan,
    finish,
    is_shard_complete,
    plan_cache,
    start_folder,
    write_shard,
)
from pixel_sail.distillation.settings import TeacherSettings
from pixel_sail.distillation.teacher import Teacher, TeacherSpec
from pixel_sail.distillation.teachers import checked_spec, student_grid
from pixel_sail.entry import one_message
from pixel_sail.losses.distill import resized_features
from pixel_sail.model.configuration_pixel_sail import Architecture, PixelSailConfig
from pixel_sail.model.image_layout import image_span
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation
from pixel_sail.model.patches import grid_size
from pixel_sail.model.tokenization import IMAGE_TOKENS
from pixel_sail.training.prepare import build_mixture
from pixel_sail.types import DataError, SizeHW

BYTES = {"fp16": 2, "int8": 1}
Result = TypeVar("Result")

MAX_STUDENT_ON_CPU = 50_000_000
"""Largest student, in parameters, whose step is timed on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Image:
    """One image of the data."""

    path: Path
    hw: SizeHW
    where: str
    """Sample that contains it."""


@dataclass(frozen=True, kw_only=True)
class CacheJob:
    """The cache of one teacher."""

    folder: Path
    teacher: Teacher
    grid: StudentGrid | None
    """None: maps keep the teacher's own size."""
    plan: CachePlan
    images: dict[str, Image]

    def opened_images(self, keys: Sequence[str]) -> Iterator[tuple[str, Tensor | str]]:
        """Yield the images of these keys, prefetched in threads, or the reason why one cannot be used."""

        def load(key: str) -> Tensor | str:
            image = self.images[key]
            try:
                opened = load_image(image.path, where=image.where, expected_hw=image.hw)
            except DataError as error:
                return str(error)
            return torch.from_numpy(np.array(opened))

        with ThreadPoolExecutor(4) as pool:
            yield from zip(keys, pool.map(load, keys), strict=True)

    def compute(self, keys: Sequence[str]) -> tuple[dict[str, StoredMap], dict[str, str]]:
        """Return the maps of some images, batched by size, and the reasons why others have none."""
        maps: dict[str, StoredMap] = {}
        unusable: dict[str, str] = {}
        size_of = self.teacher.spec.preprocessing.size
        ordered = sorted(keys, key=lambda key: (size_of(self.images[key].hw), key))
        opened = self.opened_images(ordered)
        while group := list(islice(opened, self.teacher.max_batch)):
            unusable |= {key: pixels for key, pixels in group if isinstance(pixels, str)}
            usable = [(key, pixels) for key, pixels in group if isinstance(pixels, Tensor)]
            features = self.teacher.features([pixels for _, pixels in usable])
            for (key, _), own in zip(usable, features, strict=True):
                image = self.images[key]
                maps[key] = encode_map(self.pooled(own, image.hw), self.plan.dtype, f"{image.where}: {image.path}")
        return maps, unusable

    def pooled(self, features_Ehw: Tensor, image_hw: SizeHW) -> Tensor:
        """Return the map at the stored size."""
        if self.grid is None:
            return features_Ehw
        patches = self.grid.grid_hw(image_hw)
        return resized_features(features_Ehw, self.grid.map_hw(patches))


def images_of(mixture: Mixture, sources: Sequence[str]) -> tuple[dict[str, Image], list[str]]:
    """Return every image of the named sources (default: all) by key, and the reasons why some items were skipped."""
    images: dict[str, Image] = {}
    left_out: list[str] = []
    seen: set[Path] = set()
    for name, source in zip(mixture.names, mixture.sources, strict=True):
        if sources and name not in sources:
            continue
        for index in tqdm(range(len(source)), desc=f"images of {name}", leave=False, disable=None):
            path = source.image_path(index)
            if path is None or path in seen:
                continue
            try:
                # The annotated size decides how an image with an EXIF orientation is rotated.
                sample = source.get(index, np.random.default_rng(0))
                key = image_key(path)
            except DataError as error:
                left_out.append(str(error))
                continue
            seen.add(path)
            hw = sample.image_hw
            if hw is None:
                opened = load_image(path, where=sample.sample_id)
                hw = (opened.height, opened.width)
            images[key] = Image(path=path, hw=hw, where=sample.sample_id)
    return images, left_out


def stored_bytes(job: CacheJob) -> int:
    """Return the size in bytes of the maps of a plan."""
    total = 0
    channels = job.teacher.spec.channels
    for image in job.images.values():
        if job.grid is not None:
            rows, columns = job.grid.map_hw(job.grid.grid_hw(image.hw))
        else:
            size = job.teacher.spec.preprocessing.size(image.hw)
            scale = measured_stride(job)
            rows, columns = size[0] // scale, size[1] // scale
        total += channels * (rows * columns * BYTES[job.plan.dtype] + (4 if job.plan.dtype == "int8" else 0))
    return total


def measured_stride(job: CacheJob) -> int:
    """Return the stride of the teacher's own map, from a small gray image."""
    image = torch.full((64, 64, 3), 127, dtype=torch.uint8)
    height = job.teacher.spec.preprocessing.size((64, 64))[0]
    return height // int(job.teacher.features([image])[0].shape[1])


def print_plan(job: CacheJob, name: str, architecture: Architecture, *, num_measured: int) -> None:
    """Print size on disk, build time and fraction of a training step. Raises: DataError if the disk is too small."""
    size = stored_bytes(job)
    free = shutil.disk_usage(next(folder for folder in (job.folder, *job.folder.parents) if folder.exists())).free
    done = sum(is_shard_complete(job.folder, number) for number in range(len(job.plan.shards)))
    keys = [key for shard in job.plan.shards for key in shard][:num_measured]
    job.compute(keys[:1])  # warm-up: the first pass loads kernels
    seconds, (maps, _) = timed(lambda: job.compute(keys))
    per_image, left = seconds / max(len(keys), 1), len(job.images) * (1 - done / max(len(job.plan.shards), 1))
    student = student_seconds(architecture, [job.images[key].hw for key in keys], job.teacher.device)
    print(f"{name}: {len(job.images)} images in {len(job.plan.shards)} shards, {done} of them written")
    print(f"  disk        {size / 1e9:.3f} GB as {job.plan.dtype}; {free / 1e9:.1f} GB are free at {job.folder}")
    print(
        f"  build       {per_image * 1000:.1f} ms per image x {left:.0f} images / {dist.world_size()} processes", end=""
    )
    print(f" = {duration(per_image * left / dist.world_size())} on {job.teacher.device.type}")
    print(f"  reading     {read_seconds(maps) * 1000:.2f} ms per image in a loader worker (files in memory)")
    if student is None:
        print("  step fraction  not measured: the student is too large for a CPU")
    else:
        fraction = per_image / (per_image + student)
        beside = f"teacher {per_image * 1000:.1f} ms, student {student * 1000:.1f} ms per image"
        print(f"  step fraction  online {fraction:.0%}: {beside}")
    if size * (1 - done / max(len(job.plan.shards), 1)) > free:
        raise DataError(
            f"{job.folder}: {size / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; use --dtype int8, fewer sources or "
            "another disk"
        )


def timed(function: Callable[[], Result]) -> tuple[float, Result]:
    """Return the seconds of a call, and its result."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def duration(seconds: float) -> str:
    """Return a duration in a readable unit."""
    for limit, unit in ((120, "s"), (7200, "min")):
        if seconds < limit:
            return f"{seconds / (limit / 120):.0f} {unit}"
    return f"{seconds / 3600:.1f} h"


def read_seconds(maps: dict[str, StoredMap]) -> float:
    """Return the median seconds of reading and checking one map."""
    times = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "maps.safetensors"
        save_file({key: stored.features_EYX for key, stored in maps.items()}, file)
        shard = safe_open(file, framework="pt")
        for key in maps:

            def read(key: str = key) -> int:
                return checksum(StoredMap(features_EYX=shard.get_tensor(key).clone(), scales_E=None))

            times.append(timed(read)[0])
    return statistics.median(times) if times else 0.0


def student_seconds(architecture: Architecture, sizes: Sequence[SizeHW], device: torch.device) -> float | None:
    """Return the seconds per image of the student's forward and backward pass, None if it is too large to time."""
    names = ["<vision>", "<vpatch>", "</vision>", *(f"<Prompt{i}>" for i in range(architecture.num_visual_prompts))]
    fields = vars(architecture) | {"token_ids": {name: index for index, name in enumerate(names)}}
    config = PixelSailConfig.from_architecture(Architecture(**fields))
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in PixelSailForSegmentation(config).parameters())
    if device.type == "cpu" and num_parameters > MAX_STUDENT_ON_CPU:
        return None
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = PixelSailForSegmentation(config).train()
    model.to(device=device, dtype=dtype)
    if device.type != "cpu":
        student_pass(model, sizes[0], device)  # warm-up: loads kernels
    seconds = [timed(partial(student_pass, model, hw, device))[0] for hw in sizes]
    return sum(seconds) / len(seconds)


def student_pass(model: PixelSailForSegmentation, image_hw: SizeHW, device: torch.device) -> None:
    """Run one image with one mask forward and backward."""
    config = model.config
    grid = grid_size(image_hw, config.patch_size, config.max_long_side, config.sizing)
    span = image_span(config.base, grid, [config.token_id(token) for token in IMAGE_TOKENS])
    zeros = torch.zeros(1, len(span.token_ids_S), dtype=torch.long, device=device)
    output = model(
        input_ids_BT=span.token_ids_S[None].to(device),
        position_ids_2BT=span.position_ids_2S[:, None].to(device),
        sample_index_BT=zeros,
        branch_ids_BT=zeros,
        in_image_BT=torch.full_like(zeros, config.attention == "prefix", dtype=torch.bool),
        patch_index_BT=span.patch_index_S[None].to(device),
        prompt_ids_BT=zeros - 1,
        patches_SK=torch.zeros(grid[0] * grid[1], 3 * config.patch_size**2, dtype=torch.uint8, device=device),
        grids=[grid],
        seg_positions_N2=torch.zeros(1, 2, dtype=torch.long, device=device),
        masks_per_image=[1],
        logit_positions_M2=torch.zeros(1, 2, dtype=torch.long, device=device),
    )
    (output.mask_logits[0].float().mean() + output.logits.float().mean()).backward()
    model.zero_grad()


def jobs(options: argparse.Namespace, config: TrainConfig) -> Iterator[tuple[str, CacheJob, list[str]]]:
    """Yield name, job and skipped items of every configured teacher."""
    mixture = build_mixture(config.data, seed=config.seed)
    for name in sorted(config.distillation):
        settings: TeacherSettings = config.distillation[name]
        spec: TeacherSpec = checked_spec(name, settings, build, allow_random=config.allow_random_teachers)
        # One process lists the images, so that files are hashed once.
        found = images_of(mixture, settings.sources) if dist.rank() == 0 else None
        images, left_out = dist.gather_objects(found)[0]
        if not images:
            raise DataError(
                f"distillation.{name}: found no image in data.sources, expected at least one; add a source with images"
            )
        grid = student_grid(config.model.architecture, settings.site) if options.size == "student" else None
        teacher = Teacher(spec, device=dist.local_device(), precision=settings.precision, max_batch=settings.max_batch)
        identity = cache_identity(spec.identity(), precision=settings.precision, grid=grid)
        plan = plan_cache(list(images), identity, dtype=options.dtype, images_per_shard=options.images_per_shard)
        folder = Path(settings.cache) if settings.cache is not None else options.out / name
        yield name, CacheJob(folder=folder, teacher=teacher, grid=grid, plan=plan, images=images), left_out


def run(options: argparse.Namespace, config: TrainConfig) -> None:
    """Plan, build and finalize the caches."""
    for name, job, left_out in jobs(options, config):
        if dist.rank() == 0:
            print_plan(job, name, config.model.architecture, num_measured=options.measure)
            if left_out:
                print(f"  skipped     {len(left_out)} unusable items, the first: {left_out[0]}")
        if options.plan_only:
            continue
        if dist.rank() == 0:
            start_folder(job.folder, job.plan)
        dist.barrier()
        own = range(dist.rank(), len(job.plan.shards), dist.world_size())
        todo = [number for number in own if not is_shard_complete(job.folder, number)]
        for number in tqdm(todo, desc=f"{name}: shards", disable=None if dist.rank() == 0 else True):
            write_shard(job.folder, job.plan, number, job.compute)
        dist.barrier()
        if dist.rank() == 0:
            finish(job.folder, job.plan, verify=options.verify)
            print(f"  written     {job.folder}; train with distillation.{name}.cache={job.folder}")


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Build the caches; wrong input ends with one message and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/cache"), help="output folder of the caches (data/cache)")
    parser.add_argument("--dtype", choices=sorted(BYTES), default="fp16")
    parser.add_argument("--size", choices=("student", "teacher"), default="student", help="size of the stored maps")
    parser.add_argument("--images-per-shard", type=int, default=64)
    parser.add_argument("--measure", type=int, default=4, help="images used to measure times (4)")
    parser.add_argument("--plan-only", action="store_true", help="print the plan without writing anything")
    parser.add_argument("--verify", action="store_true", help="verify the hash of every shard before writing the index")
    options, overrides = parser.parse_known_args(arguments)
    if not any(override.startswith(("name=", "experiment=")) for override in overrides):
        overrides.append("name=cache_teacher_features")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    dist.ensure_launch_environment()
    config = load_config("train", TrainConfig, overrides)
    if not config.distillation:
        raise ConfigError("distillation is empty; choose a group, for example distillation=sam2_mask2former")
    dist.start_group()
    run(options, config)
    dist.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
