"""Builds one sample from questions about marked regions: assigns prompt tokens, adds questions about absent regions.

The visual-prompt sources list their regions with questions and answers. This module samples the prompt ids, marks the
regions and fills in the names. The text of a source has {region} for the region of its turn, or {region0}, {region1},
... for any region of the sample:

    RegionTurn(question="What is {region}?", answer="{region}: a red hat", region=1)
    -> Turn(question="What is <Prompt11>?", answer="<Prompt11>: a red hat")
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pixel_sail.data.prompts import MASK_ONLY, check_fractions, sample_prompt
from pixel_sail.texts import shown
from pixel_sail.types import BoolMask, DataError, Sample, SizeHW, Turn, VisualPrompt

ABSENT_ANSWER = "{region} is not in the image."  # released

_PLACEHOLDER = re.compile(r"\{region(\d*)\}")


@dataclass(frozen=True, kw_only=True)
class RegionSettings:
    """How regions are marked."""

    num_prompts: int = 15
    """Number of the model's prompt tokens; the ids of a sample are sampled from all of them."""
    fractions: Mapping[str, float] = field(default_factory=lambda: dict(MASK_ONLY))
    """Fractions of mask, box, point and scribble."""
    absent_fraction: float = 0.05
    """Probability, per turn, of a preceding question about a prompt that is not painted (once per sample)."""

    def __post_init__(self) -> None:
        """Check the settings. Raises: DataError."""
        check_fractions(self.fractions, "prompt_fractions")
        if not 0.0 <= self.absent_fraction <= 1.0:
            raise DataError(f"absent_fraction: found {self.absent_fraction}, expected 0 .. 1; correct the config")

    def check_count(self, source: str, regions_per_sample: int) -> None:
        """Raise DataError unless samples have at least one region and at most as many as there are prompt tokens."""
        if not 1 <= regions_per_sample <= self.num_prompts:
            raise DataError(
                f"source {source}: found regions_per_sample {regions_per_sample}, expected 1 .. num_prompts = "
                f"{self.num_prompts}; correct the config"
            )


@dataclass(frozen=True, kw_only=True)
class RegionTurn:
    """One question and answer with placeholders."""

    question: str
    answer: str
    region: int | None = None
    """Index into the sample's regions, for {region}."""


def region_sample(
    turns: Sequence[RegionTurn],
    regions: Sequence[BoolMask],
    rng: np.random.Generator,
    settings: RegionSettings,
    *,
    sample_id: str,
    source: str,
    image_path: Path,
    image_hw: SizeHW | None,
    absent_question: Callable[[np.random.Generator], str] | None = None,
) -> Sample:
    """Return the sample of these turns; every region gets a prompt id of its own, sampled at random.

    `absent_question`: template, with {region}, of the question about an absent prompt; None for no such question.
    Raises: DataError when there are more regions than prompt tokens, a region has no pixels, or a turn or placeholder
    refers to a missing region.
    """
    if len(regions) > settings.num_prompts:
        raise DataError(
            f"{sample_id}: found {len(regions)} regions, expected at most {settings.num_prompts}, one per prompt "
            "token; raise the number of visual prompts or sample fewer regions"
        )
    ids = [int(value) for value in rng.permutation(settings.num_prompts)]
    absent = ids[len(regions)] if len(regions) < settings.num_prompts and absent_question is not None else None
    filled: list[Turn] = []
    for turn in turns:
        if absent is not None and absent_question is not None and rng.random() < settings.absent_fraction:
            named = {"": absent}
            filled.append(
                Turn(
                    question=_fill(absent_question(rng), named, sample_id),
                    answer=_fill(ABSENT_ANSWER, named, sample_id),
                )
            )
            absent = None
        named = {str(index): ids[index] for index in range(len(regions))}
        if turn.region is not None:
            # Without this check an index that is too large would name an unpainted prompt without an error.
            if not 0 <= turn.region < len(regions):
                raise DataError(
                    f"{sample_id}: found a turn about region {turn.region}, expected 0 .. {len(regions) - 1}; "
                    "repair the item"
                )
            named[""] = ids[turn.region]
        filled.append(
            Turn(question=_fill(turn.question, named, sample_id), answer=_fill(turn.answer, named, sample_id))
        )
    empty = [index for index, mask in enumerate(regions) if not mask.any()]
    if empty:
        raise DataError(f"{sample_id}: found regions {empty} without pixels, expected at least one; repair the item")
    prompts = tuple(
        VisualPrompt(prompt_id=ids[index], mask=sample_prompt(mask, settings.fractions, rng))
        for index, mask in enumerate(regions)
    )
    return Sample(
        sample_id=sample_id,
        source=source,
        image_path=image_path,
        image_hw=image_hw,
        turns=tuple(filled),
        prompts=prompts,
    )


def _fill(text: str, named: Mapping[str, int], sample_id: str) -> str:
    """Replace every placeholder as a whole, so that region 10 is never read as region 1 and a 0."""

    def token(match: re.Match[str]) -> str:
        if match[1] not in named:
            raise DataError(
                f"{sample_id}: {shown(text)} names {shown(match[0])[1:-1]}, found regions {sorted(named)}; repair "
                "the item"
            )
        return f"<Prompt{named[match[1]]}>"

    return _PLACEHOLDER.sub(token, text)
