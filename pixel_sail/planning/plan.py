"""The plan of a run: estimated size, time, memory and disk space, as a JSON-compatible dictionary and as text.

`tools/plan_run.py` calls `make_plan` with a configuration, micro-batches of its data (measured or assumed) and the
machine, then prints `plan_text`:

    make_plan(...)["time"] == {"gpus": 32, "mfu": 0.4, "step_seconds": 0.374, "hours": 2.08, "gpu_hours": 66.5, ...}
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from pixel_sail.config import ConfigError, DeepSpeedConfig, TrainConfig
from pixel_sail.model.attention_backends import resolve_attention
from pixel_sail.model.kernels import Kernels
from pixel_sail.planning import disk, flops, memory
from pixel_sail.planning.activations import activation_bytes
from pixel_sail.planning.assumed import USUAL_HW, Assumptions
from pixel_sail.planning.length import Length, length_lines
from pixel_sail.planning.parameters import TrainingParts, parameter_counts
from pixel_sail.planning.workload import Workload, mean

PLANNED_TFLOPS = {"h100": 989.0, "h200": 989.0, "a100": 312.0, "4090": 165.0, "cpu": 0.1}
"""Dense bf16 TFLOP/s with float32 accumulation, from the vendors' data sheets; cpu: order of magnitude, two cores."""

GPU_MEMORY_GB = {"h100": 80.0, "h200": 141.0, "a100": 80.0, "4090": 24.0, "cpu": 16.0}

FP32_SLOWDOWN = {"h100": 2.0, "h200": 2.0, "a100": 2.0, "4090": 2.0, "cpu": 1.0}
"""Slowdown of float32 products relative to bf16 with TF32; without TF32 far more."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine of a plan."""

    gpu: str = "h100"
    gpus: int = 8
    mfu: float = 0.4
    """Model FLOPs utilization: fraction of the peak that the model's FLOPs reach."""
    peak_tflops: float | None = None
    """None: peak of the GPU."""

    def __post_init__(self) -> None:
        """Check the choices. Raises: ConfigError."""
        if self.gpu not in PLANNED_TFLOPS:
            raise ConfigError(f"gpu is {self.gpu!r}, expected one of {sorted(PLANNED_TFLOPS)}, or give peak_tflops=")
        if self.gpus < 1 or not 0.0 < self.mfu <= 1.0 or (self.peak_tflops is not None and self.peak_tflops <= 0):
            raise ConfigError(
                f"gpus is {self.gpus}, mfu {self.mfu}, peak_tflops {self.peak_tflops}; expected at least 1, a fraction "
                "in (0, 1] and a positive number"
            )

    def kernels(self, config: TrainConfig) -> Kernels:
        """Return the configured kernels with attention `auto` resolved for this machine."""
        device = torch.device("cpu" if self.gpu == "cpu" else "cuda")
        dtype = torch.bfloat16 if config.optim.precision == "bf16" else torch.float32
        return replace(config.kernels, attention=resolve_attention(config.kernels.attention, device, dtype))

    def operations_per_second(self, precision: str) -> float:
        """Return the FLOP/s of all GPUs at this MFU."""
        peak = PLANNED_TFLOPS[self.gpu] if self.peak_tflops is None else self.peak_tflops
        slowdown = FP32_SLOWDOWN[self.gpu] if precision == "fp32" else 1.0
        return self.gpus * self.mfu * peak * 1e12 / slowdown


def make_plan(
    config: TrainConfig,
    works: Sequence[Workload],
    machine: Machine,
    *,
    length: Length,
    assumptions: Assumptions | None,
    training_parts: TrainingParts | None = None,
) -> dict[str, Any]:
    """Return the plan.

    works: micro-batches of the configured size, from real data or assumed (then `assumptions` says how); the
    vocabulary must be filled in. length: sequences of a step and steps. training_parts: what is trained, by default
    everything and without adapters.
    Raises: ConfigError when the sequences of a step cannot be shared out over the GPUs.
    """
    rows, per_step = config.data.micro_batch_size, length.global_batch_size
    if per_step % (machine.gpus * rows):
        raise ConfigError(
            f"data.global_batch_size is {per_step}, expected a multiple of {machine.gpus * rows}: {machine.gpus} GPUs "
            f"times data.micro_batch_size={rows}"
        )
    architecture, teachers = config.model.architecture, config.distillation
    counts = parameter_counts(architecture, teachers)
    own = training_parts or TrainingParts(adapters=0, trained=sum(counts.values()))
    counts["adapters"] = own.adapters
    num_parameters, micro_batches = sum(counts.values()), per_step // rows
    forward = [flops.forward_flops(architecture, work, teachers, config.kernels) for work in works]
    parts = {name: micro_batches * mean([getattr(one, name) for one in forward]) for name in vars(forward[0])}
    step = flops.ForwardFlops(**parts)
    teacher_flops = _teacher_flops(config, works, micro_batches)
    training = flops.training_flops(step, architecture, checkpointing=config.optim.activation_checkpointing)
    seconds = (training["model"] + sum(cost or 0.0 for cost in teacher_flops.values())) / machine.operations_per_second(
        config.optim.precision
    ) + training["recomputed"] / machine.operations_per_second(config.optim.precision)
    tokens = micro_batches * mean([work.real_tokens for work in works])
    return {
        "name": config.name,
        "data": {"source": "assumed" if assumptions else "measured", **_data_numbers(works, micro_batches)},
        "assumptions": asdict(assumptions) if assumptions else None,
        "length": {
            **asdict(length),
            "samples_per_step": length.samples_per_step,
            "passes": length.passes,
            "lines": length_lines(length),
        },
        "parameters": {**counts, "total": num_parameters, "trained": own.trained},
        "flops": {
            "forward": parts,
            "step": training["model"],
            "recomputed": training["recomputed"],
            "teachers": teacher_flops,
            "with_minimal_attention": flops.BACKWARD_AND_FORWARD
            * (step.total - step.attention + step.attention_minimal),
        },
        "time": {
            **asdict(machine),
            "steps": length.steps,
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "hours": length.steps * seconds / 3600,
            "gpu_hours": length.steps * seconds / 3600 * machine.gpus,
        },
        "memory": _memory_rows(config, works, machine, num_parameters, own),
        "disk": _disk(config, counts, own, assumptions or Assumptions()),
    }


def _teacher_flops(config: TrainConfig, works: Sequence[Workload], micro_batches: int) -> dict[str, float | None]:
    costs = [flops.teacher_flops(work, config.distillation) for work in works]
    means: dict[str, float | None] = {}
    for name in config.distillation:
        known = [cost[name] for cost in costs]
        means[name] = None if None in known else micro_batches * mean([value or 0.0 for value in known])
    return means


def _data_numbers(works: Sequence[Workload], micro_batches: int) -> dict[str, float]:
    tokens = sum(work.real_tokens for work in works)
    slots = sum(work.rows * work.tokens_per_row for work in works)
    return {
        "micro_batches_looked_at": len(works),
        "tokens": micro_batches * mean([work.real_tokens for work in works]),
        "samples": micro_batches * mean([work.samples for work in works]),
        "images": micro_batches * mean([len(work.images) for work in works]),
        "masks": micro_batches * mean([work.num_masks for work in works]),
        "supervised_tokens": micro_batches * mean([work.supervised for work in works]),
        "supervised_fraction": sum(work.supervised for work in works) / tokens,
        "padding": 1 - tokens / slots,
    }


def _memory_rows(
    config: TrainConfig, works: Sequence[Workload], machine: Machine, num_parameters: int, parts: TrainingParts
) -> list[dict[str, Any]]:
    """Return one row per possible ZeRO stage and one without; activations are those of the largest micro-batch."""
    architecture, precision = config.model.architecture, config.optim.precision
    points = config.loss.points
    candidates = round(points.num_points * points.oversample_ratio)
    kept = max(
        (
            activation_bytes(
                architecture,
                work,
                element=2 if precision == "bf16" else 4,
                num_points=points.num_points,
                checkpointing=config.optim.activation_checkpointing,
                kernels=machine.kernels(config),
            )
            for work in works
        ),
        key=lambda one: one.total,
    )
    temporaries = max(
        memory.mask_loss_temporaries(
            [image.image_hw[0] * image.image_hw[1] for image in work.images],
            [image.masks for image in work.images],
            candidates,
        )
        for work in works
    )
    rows = []
    plain = DeepSpeedConfig(enabled=False)
    stages = (0, 1, 2) if config.optim.optimizer == "muon" else (0, 1, 2, 3)
    staged = [replace(config.deepspeed, enabled=True, stage=stage) for stage in stages]
    for deepspeed in (plain, *staged):
        state = memory.training_state(
            num_parameters,
            deepspeed,
            precision=precision,
            world_size=machine.gpus,
            largest_gathered=memory.largest_module(architecture),
            trained=parts.trained,
            orthogonal=parts.orthogonal,
            is_averaged=config.optim.ema_decay > 0,
        )
        gpu = memory.memory_per_gpu(state, activations=kept.total, masks_and_points=temporaries)
        is_chosen = deepspeed.enabled == config.deepspeed.enabled and (
            not deepspeed.enabled or deepspeed.stage == config.deepspeed.stage
        )
        rows.append(
            {
                "sharding": f"zero{deepspeed.stage}" if deepspeed.enabled else "none",
                "chosen": is_chosen,
                **asdict(state),
                "activations": asdict(kept),
                "activations_total": kept.total,
                "mask_temporaries": temporaries,
                "peak": gpu.peak,
                "fits": gpu.peak <= GPU_MEMORY_GB[machine.gpu] * 1e9,
            }
        )
    return rows


def _disk(
    config: TrainConfig, counts: dict[str, int], parts: TrainingParts, assumptions: Assumptions
) -> dict[str, Any]:
    total = sum(counts.values())
    checkpoint = disk.checkpoint_bytes(
        total, trained=parts.trained, orthogonal=parts.orthogonal, is_averaged=config.optim.ema_decay > 0
    )
    exported = total - counts["distill_head"] - counts["adapters"]
    return {
        "checkpoint": checkpoint,
        "checkpoints_kept": config.checkpoint.keep,
        "run_folder": disk.run_folder_bytes(checkpoint, exported=exported, keep=config.checkpoint.keep),
        "teacher_cache_per_100k_images": disk.all_cache_bytes(
            config.model.architecture, config.distillation, assumptions.image_hw or USUAL_HW, 100_000
        ),
    }


def plan_text(plan: dict[str, Any]) -> str:
    """Return the plan as text."""
    data, time, counts, work = plan["data"], plan["time"], plan["parameters"], plan["flops"]
    lines = [f"run {plan['name']}", "", "parameters"]
    lines += [f"  {name:20}{count:>16,}" for name, count in counts.items() if count]
    lines += ["", "length", *(f"  {line}" for line in plan["length"]["lines"])]
    lines += ["", f"one step, {data['source']}" + ("" if data["source"] == "assumed" else " on the data")]
    if plan["assumptions"]:
        lines += [
            "  assumed: "
            + ", ".join(f"{key}={'COCO' if value is None else value}" for key, value in plan["assumptions"].items())
        ]
    lines += [
        f"  {data['tokens']:,.0f} tokens in {data['samples']:,.0f} samples, {data['images']:,.0f} images, "
        f"{data['masks']:,.0f} masks",
        f"  {data['supervised_fraction']:.1%} of the tokens supervised, {data['padding']:.1%} padding",
        "",
        "operations of one step, TFLOP     forward   with backward",
    ]
    for name, value in work["forward"].items():
        if value:
            note = "   (visible pairs only; not counted below)" if name == "attention_minimal" else ""
            lines.append(f"  {name:28}{value / 1e12:11.3f}{3 * value / 1e12:16.3f}{note}")
    lines.append(f"  {'model':28}{'':11}{work['step'] / 1e12:16.3f}")
    if work["recomputed"]:
        lines.append(f"  {'computed again':28}{'':11}{work['recomputed'] / 1e12:16.3f}")
    for name, cost in work["teachers"].items():
        said = "      not known" if cost is None else f"{cost / 1e12:16.3f}"
        lines.append(f"  {'teacher ' + name:28}{'':11}{said}")
    peak = time["peak_tflops"] or PLANNED_TFLOPS[time["gpu"]]
    lines += [
        "",
        f"time on {time['gpus']} x {time['gpu']} ({peak:g} TFLOP/s) at an MFU of {time['mfu']:g}",
        f"  {time['step_seconds']:.3f} s a step, {time['tokens_per_second']:,.0f} tokens/s",
        f"  {time['steps']:,} steps: {time['hours']:.2f} h, {time['gpu_hours']:.1f} GPU-hours",
        "",
        "memory per GPU, GB",
        f"  {'':7}{'weights':>9}{'masters':>9}{'moments':>9}{'grads':>8}{'buckets':>9}{'activations':>13}{'peak':>8}",
    ]
    for row in plan["memory"]:
        columns = [row[key] / 1e9 for key in ("weights", "masters", "moments", "gradients", "buckets")]
        lines.append(
            f"{'>' if row['chosen'] else ' '} {row['sharding']:7}"
            + "".join(f"{value:{width}.2f}" for value, width in zip(columns, (9, 9, 9, 8, 9), strict=True))
            + f"{row['activations_total'] / 1e9:13.2f}{row['peak'] / 1e9:8.1f}"
            + ("" if row["fits"] else f"   more than {GPU_MEMORY_GB[time['gpu']]:g} GB")
        )
    kept = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in plan["memory"][0]["activations"].items())
    lines += [f"  activations: {kept}", "", "disk, GB"]
    lines.append(
        f"  checkpoint {plan['disk']['checkpoint'] / 1e9:.2f}, run folder at most",
    )
    lines[-1] += f" {plan['disk']['run_folder'] / 1e9:.2f} (keeps {plan['disk']['checkpoints_kept']})"
    for name, size in plan["disk"]["teacher_cache_per_100k_images"].items():
        lines.append(f"  cache of teacher {name}: {size / 1e9:.1f} for 100,000 images, int8")
    return "\n".join(lines)
