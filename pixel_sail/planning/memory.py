"""Memory of one GPU: between steps, and the peak of a step.

`plan.py` calls `memory_per_gpu` for every ZeRO stage and micro-batch. Bytes per trained parameter, for the settings of
`training/accelerator.py` and `training/optim.py`, with N processes and p = 4 bytes (fp32) or 2 (bf16); a frozen
parameter has only its weight. A moving average of the weights is a third moment, 4 more bytes. Muon's weights have one
moment, 4 bytes less, and stages 1 and 2 temporarily gather them with 2 bytes each:

    | stage | weights | gradients | float32 masters | Adam's moments |
    | none  |    4    |     4     |        0        |       8        |   autocast keeps copies of 2 under bf16
    | 0     |    p    |     p     | 4 (bf16 only)   |       8        |
    | 1     |    p    |     p     |      4 / N      |     8 / N      |
    | 2     |    p    |   p / N   |      4 / N      |     8 / N      |
    | 3     |  p / N  |   p / N   |      4 / N      |     8 / N      |   and the parameters gathered at the moment

Offloaded masters, moments and parameters are in host memory instead. Under autocast some activations remain float32,
which is not counted, so the first row is too small for bf16.
"""

from dataclasses import dataclass

from pixel_sail.config import DeepSpeedConfig
from pixel_sail.model.configuration_pixel_sail import Architecture
from pixel_sail.planning.activations import FLOAT32
from pixel_sail.planning.parameters import layer_parameters

BUCKET_ELEMENTS = 50_000_000
"""`reduce_bucket_size` and ZeRO-3's prefetch bucket, see training/accelerator.py."""

RUNTIME_BYTES = 1.5e9
"""CUDA context, NCCL buffers, cuBLAS workspace. Assumed, not measured."""

FRAGMENTATION = 0.05
"""Fraction of the rest that the allocator cannot use. Assumed."""


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Bytes of the persistent training state, gradients and buffers."""

    weights: float
    masters: float
    moments: float
    gradients: float
    buckets: float
    """Flat communication buffers, and with ZeRO-3 the gathered parameters."""
    step_extra: float
    """Temporaries of the optimizer step, when activations are freed."""

    @property
    def persistent(self) -> float:
        """Return the bytes between two steps."""
        return self.weights + self.masters + self.moments


@dataclass(frozen=True, kw_only=True)
class GpuMemory:
    """Peak memory of one GPU during a step, bytes."""

    state: TrainingState
    activations: float
    peak: float


def training_state(
    num_parameters: int,
    config: DeepSpeedConfig,
    *,
    precision: str,
    world_size: int,
    largest_gathered: int,
    trained: int | None = None,
    orthogonal: int = 0,
    is_averaged: bool = False,
) -> TrainingState:
    """Return the training state of one process of `world_size`.

    `largest_gathered`: parameters of the largest module, for ZeRO-3. `trained`: how many parameters are not frozen, by
    default all; `orthogonal`: how many of them are Muon's.
    """
    held, is_half = float(num_parameters), precision == "bf16"
    count = held if trained is None else float(trained)
    moments = moment_bytes(count, orthogonal=orthogonal, is_averaged=is_averaged)
    if not config.enabled:
        return TrainingState(
            weights=4 * held,
            masters=0.0,
            moments=moments,
            gradients=4 * count,
            buckets=(4 * count if world_size > 1 else 0.0) + (2 * held if is_half else 0.0),
            step_extra=4 * count,
        )
    element = 2 if is_half else FLOAT32
    fraction = count / world_size
    bucket = float(BUCKET_ELEMENTS * element)  # allocated whole, however small the model
    if config.stage == 0:
        return TrainingState(
            weights=element * held,
            masters=4 * count if is_half else 0.0,
            moments=moments,
            gradients=element * count,
            buckets=min(bucket, element * count) if world_size > 1 else 0.0,
            step_extra=(8 if is_half else 4) * count,
        )
    on_gpu = 0.0 if config.offload_optimizer else 1.0
    gathered = min(num_parameters, largest_gathered + BUCKET_ELEMENTS) * element
    is_sharded = config.stage == 3
    return TrainingState(
        weights=0.0
        if is_sharded and config.offload_parameters
        else element * (held / world_size if is_sharded else held),
        masters=on_gpu * 4 * fraction,
        moments=on_gpu * moments / world_size,
        gradients=element * (count if config.stage == 1 else fraction),
        buckets=bucket + (gathered if is_sharded else 0.0),
        step_extra=on_gpu * 8 * fraction + 2 * orthogonal,
    )


def moment_bytes(trained: float, *, orthogonal: int = 0, is_averaged: bool = False) -> float:
    """Return the bytes of all float32 moments: two per weight of AdamW, one per weight of Muon, plus the average."""
    return FLOAT32 * ((3 if is_averaged else 2) * trained - orthogonal)


def largest_module(architecture: Architecture) -> int:
    """Return the parameters of the largest module that ZeRO-3 gathers: the embedding or a decoder layer."""
    return max(architecture.vocab_size * architecture.hidden_size, layer_parameters(architecture))


def memory_per_gpu(state: TrainingState, *, activations: float, masks_and_points: float) -> GpuMemory:
    """Return the peak memory: that of the backward pass or of the optimizer step.

    `masks_and_points`: temporaries of the largest image's mask losses.
    """
    backward = state.gradients + state.buckets + activations + masks_and_points
    step = state.gradients + state.step_extra
    used = state.persistent + max(backward, step)
    return GpuMemory(state=state, activations=activations, peak=used * (1 + FRAGMENTATION) + RUNTIME_BYTES)


def mask_loss_temporaries(image_areas: list[int], masks: list[int], num_candidates: int) -> float:
    """Return the maximum temporary bytes of an image's mask losses: float32 masks, and candidate points with their
    coordinates, values and order."""
    per_image = [count * (5 * area + 40 * num_candidates) for area, count in zip(image_areas, masks, strict=True)]
    return float(max(per_image, default=0))
