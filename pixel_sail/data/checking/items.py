"""Checks the items of any source by sampling them, as training does.

`evaluation/data_check.py` calls `check_items` with a source. The existence of every image is checked; a sample of the
items is read, opened and measured, and every failing item is reported. Example:

    osprey/conversation/17   item   the mask of turn 0 is (480, 640), expected (427, 640)
"""

import os
import re
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pixel_sail.data.checking.contamination import contamination_key
from pixel_sail.data.checking.files import ABSENT_IMAGE, ABSENT_IMAGES, check_image
from pixel_sail.data.checking.findings import FindingKind, Findings, Lengths, SoundFraction
from pixel_sail.data.images import load_image
from pixel_sail.data.remarks import Remark, collect_remarks
from pixel_sail.data.templates.referring import NO_TARGET_ANSWER
from pixel_sail.model.tokenization import SEG_TOKEN
from pixel_sail.types import BoolMask, DataError, Sample, Source

_PROMPT_TAG = re.compile(r"<Prompt(\d+)>")


@dataclass(kw_only=True)
class ItemCheck:
    """Results over the items of a source; defects are added to the `Findings` argument."""

    image_keys: set[str] = field(default_factory=set)
    """Key of every image of the source."""
    images: SoundFraction = field(default_factory=SoundFraction)
    masks: SoundFraction = field(default_factory=SoundFraction)
    empty_masks: int = 0
    text_lengths: list[int] = field(default_factory=list)
    """Number of characters of every sampled question and answer."""
    seconds: list[float] = field(default_factory=list)
    shown: list[Sample] = field(default_factory=list)
    """A few sound samples, to render."""

    @property
    def texts(self) -> Lengths | None:
        """Return the summary of the text lengths."""
        return Lengths.of(self.text_lengths)

    @property
    def milliseconds(self) -> float | None:
        """Return the mean time to sample one item and open its image."""
        return 1000 * float(np.mean(self.seconds)) if self.seconds else None


def check_items(
    source: Source, findings: Findings, *, sample: int | None, num_shown: int, seed: int = 0, progress: bool
) -> ItemCheck:
    """Check the images of a source and `sample` of its items, or all items if it is None."""
    result = ItemCheck()
    _find_images(source, result, findings, progress)
    indices = chosen_items(len(source), sample, seed)
    with collect_remarks() as heard:
        for index in tqdm(indices, desc=f"{source.name}: items", disable=not progress, leave=False):
            _check_item(source, index, result, findings, num_shown=num_shown, seed=seed)
    note_remarks(heard, findings)
    return result


def note_remarks(heard: Iterable[Remark], findings: Findings) -> None:
    """Add the remarks of the readers."""
    for remark in heard:
        findings.note(FindingKind.REMARK, remark.where, f"{remark.topic}: {remark.message}")


def _check_item(
    source: Source, index: int, result: ItemCheck, findings: Findings, *, num_shown: int, seed: int
) -> None:
    """Sample one item, open its image and measure it."""
    start = time.perf_counter()
    try:
        item = source.get(index, np.random.default_rng([seed, index]))
    except DataError as error:
        findings.trouble(FindingKind.ITEM, f"{source.name} item {index}", str(error))
        return
    is_open = item.image_path is None or _opens(item, result, findings)
    seconds = time.perf_counter() - start
    if not is_open:
        return
    result.seconds.append(seconds)
    result.text_lengths += [len(text) for turn in item.turns for text in (turn.question, turn.answer)]
    is_sound = check_sample(item, result, findings)
    if is_sound and len(result.shown) < num_shown:
        result.shown.append(item)


def chosen_items(size: int, sample: int | None, seed: int) -> list[int]:
    """Return the numbers of the items to check, in order."""
    if sample is None or size <= sample:
        return list(range(size))
    return sorted(int(index) for index in np.random.default_rng(seed).choice(size, size=sample, replace=False))


def _find_images(source: Source, result: ItemCheck, findings: Findings, progress: bool) -> None:
    """Check the existence of every image once; images of a missing folder are reported together."""
    folders: dict[Path, bool] = {}
    seen: set[Path] = set()
    for index in tqdm(range(len(source)), desc=f"{source.name}: images", disable=not progress, leave=False):
        try:
            path = source.image_path(index)
        except DataError as error:
            findings.trouble(FindingKind.ITEM, f"{source.name} item {index}", str(error))
            continue
        if path is None or path in seen:
            continue
        seen.add(path)
        result.image_keys.add(contamination_key(path))
        if path.parent not in folders:
            folders[path.parent] = path.parent.is_dir()
        if not folders[path.parent]:
            findings.trouble(FindingKind.MISSING_FILE, path.parent, ABSENT_IMAGES)
        elif not os.path.isfile(path):  # Path.is_file raises for names that are too long.
            findings.trouble(FindingKind.MISSING_IMAGE, path, ABSENT_IMAGE)


def _opens(item: Sample, result: ItemCheck, findings: Findings) -> bool:
    """Open the image of a sample once; check it in detail if that fails."""
    assert item.image_path is not None
    if not item.image_path.parent.is_dir():
        return False
    try:
        load_image(item.image_path, where=item.sample_id, expected_hw=item.image_hw)
    except DataError:
        check_image(item.image_path, item.image_hw, findings)
        result.images += SoundFraction(checked=1)
        return False
    result.images += SoundFraction(checked=1, sound=1)
    return True


def check_sample(item: Sample, result: ItemCheck, findings: Findings) -> bool:
    """Return whether a sample can be trained on; report defects of its texts, masks and prompts."""
    problems: list[tuple[FindingKind, str]] = []
    if not item.turns:
        problems.append((FindingKind.ITEM, "found no question, expected at least one turn"))
    for number, turn in enumerate(item.turns):
        if not turn.question.strip() or not turn.answer.strip():
            problems.append((FindingKind.EMPTY_TEXT, f"turn {number}: found an empty question or answer"))
        num_places = turn.answer.count(SEG_TOKEN)
        if num_places != len(turn.masks) or SEG_TOKEN in turn.question:
            found = f"turn {number}: found {num_places} {SEG_TOKEN} and {len(turn.masks)} masks"
            problems.append((FindingKind.ITEM, f"{found}, expected as many, all in the answer"))
        for mask in turn.masks:
            may_be_empty = turn.answer == NO_TARGET_ANSWER
            problems += _mask_problems(mask, item, f"turn {number}", result, may_be_empty=may_be_empty)
        if turn.ignored is not None and turn.ignored.shape != (item.image_hw or turn.ignored.shape):
            problems.append((FindingKind.MASK_SIZE, f"turn {number}: found ignored pixels {turn.ignored.shape}"))
    for prompt in item.prompts:
        problems += _mask_problems(prompt.mask, item, f"<Prompt{prompt.prompt_id}>", result, may_be_empty=False)
    painted = Counter(prompt.prompt_id for prompt in item.prompts)
    if any(count > 1 for count in painted.values()):
        problems.append((FindingKind.ITEM, f"found prompt ids {sorted(painted.elements())}, expected each once"))
    named = {int(tag) for turn in item.turns for tag in _PROMPT_TAG.findall(turn.question + turn.answer)}
    if set(painted) - named:
        problems.append((FindingKind.ITEM, f"found marked prompts {sorted(set(painted) - named)} that no text names"))
    if item.image_path is None and (item.prompts or any(turn.masks for turn in item.turns)):
        problems.append((FindingKind.ITEM, "found masks or prompts without an image"))
    for kind, message in problems:
        findings.trouble(kind, item.sample_id, message)
    return not problems


def _mask_problems(
    mask: BoolMask, item: Sample, where: str, result: ItemCheck, *, may_be_empty: bool
) -> list[tuple[FindingKind, str]]:
    """Return the defects of a mask, and count it."""
    problems = []
    if mask.dtype != np.bool_ or mask.ndim != 2 or mask.shape != (item.image_hw or mask.shape):
        found = f"{where}: found a mask of {mask.shape} {mask.dtype}"
        problems.append(
            (FindingKind.MASK_SIZE, f"{found}, expected bool of {item.image_hw} (height, width of the image)")
        )
    elif not mask.any() and not may_be_empty:
        result.empty_masks += 1
        problems.append((FindingKind.EMPTY_MASK, f"{where}: found a mask without a pixel, expected at least one"))
    result.masks += SoundFraction(checked=1, sound=int(not problems))
    return problems
