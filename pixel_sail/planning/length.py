"""How long a run is: sequences of a step, steps, and the passes over the data that these are.

`training/prepare.py` calls `measured_length` once the data is known, `tools/plan_run.py` before; what comes out
replaces the wishes `optim.epochs` and `data.samples_per_step` in everything behind it. One pass over 2,230,656 samples,
128 to a step, on 32 processes:

    Length(items=2230656, samples_per_sequence=4.0, global_batch_size=32, steps=17427, ...).passes == 1.0

The passes come out as wished for to half a step and to the error of the forecast: the stream of samples has no end, so
that the last step may reach into the next epoch or leave some samples of this one.
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
"""A step that differs from `data.samples_per_step` by more than this fraction is warned of."""


@dataclass(frozen=True, kw_only=True)
class Length:
    """The length of a run, with what it follows from."""

    items: int | None
    """Samples of an epoch, repeats and decontamination counted in; None: not known."""
    forecast: PackingForecast
    is_assumed: bool
    """Whether the forecast is one of assumed samples."""
    global_batch_size: int
    steps: int
    wanted_samples_per_step: int | None
    wanted_passes: float | None

    @property
    def samples_per_step(self) -> float:
        """Return the samples of a step that are expected."""
        return self.global_batch_size * self.forecast.samples_per_sequence

    @property
    def passes(self) -> float | None:
        """Return how often the run goes through the data, as expected."""
        if self.items is None:
            return None
        return self.steps * self.global_batch_size * self.forecast.positions_per_sequence / self.items

    @property
    def is_far_off(self) -> bool:
        """Return whether a step will hold noticeably more or fewer samples than wanted."""
        wanted = self.wanted_samples_per_step
        return wanted is not None and abs(self.samples_per_step / wanted - 1) > FAR_OFF

    @property
    def misses_passes(self) -> bool:
        """Return whether the run will go through the data noticeably more or less often than wanted."""
        wanted, passes = self.wanted_passes, self.passes
        return wanted is not None and passes is not None and abs(passes / wanted - 1) > FAR_OFF


def needs_measured_length(config: TrainConfig) -> bool:
    """Return whether the length of a run is still to be measured."""
    return config.optim.steps is None or config.data.global_batch_size is None


def length_of(
    config: TrainConfig, forecast: PackingForecast, *, items: int | None, group: int, is_assumed: bool
) -> Length:
    """Return the length that follows from a forecast. group: sequences are shared out in multiples of it.

    Raises: ConfigError where passes are wished for and nothing says how many samples an epoch has.
    """
    data, optim = config.data, config.optim
    sequences, steps = data.global_batch_size, optim.steps
    if sequences is None:
        assert data.samples_per_step is not None
        sequences = group * max(round(data.samples_per_step / (forecast.samples_per_sequence * group)), 1)
    if steps is None:
        if items is None:
            raise ConfigError(
                f"optim.epochs is {optim.epochs}, but the files of the data are not looked at and nothing says how "
                "many samples they hold; give data.planned_samples=N, or a number of steps: optim.steps=N "
                "optim.epochs=null"
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
    """Return the length of a run over a mixture, of whose stream some positions are looked at.

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
    """Return the configuration with these numbers in it; what was wished for stays beside them."""
    optim, data = copy(config.optim), copy(config.data)
    optim.steps, data.global_batch_size = steps, global_batch_size
    return replace(config, optim=optim, data=data)


def length_lines(length: Length) -> list[str]:
    """Return what is to be said about the length of a run."""
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
            f"a step is far from {wanted_samples} samples, because its sequences are shared out evenly: another number "
            "of processes, another data.micro_batch_size, or sequences of fewer samples (data.packing.max_samples) "
            "come nearer"
        )
    if length.misses_passes:
        lines.append(
            f"the data are gone through {passes:.3f} times, not {wanted_passes:g}: steps are whole and at least one; "
            "fewer samples in a step (data.samples_per_step, data.global_batch_size) come nearer"
        )
    return lines
