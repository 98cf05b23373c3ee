"""PerBench, for evaluation: region captions, region multiple choice, and referring segmentation with marked regions.

Reads PerBench's three JSON files into `RegionCaption`, `RegionChoice` and `VisualReferring` items. Images are given
without folder and size; the size is that of the masks.

    STBench_Detailed_Caption.json  [{"image_name": "sa_1.jpg", "object_annotations":
                                     [{"segmentation": {"size": [1365, 2048], "counts": "..."}, "caption": "A ..."}]}]
    STBench_MCQ.json               [{"image_name": "sa_1.jpg", "mcqs":
                                     [{"object": {...}, "question": "What ...?\\nA. ...\\n", "answer": "A. ..."}]}]
    STBench_VRES.json              [{"image_name": "sa_1.jpg", "question": "Segment what <obj0> holds.",
                                     "answer": "It is <obj1>.", "segmentations": {"<obj0>": {...}, "<obj1>": {...}}}]

    -> VisualReferring(question="Segment what <Prompt0> holds.", regions=(rle0,), prompt_ids=(0,),
                       answer="It is <obj1>.", targets=(rle1,), ...)

As in the released loader, a tag in the question is a region and never a target, whatever the answer says. Unlike there,
tags are matched as a whole, so `<obj1>` is not found in `<obj10>`, nor obj1 in obj10.
"""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pixel_sail.data.images import image_file
from pixel_sail.data.masks import merge_to_rle
from pixel_sail.data.records import open_records
from pixel_sail.texts import shown
from pixel_sail.types import RLE, DataError, RegionCaption, RegionChoice, SizeHW, VisualReferring

logger = logging.getLogger(__name__)


def load_captions(annotations: str | Path, *, image_dir: str | Path) -> list[RegionCaption]:
    """Return every object of STBench_Detailed_Caption.json in file order. Raises: DataError."""
    result = []
    for number, record, where in _records(annotations):
        for index, item in enumerate(_field(record, "object_annotations", list, where)):
            here = f"{where}, object {index}"
            region = stated_rle(_segmentation(item, "segmentation", here), here)
            result.append(
                RegionCaption(
                    item_id=f"{record['image_name']}/{number}.{index}",
                    image_path=image_file(Path(image_dir), record["image_name"]),
                    image_hw=_size_hw(region),
                    region=region,
                    references=(_field(item, "caption", str, here),),
                )
            )
    return result


def load_choices(annotations: str | Path, *, image_dir: str | Path) -> list[RegionChoice]:
    """Return every question of STBench_MCQ.json in file order. Raises: DataError."""
    result = []
    for number, record, where in _records(annotations):
        for index, item in enumerate(_field(record, "mcqs", list, where)):
            here = f"{where}, question {index}"
            region = stated_rle(_segmentation(item, "object", here), here)
            result.append(
                RegionChoice(
                    item_id=f"{record['image_name']}/{number}.{index}",
                    image_path=image_file(Path(image_dir), record["image_name"]),
                    image_hw=_size_hw(region),
                    region=region,
                    question=_field(item, "question", str, here),
                    answer=_field(item, "answer", str, here),
                )
            )
    return result


def load_visual_referring(annotations: str | Path, *, image_dir: str | Path) -> list[VisualReferring]:
    """Return every record of STBench_VRES.json in file order.

    A tag in the question becomes `<Prompt{k}>`, where k is its index among the record's tags. Tags in the answer but
    not in the question are the targets, in tag order (release: only the first one is scored), so a given region is
    never a target. A record whose answer names only given regions has no target and is skipped. Warnings report how
    many records name a tag in both, how many are skipped, and how many tags are in neither text. Raises: DataError.
    """
    result = []
    num_records = num_repeated = num_left_out = num_tags = num_unused = 0
    for number, record, where in _records(annotations):
        segmentations = _field(record, "segmentations", dict, where)
        rles = [stated_rle(segmentation, f"{where}, {shown(tag)}") for tag, segmentation in segmentations.items()]
        if len({_size_hw(rle) for rle in rles}) != 1:
            sizes = sorted({_size_hw(rle) for rle in rles})
            raise DataError(f"{where}: found masks of sizes {sizes}, expected one size; repair the file")
        tags = _Tags(list(segmentations), where)
        question, answer = (_field(record, key, str, where) for key in ("question", "answer"))
        asked, answered = tags.named_in(question), tags.named_in(answer)
        if not answered:
            raise DataError(
                f"{where}: found answer {shown(answer)}, which names none of {shown(list(segmentations))}; expected "
                "one at least, repair the file"
            )
        targets = [tag for tag in answered if tag not in asked]
        num_records += 1
        num_repeated += len(targets) < len(answered)
        num_tags += len(rles)
        num_unused += len(set(range(len(rles))) - {*asked, *answered})
        if not targets:
            num_left_out += 1
            continue
        result.append(
            VisualReferring(
                item_id=f"{record['image_name']}/{number}",
                image_path=image_file(Path(image_dir), record["image_name"]),
                image_hw=_size_hw(rles[0]),
                question=tags.as_prompts(question),
                regions=tuple(rles[i] for i in asked),
                prompt_ids=tuple(asked),
                answer=answer,
                targets=tuple(rles[i] for i in targets),
            )
        )
    if num_records and not result:
        raise DataError(
            f"{annotations}: found {num_records} records, none with a tag that its answer names and its question does "
            "not; expected one at least, repair the file"
        )
    if num_repeated:
        logger.warning(
            "%s: %d of %d records name a tag in question and answer; there it is a given region and not a target. "
            "%d of them have no other target and are skipped",
            *(annotations, num_repeated, num_records, num_left_out),
        )
    if num_unused:
        logger.warning("%s: %d of %d masks are named in no question or answer", annotations, num_unused, num_tags)
    return result


def stated_rle(segmentation: Any, where: str) -> RLE:
    """Return a checked, compressed RLE from a file that states image sizes nowhere else.

    A list of RLEs is united. Raises: DataError, also for polygons, which do not state the size.
    """
    first = segmentation[0] if isinstance(segmentation, list) and segmentation else segmentation
    size = first.get("size") if isinstance(first, dict) else None
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise DataError(
            f"{where}: found size {shown(size)} of a {type(segmentation).__name__}, expected an RLE with its "
            "[height, width]; repair the file"
        )
    return merge_to_rle([segmentation], (size[0], size[1]), where)


class _Tags:
    """The names of a record's masks in its texts."""

    def __init__(self, tags: list[str], where: str) -> None:
        if "" in tags:
            raise DataError(f"{where}: found a mask without a name, expected a tag as in the texts; repair the file")
        self._number = {tag: number for number, tag in enumerate(tags)}
        # Longer tags first, without adjacent letters or digits, which would make them part of another name.
        longest_first = sorted(tags, key=lambda tag: (-len(tag), tag))
        self._pattern = re.compile("|".join(_whole(tag) for tag in longest_first))

    def named_in(self, text: str) -> list[int]:
        """Return the numbers of the tags in a text, ascending."""
        return sorted({self._number[tag] for tag in self._pattern.findall(text)})

    def as_prompts(self, text: str) -> str:
        """Return the text with `<Prompt{number}>` instead of every tag."""
        return self._pattern.sub(lambda match: f"<Prompt{self._number[match[0]]}>", text)


def _whole(tag: str) -> str:
    before = r"(?<!\w)" if re.match(r"\w", tag[0]) else ""
    after = r"(?!\w)" if re.match(r"\w", tag[-1]) else ""
    return before + re.escape(tag) + after


def _records(annotations: str | Path) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Yield number, record and location of every record; all have an image name."""
    records = open_records(annotations)
    for number, record in enumerate(records):
        where = f"{records.where}[{number}]"
        _field(record, "image_name", str, where)
        yield number, record, where


def _segmentation(record: Any, key: str, where: str) -> Any:
    """Return an RLE or a list of RLEs."""
    is_list = isinstance(record, dict) and isinstance(record.get(key), list)
    return _field(record, key, list if is_list else dict, where)


def _field(record: Any, key: str, kind: type, where: str) -> Any:
    """Return a required, non-empty field of this type."""
    value = record.get(key) if isinstance(record, dict) else None
    if type(value) is not kind or not value:
        raise DataError(
            f"{where}: found {key} = {shown(value)}, expected a {kind.__name__} of content; repair the file"
        )
    return value


def _size_hw(rle: RLE) -> SizeHW:
    height, width = rle["size"]
    return height, width
