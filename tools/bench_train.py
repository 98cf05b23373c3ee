"""Benchmark a training step of the released method and of ours: samples per second, memory, and time per component.

    python tools/bench_train.py                                  the 0.5B model's proportions, scaled down for a CPU
    python tools/bench_train.py --size 0.5b --device cuda --precision bf16 --samples 16 --samples-per-sequence 8
    python tools/bench_train.py --json runs/bench_train.json
    python tools/bench_train.py --growth image --ways released ours --png runs/growth.png    also: sequence, expressions

The released method is reimplemented on our reference path: one sample per forward pass, a dense mask, the states of all
layers kept, float32 logits of all positions with a shifted copy, a convolutional upsampler to stride 2, features of
the mask width at every cell, whole mask maps. Ours is the step of `training/loop.py` with the default `kernels` group.
Both train on the same samples (one 480 x 640 image with five expressions each) with the same initial weights and
optimizer. They differ in stride, 2 against the paper's 4, and therefore in one block of the upsampler.
`ours, stride 2` also has the released stride, `ours, feed_forward` and `ours, layers` trade time for memory
(`optim.activation_checkpointing`), `reference` is our reference path at stride 4.

The variants alternate step by step in one process; times are medians over the rounds, with minimum and maximum.
`cpu_time_ratio` compares CPU seconds instead, which are less sensitive to other load.
On a CPU, memory is the peak resident size (`VmHWM`) of a separate process that runs two steps, minus its size after a
step of a tiny model, which loads torch's libraries. On CUDA it is torch's peak.
`ours, compiled` (`kernels.compile=layers`) needs a C++ compiler on a CPU and runs only if listed in `--ways`.
`--json` writes `speed_ratio` and `memory_ratio` (ours divided by released), the same for every variant under `ratios`,
and everything that is printed. `--growth` instead times steps on one sequence with larger images, more samples, or more
expressions per image, and reports the exponent of the cost.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from tqdm import tqdm

from pixel_sail.config import OptimConfig
from pixel_sail.entry import one_message
from pixel_sail.evaluation.curves import save_panels, size_panel
from pixel_sail.files import replace_text
from pixel_sail.losses.mask import MaskSums, point_losses
from pixel_sail.losses.total import LossConfig, combine, count, loss_sums
from pixel_sail.model.attention_backends import attention_backend
from pixel_sail.model.attention_mask import attention_mask
from pixel_sail.model.decoder import MaskedAttention, rotary_tables
from pixel_sail.model.kernels import REFERENCE, Kernels
from pixel_sail.model.mask_head import mask_logits
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation, mask_logits_of_images
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.planning.benchmarks import BENCHMARK_SIZES, packed, sized_config, small_tokenizer, synthetic_examples
from pixel_sail.planning.flops import forward_flops, training_flops
from pixel_sail.planning.workload import of_batch
from pixel_sail.provenance import code_version
from pixel_sail.training.metrics import peak_memory_bytes
from pixel_sail.training.optim import build_optimizer
from pixel_sail.types import DTYPES, IGNORE_LABEL, Batch

GROWTH: dict[str, Sequence[Any]] = {
    "image": ((240, 320), (480, 640), (720, 960)),
    "sequence": (1, 2, 4),
    "expressions": (1, 5, 10),
}
"""Points of each axis: (height, width), samples per sequence, expressions per image."""

LOSSES = LossConfig()


@dataclass(frozen=True, kw_only=True)
class Way:
    """Settings of one variant."""

    stride: int
    kernels: Kernels | None
    """None: the released method."""
    checkpointing: str = "none"
    """`optim.activation_checkpointing`"""


VARIANTS = {
    "released": Way(stride=2, kernels=None),
    "reference": Way(stride=4, kernels=REFERENCE),
    "ours": Way(stride=4, kernels=Kernels()),
    "ours, feed_forward": Way(stride=4, kernels=Kernels(), checkpointing="feed_forward"),
    "ours, layers": Way(stride=4, kernels=Kernels(), checkpointing="layers"),
    "ours, stride 2": Way(stride=2, kernels=Kernels()),
    "ours, compiled": Way(stride=4, kernels=Kernels(compile="layers")),
}
DEFAULT_WAYS = [name for name in VARIANTS if name != "ours, compiled"]


def build_models(size: str, strides: Sequence[int], device: str, dtype: torch.dtype) -> dict[int, Any]:
    """Return (model, processor) of each stride, with equal weights wherever shapes are equal."""
    tokenizer = small_tokenizer()
    built: dict[int, Any] = {}
    for stride in sorted(set(strides)):
        config = sized_config(size, tokenizer, mask_stride=stride)
        torch.manual_seed(0)
        model = PixelSailForSegmentation(config).train()
        if built:
            known = next(iter(built.values()))[0].state_dict()
            model.load_state_dict({name: known.get(name, value) for name, value in model.state_dict().items()})
        model.to(device=torch.device(device), dtype=dtype)
        built[stride] = (model, PixelSailProcessor.for_model(tokenizer, config))
    return built


def released_states(model: PixelSailForSegmentation, batch: Batch) -> list[Tensor]:
    """Return the states of all layers under a dense mask, the last one after the norm."""
    mask = attention_mask(batch.sample_index_BT, batch.branch_ids_BT, batch.in_image_BT)
    states = [model.embed(batch.input_ids_BT, batch.patches_SK, batch.patch_index_BT, batch.prompt_ids_BT)]
    numbers = torch.zeros(mask.shape, dtype=states[0].dtype, device=mask.device)
    backend = MaskedAttention(mask_B1TS=numbers.masked_fill(~mask, torch.finfo(numbers.dtype).min))
    decoder = model.decoder
    rotary = rotary_tables(batch.position_ids_2BT, decoder.head_dim, decoder.rope_theta, states[0].dtype)
    for index, layer in enumerate(decoder.layers):
        states.append(layer(states[-1], rotary, backend, index))
    states.append(decoder.norm(states[-1]))
    return states


def released_text_loss(model: PixelSailForSegmentation, hidden_BTD: Tensor, batch: Batch) -> Tensor:
    """Return the mean over supervised tokens from the logits of all positions."""
    labels_BT = torch.full_like(batch.input_ids_BT, IGNORE_LABEL)
    rows, positions = batch.logit_positions_M2.unbind(1)
    labels_BT[rows, positions + 1] = batch.targets_M
    logits_BTV = model.lm_head(hidden_BTD).float()
    shifted_NV = logits_BTV[:, :-1].contiguous().flatten(0, 1)
    return F.cross_entropy(shifted_NV, labels_BT[:, 1:].flatten(), ignore_index=IGNORE_LABEL)


def released_masks(model: PixelSailForSegmentation, hidden_BTD: Tensor, batch: Batch) -> Tensor:
    """Return the full mask maps of the single image of a batch."""
    patch_states = hidden_BTD[batch.patch_index_BT >= 0].view(1, *batch.grids[0], -1)
    features = model.mask_head.pixel_features(patch_states)[0]
    return mask_logits(model.mask_head.seg_queries(hidden_BTD[tuple(batch.seg_positions_N2.unbind(1))]), features)


def released_mask_loss(logits_NYX: Tensor, batch: Batch) -> MaskSums:
    """Return the point losses of one image."""
    generator = torch.Generator().manual_seed(batch.point_seeds[0])
    return point_losses(logits_NYX, torch.stack(batch.masks), LOSSES.points, generator)


def released_loss(model: PixelSailForSegmentation, batch: Batch) -> Tensor:
    """Return the loss of one sample. Its text loss is weighted by 0.1, because it has masks."""
    states = released_states(model, batch)
    text = released_text_loss(model, states[-1], batch)
    sums = released_mask_loss(released_masks(model, states[-1], batch), batch)
    return LOSSES.text_factor_with_masks * text + (LOSSES.bce * sums.bce + LOSSES.dice * sums.dice) / sums.count


def our_loss(model: PixelSailForSegmentation, batch: Batch) -> Tensor:
    """Return the loss of one sequence as `optimizer_step` computes it."""
    output = model(**batch.training_inputs())
    assert output.zero_loss is not None
    sums = loss_sums(output, batch, LOSSES)
    return combine(sums, count(batch), LOSSES) + output.zero_loss


class TrainVariant:
    """One variant, with its own model and optimizer."""

    def __init__(self, way: Way, model: PixelSailForSegmentation, batches: Sequence[Batch]) -> None:
        self.way, self.model, self.batches = way, model, batches
        self.optimizer: Optimizer = build_optimizer(model, OptimConfig(lr=1e-5))
        self.loss: Callable[[PixelSailForSegmentation, Batch], Tensor]
        self.loss = released_loss if way.kernels is None else our_loss
        model.use(way.kernels if way.kernels is not None else REFERENCE, way.checkpointing)

    def step(self) -> float:
        """Run one optimizer step; return the mean loss."""
        total = torch.zeros((), device=self.model.device)
        for batch in self.batches:
            loss = self.loss(self.model, batch) / len(self.batches)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(total)

    def seconds_by_part(self) -> dict[str, float]:
        """Return the seconds of one step, forward and backward pass, with each component timed separately."""
        spent = dict.fromkeys(("decoder", "text", "mask head", "mask losses"), 0.0)
        for batch in self.batches:
            self._timed_parts(batch, spent)
        start = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return spent | {"optimizer": elapsed(start, self.model.device)}

    def _timed_parts(self, batch: Batch, spent: dict[str, float]) -> None:
        model, released = self.model, self.way.kernels is None
        start = time.perf_counter()

        def lap(part: str) -> None:
            nonlocal start
            spent[part] += elapsed(start, model.device)
            start = time.perf_counter()

        hidden = released_states(model, batch)[-1] if released else our_states(model, batch)
        cut = hidden.detach().requires_grad_()
        lap("decoder")
        if released:
            text = released_text_loss(model, cut, batch)
        elif model.kernels.text_loss == "chunked":
            text = model.lm_head(cut[tuple(batch.logit_positions_M2.unbind(1))], batch.targets_M).sum()
        else:
            chosen = model.lm_head(cut[tuple(batch.logit_positions_M2.unbind(1))])
            text = F.cross_entropy(chosen.float(), batch.targets_M)
        text.backward()
        lap("text")
        maps = [released_masks(model, cut, batch)] if released else our_maps(model, cut, batch)
        leaves = [logits.detach().requires_grad_() for logits in maps]
        lap("mask head")
        first = 0
        for index, leaf in enumerate(leaves):
            own = batch.masks[first : first + len(leaf)]
            first += len(leaf)
            generator = torch.Generator().manual_seed(batch.point_seeds[index])
            sums = point_losses(leaf, torch.stack(own), LOSSES.points, generator)
            (sums.bce + sums.dice).backward()
        lap("mask losses")
        torch.autograd.backward(maps, [leaf.grad for leaf in leaves])
        lap("mask head")
        hidden.backward(cut.grad)
        lap("decoder")


def our_states(model: PixelSailForSegmentation, batch: Batch) -> Tensor:
    """Return the last states of a sequence with the variant's settings."""
    embedded = model.embed(batch.input_ids_BT, batch.patches_SK, batch.patch_index_BT, batch.prompt_ids_BT)
    where = (batch.sample_index_BT, batch.branch_ids_BT, batch.in_image_BT)
    backend = attention_backend(model.kernels.attention, *where, batch.spans, dtype=embedded.dtype)
    return model.decode(embedded, batch.position_ids_2BT, backend, batch.input_ids_BT, batch.grids)


def our_maps(model: PixelSailForSegmentation, hidden_BTD: Tensor, batch: Batch) -> list[Tensor]:
    """Return the mask logits of every image with the variant's settings."""
    seg_states = hidden_BTD[tuple(batch.seg_positions_N2.unbind(1))]
    mode = model.mask_head_mode()
    per_image = batch.masks_per_image
    _, maps, _, mask_embed = model.embed_masks(
        hidden_BTD, batch.patch_index_BT, batch.grids, per_image, seg_states, mode=mode
    )
    masks = mask_logits_of_images(mask_embed, maps, per_image, kind="folded" if mode == "folded" else "maps")
    return [logits for logits in masks if isinstance(logits, Tensor)]


def elapsed(start: float, device: torch.device) -> float:
    """Return the seconds from `start` until all device work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def operations(way: Way, model: PixelSailForSegmentation, batches: Sequence[Batch]) -> float:
    """Return the floating-point operations of one step, as `planning/flops.py` counts them."""
    total = 0.0
    for batch in batches:
        work = of_batch(batch)
        if way.kernels is None:
            work = replace(work, supervised=work.rows * work.tokens_per_row)
        forward = forward_flops(model.config, work, {}, way.kernels or REFERENCE)
        total += training_flops(forward, model.config, checkpointing=way.checkpointing)["model"]
    return total


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Return the operations per second of a large square matrix product on this machine, best of eight."""
    side = 8192 if device.startswith("cuda") else 1024
    matrix, best = torch.randn(side, side, device=device, dtype=dtype), float("inf")
    for _ in range(8):
        start = time.perf_counter()
        matrix @ matrix
        best = min(best, elapsed(start, matrix.device))
    return 2.0 * side**3 / best


def trainers(options: argparse.Namespace, names: Sequence[str]) -> dict[str, TrainVariant]:
    """Return the trainers of some variants, each with its own model."""
    made = {}
    for name in names:
        way = VARIANTS[name]
        built = build_models(options.size, [4, way.stride], options.device, DTYPES[options.precision])
        model, processor = built[way.stride]
        size_hw = (options.image[0], options.image[1])
        examples = synthetic_examples(processor, options.samples, expressions=options.expressions, size_hw=size_hw)
        per_sequence = 1 if way.kernels is None else options.samples_per_sequence
        batches = [batch.to(options.device) for batch in packed(examples, per_sequence, processor.seg_id)]
        made[name] = TrainVariant(way, model, batches)
    return made


def resident_bytes() -> int:
    """Return the current resident size of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def child(options: argparse.Namespace) -> int:
    """Run two steps of one variant and print the peak memory as JSON."""
    warm_up = {**vars(options), "size": "tiny", "image": (64, 64)}
    trainers(argparse.Namespace(**warm_up), [options.child])[options.child].step()
    device = torch.device(options.device)
    before = resident_bytes() if device.type == "cpu" else 0
    (trainer,) = trainers(options, [options.child]).values()
    for _ in range(2):
        trainer.step()
    print(json.dumps({"before": before, "peak": peak_memory_bytes(device)}))
    return 0


def measured_memory(name: str, arguments: Sequence[str]) -> dict[str, int]:
    """Return the bytes of a process that trains one variant: before the model was built, and at the peak."""
    command = [sys.executable, __file__, *arguments, "--child", name]
    # Freed blocks are returned to the system at once, so that the peak is what is needed and not what the allocator
    # caches.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
    finished = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, int] = json.loads(finished.stdout.strip().splitlines()[-1])
    return found


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Return all measurements by variant."""
    memory = {name: measured_memory(name, arguments) for name in tqdm(options.ways, desc="memory", unit="way")}
    made = trainers(options, options.ways)
    losses = {name: trainer.step() for name, trainer in made.items()}  # the first step warms up
    seconds: dict[str, list[float]] = {name: [] for name in made}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in tqdm(range(options.rounds), desc="rounds", unit="round"):
        for name, trainer in made.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            trainer.step()
            cpu_seconds[name].append(time.process_time() - cpu_start)
            seconds[name].append(elapsed(start, trainer.model.device))
    rate = matmul_rate(options.device, DTYPES[options.precision])
    rows = {}
    for name, trainer in made.items():
        median = statistics.median(seconds[name])
        tokens = sum(int((batch.sample_index_BT >= 0).sum()) for batch in trainer.batches)
        work = operations(trainer.way, trainer.model, trainer.batches)
        rows[name] = {
            "samples_per_second": options.samples / median,
            "tokens_per_second": tokens / median,
            "seconds": {"median": median, "lowest": min(seconds[name]), "highest": max(seconds[name])},
            "cpu_seconds": statistics.median(cpu_seconds[name]),
            "peak_bytes": memory[name]["peak"] - memory[name]["before"],
            "process_bytes": memory[name]["peak"],
            "operations_per_step": work,
            "mfu": work / median / rate,
            "seconds_by_part": trainer.seconds_by_part(),
            "first_loss": losses[name],
        }
    return {"matmul_rate": rate, "ways": rows}


def grown(options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of a step on one sequence at every point of an axis, and the exponents of all variants.

    Exponents are over tokens (for expressions: over their number), between the first and the last point.
    """
    points = []
    for value in tqdm(GROWTH[options.growth], desc=options.growth, unit="point"):
        samples = value if options.growth == "sequence" else 1
        changed = {"samples": samples, "samples_per_sequence": samples}
        changed |= {options.growth: value} if options.growth != "sequence" else {}
        made = trainers(argparse.Namespace(**(vars(options) | changed)), options.ways)
        seconds: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(options.rounds + 1):
            for name, trainer in made.items():
                start = time.perf_counter()
                trainer.step()
                seconds[name].append(elapsed(start, trainer.model.device))
        tokens = sum(int((batch.sample_index_BT >= 0).sum()) for batch in next(iter(made.values())).batches)
        # The first step warms up.
        medians = {name: statistics.median(own[1:]) for name, own in seconds.items()}
        points.append({"value": value, "tokens": tokens, "seconds": medians})
    sizes = [point["value" if options.growth == "expressions" else "tokens"] for point in points]
    exponents = {
        name: math.log(points[-1]["seconds"][name] / points[0]["seconds"][name]) / math.log(sizes[-1] / sizes[0])
        for name in options.ways
    }
    return {"points": points, "sizes": sizes, "exponents": exponents}


def show_growth(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Print the points of an axis, and plot them if requested."""
    print(f"{options.growth:>12s} {'tokens':>8s} " + " ".join(f"{name:>20s}" for name in options.ways) + "   seconds")
    for point in found["points"]:
        seconds = " ".join(f"{point['seconds'][name]:20.3f}" for name in options.ways)
        print(f"{point['value']!s:>12s} {point['tokens']:8d} {seconds}")
    print("growth " + ", ".join(f"{name} {exponent:.2f}" for name, exponent in found["exponents"].items()))
    if options.png:
        costs = {name: [point["seconds"][name] for point in found["points"]] for name in options.ways}
        x_label = "expressions of the image" if options.growth == "expressions" else "tokens of the sequence"
        panel = size_panel(f"a step, by {options.growth}", found["sizes"], costs, x_label=x_label, y_label="seconds")
        save_panels(options.png, [panel], "")


def ratios(found: dict[str, Any]) -> dict[str, Any]:
    """Return ours divided by the released method, and under `ratios` speed and memory of every variant."""
    ours, theirs = found["ways"]["ours"], found["ways"]["released"]
    return {
        "ratios": {
            name: {
                "speed": own["samples_per_second"] / theirs["samples_per_second"],
                "memory": own["peak_bytes"] / theirs["peak_bytes"],
            }
            for name, own in found["ways"].items()
        },
        "speed_ratio": ours["samples_per_second"] / theirs["samples_per_second"],
        "cpu_time_ratio": ours["cpu_seconds"] / theirs["cpu_seconds"],
        "memory_ratio": ours["peak_bytes"] / theirs["peak_bytes"],
        "memory_ratio_with_interpreter": ours["process_bytes"] / theirs["process_bytes"],
        "operations_ratio": ours["operations_per_step"] / theirs["operations_per_step"],
    }


def print_table(result: dict[str, Any]) -> None:
    """Print one line per variant, and its components."""
    print(f"{'way':20s} {'samples/s':>10s} {'seconds (low .. high)':>26s} {'peak MB':>8s} {'TFLOP':>7s} {'MFU':>6s}")
    for name, row in result["ways"].items():
        seconds = row["seconds"]
        span = f"{seconds['median']:.2f} ({seconds['lowest']:.2f} .. {seconds['highest']:.2f})"
        print(
            f"{name:20s} {row['samples_per_second']:10.3f} {span:>26s} {row['peak_bytes'] / 1e6:8.0f} "
            f"{row['operations_per_step'] / 1e12:7.3f} {row['mfu']:6.1%}"
        )
    for name, row in result["ways"].items():
        total = sum(row["seconds_by_part"].values())
        print(f"{name:20s} " + ", ".join(f"{part} {own / total:.0%}" for part, own in row["seconds_by_part"].items()))
    for name, own in result.get("ratios", {}).items():
        print(f"{name:20s} {own['speed']:.2f} times as fast as released, in {own['memory']:.2f} of its memory")
    for name in ("speed_ratio", "cpu_time_ratio", "memory_ratio", "memory_ratio_with_interpreter", "operations_ratio"):
        if name in result:
            print(f"{name} {result[name]:.3f}")


@one_message
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, print the table, and write the requested files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(BENCHMARK_SIZES), default="scaled")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--samples", type=int, default=2, help="samples per optimizer step")
    parser.add_argument(
        "--samples-per-sequence", type=int, default=1, help="samples per packed sequence of ours (released: 1)"
    )
    parser.add_argument("--expressions", type=int, default=5, help="expressions per image")
    parser.add_argument("--image", type=int, nargs=2, default=(480, 640), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=sorted(VARIANTS), default=DEFAULT_WAYS)
    parser.add_argument("--growth", choices=sorted(GROWTH), help="measure scaling along this axis instead")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE", help="of --growth")
    parser.add_argument("--child", choices=sorted(VARIANTS), help=argparse.SUPPRESS)
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    if options.child:
        return child(options)
    if options.png and not options.growth:
        parser.error("--png plots the measurement of --growth; set --growth to an axis")
    found = grown(options) if options.growth else measure(options, given)
    cuda = options.device.startswith("cuda")
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "png", "child")}
    result = {**settings, "device": device, "torch": torch.__version__, "code": code_version(), **found}
    result["kernels"] = {name: asdict(way.kernels) if way.kernels else "released" for name, way in VARIANTS.items()}
    if not options.growth and {"ours", "released"} <= set(options.ways):
        result |= ratios(found)
    print(
        f"{options.size} model, {options.precision}, {device}, image {options.image}, {options.expressions} expressions"
    )
    if options.growth:
        show_growth(options, found)
    else:
        print_table(result)
    if options.json:
        replace_text(options.json, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
