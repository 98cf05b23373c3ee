"""Computes the length of a run: sequences per step and steps, from epochs and samples per step.

`training/prepare.py` and `tools/plan_run.py` call it; the result replaces the settings `optim.epochs` and
`data.samples_per_step`. One epoch of 2,230,656 samples with 128 samples per step, on 32 processes:

    Length(items=2230656, samples_per_sequence=4.0, global_batch_size=32, steps=17427, ...).passes == 1.0

The number of passes is exact up to half a step and the error of the forecast. The stream of samples is infinite, so the
last step may reach into the next epoch or omit some samples of this one.
"""

import logging
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace

from pixel_sail.config import ConfigError, TrainConfig
from pixel_sail.data.mixture import Mixture
from pixel_sail.data.packing_forecast import MAX_POSITIONS, PackingForecast, forecast_packing
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.types import Example

logger = logging.getLogger(__name__)

FAR_OFF = 0.05
"""Relative difference from `data.samples_per_step` or `optim.epochs` above which there is a warning."""


@dataclass(frozen=True, kw_only=True)
class Length:
    """The length of a run and the numbers it was computed from."""

    items: int | None
    """Samples per epoch, with repeats and after decontamination. None: unknown."""
    forecast: PackingForecast
    is_assumed: bool
    """Whether the forecast is based on assumed samples."""
    global_batch_size: int
    steps: int
    wanted_samples_per_step: int | None
    wanted_passes: float | None

    @property
    def samples_per_step(self) -> float:
        """Return the expected samples per step."""
        return self.global_batch_size * self.forecast.samples_per_sequence

    @property
    def passes(self) -> float | None:
        """Return the expected passes over the data."""
        if self.items is None:
            return None
        return self.steps * self.global_batch_size * self.forecast.positions_per_sequence / self.items

    @property
    def is_far_off(self) -> bool:
        """Return whether the samples per step differ noticeably from the setting."""
        wanted = self.wanted_samples_per_step
        return wanted is not None and abs(self.samples_per_step / wanted - 1) > FAR_OFF

    @property
    def misses_passes(self) -> bool:
        """Return whether the passes over the data differ noticeably from the setting."""
        wanted, passes = self.wanted_passes, self.passes
        return wanted is not None and passes is not None and abs(passes / wanted - 1) > FAR_OFF


def needs_measured_length(config: TrainConfig) -> bool:
    """Return whether the length of a run must be measured."""
    return config.optim.steps is None or config.data.global_batch_size is None


def length_of(
    config: TrainConfig, forecast: PackingForecast, *, items: int | None, group: int, is_assumed: bool
) -> Length:
    """Return the length of a run for a forecast. group: sequences per step are a multiple of it.

    Raises: ConfigError if epochs are set and the samples of an epoch are unknown.
    """
    data, optim = config.data, config.optim
    sequences, steps = data.global_batch_size, optim.steps
    if sequences is None:
        assert data.samples_per_step is not None
        sequences = group * max(round(data.samples_per_step / (forecast.samples_per_sequence * group)), 1)
    if steps is None:
        if items is None:
            raise ConfigError(
                f"optim.epochs is {optim.epochs}, but the data files are not read and their number of samples is "
                "unknown; set data.planned_samples=N, or a number of steps: optim.steps=N optim.epochs=null"
            )
        assert optim.epochs is not None
        steps = max(round(optim.epochs * items / (forecast.positions_per_sequence * sequences)), 1)
    return Length(
        items=items,
        forecast=forecast,
        is_assumed=is_assumed,
        global_batch_size=sequences,
        steps=steps,
        wanted_samples_per_step=data.samples_per_step,
        wanted_passes=optim.epochs,
    )


def measured_length(
    config: TrainConfig,
    mixture: Mixture,
    processor: PixelSailProcessor,
    *,
    group: int,
    cost: Callable[[Example], float],
    max_positions: int = MAX_POSITIONS,
) -> Length:
    """Return the length of a run over a mixture, measured on some positions of its stream.

    Raises: DataError, as training would for these samples.
    """
    forecast = forecast_packing(
        mixture,
        processor,
        config.data.packing,
        max_skipped_fraction=config.data.max_skipped_fraction,
        cost=cost,
        max_positions=max_positions,
    )
    return length_of(config, forecast, items=mixture.epoch_length, group=group, is_assumed=False)


def with_length(config: TrainConfig, *, global_batch_size: int, steps: int) -> TrainConfig:
    """Return the configuration with these numbers; epochs and samples per step keep their values."""
    optim, data = copy(config.optim), copy(config.data)
    optim.steps, data.global_batch_size = steps, global_batch_size
    return replace(config, optim=optim, data=data)


def length_lines(length: Length) -> list[str]:
    """Return a description of the length of a run."""
    forecast, items, passes = length.forecast, length.items, length.passes
    kind = "assumed samples" if length.is_assumed else "samples"
    known = "a number of samples that is not known" if items is None else f"{items:,} {kind}"
    error = 100 * forecast.standard_error / forecast.samples_per_sequence
    wanted_samples, wanted_passes = length.wanted_samples_per_step, length.wanted_passes
    lines = [
        f"an epoch: {known}; {forecast.samples_per_sequence:.2f} of them in a sequence (standard error {error:.1f} %, "
        f"from {forecast.num_positions:,} {kind})",
        f"a step: {length.global_batch_size} sequences, {length.samples_per_step:.1f} samples expected"
        + ("" if wanted_samples is None else f" ({wanted_samples} wanted)"),
        f"the run: {length.steps:,} step{'' if length.steps == 1 else 's'}"
        + ("" if passes is None else f", {passes:.3f} passes")
        + ("" if wanted_passes is None else f" ({wanted_passes:g} wanted)"),
    ]
    if length.is_far_off:
        lines.append(
            f"a step is far from {wanted_samples} samples, because its sequences are distributed evenly; change the "
            "number of processes or data.micro_batch_size, or put fewer samples into a sequence "
            "(data.packing.max_samples)"
        )
    if length.misses_passes:
        lines.append(
            f"the run makes {passes:.3f} passes over the data, not {wanted_passes:g}, because the number of steps is "
            "rounded; use fewer samples per step (data.samples_per_step, data.global_batch_size)"
        )
    return lines
