"""LLaVA-1.5's instruction mix: conversations about whole images, and without any image.

Place in the flow: llava_v1_5_mix665k.json (665k records, 1 GB) -> here -> `Sample` without masks.

    {"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "conversations": [{"from": "human", "value":
     "<image>\\nWhat are the colors of the bus?"}, {"from": "gpt", "value": "White and red."}, ...]}

    -> Sample(image_path=image_dir / "coco/train2017/000000033471.jpg", turns=(Turn(question="What are the colors of the
       bus?", answer="White and red."), ...)); a record without "image" gives a sample without one.

What the released loader got wrong, and what happens here:
- long conversations were cut within a word of an answer, which a model then learned to stop at, and what followed was
  never seen: they are divided between turns into parts of up to `max_text_bytes`, of which one is drawn;
- messages of one side in a row: see `data/conversations.py`.
"""

from pathlib import Path
from typing import Any

import numpy as np

from pixel_sail.data.conversations import conversation_turns
from pixel_sail.data.images import image_file
from pixel_sail.data.records import Records, open_records
from pixel_sail.texts import shown
from pixel_sail.types import DataError, Sample, Source, Turn


def load(
    *, annotations: str | Path, image_dir: str | Path, name: str = "llava_mix665k", max_text_bytes: int = 12_000
) -> Source:
    """Return the file as a training source.

    annotations: the JSON file. image_dir: folder that the paths of the records start from. max_text_bytes: most text
    of a sample with several turns, in bytes of UTF-8, of which a token takes 3 to 4 in English, 1 at least; the default
    is about 3500 tokens. A single longer turn stays whole. Raises: DataError, ValueError.
    """
    if max_text_bytes < 1:
        raise ValueError(
            f"source {name}: found max_text_bytes {max_text_bytes}, expected at least 1; correct the config"
        )
    return LlavaSource(open_records(annotations), Path(image_dir), name=name, max_text_bytes=max_text_bytes)


class LlavaSource:
    """One item per record."""

    def __init__(self, records: Records, image_dir: Path, *, name: str, max_text_bytes: int = 12_000) -> None:
        self.name = name
        self._records = records
        self._image_dir = image_dir
        self._max_text_bytes = max_text_bytes

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._records)

    def image_path(self, index: int) -> Path | None:
        """Return the image of an item, None for text only. Raises: DataError."""
        return self._image_of(self._checked_record(index), index)

    def get(self, index: int, rng: np.random.Generator) -> Sample:
        """Return record `index`, of a long conversation one part drawn from `rng`. Raises: DataError."""
        record = self._checked_record(index)
        where = f"{self._records.where}[{index}]"
        pairs = conversation_turns(record.get("conversations"), where)
        if not pairs:
            raise DataError(f"{where}: found no question with an answer, expected at least one; repair the file")
        parts = conversation_parts(pairs, self._max_text_bytes)
        part = parts[rng.integers(len(parts))]
        return Sample(
            sample_id=f"{self.name}/record={index}",
            source=self.name,
            image_path=self._image_of(record, index),
            image_hw=None,
            turns=tuple(Turn(question=question, answer=answer) for question, answer in part),
        )

    def _checked_record(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        if not isinstance(record, dict):
            raise DataError(
                f"{self._records.where}[{index}]: found {type(record).__name__}, expected an object; repair the file"
            )
        return record

    def _image_of(self, record: dict[str, Any], index: int) -> Path | None:
        image = record.get("image")
        if image is None:
            return None
        if not isinstance(image, str) or not image:
            raise DataError(
                f"{self._records.where}[{index}]: found image = {shown(image)}, expected the path of one image or no "
                "such field; repair the file"
            )
        return image_file(self._image_dir, image)


def conversation_parts(pairs: list[tuple[str, str]], max_bytes: int) -> list[list[tuple[str, str]]]:
    """Divide a conversation into parts of whole turns, each with at most `max_bytes` of text or with one turn."""
    parts: list[list[tuple[str, str]]] = []
    used = 0
    for question, answer in pairs:
        size = len(question.encode()) + len(answer.encode())
        if not parts or used + size > max_bytes:
            parts.append([])
            used = 0
        parts[-1].append((question, answer))
        used += size
    return parts
