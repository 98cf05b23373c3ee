"""LLaVA-1.5's instruction mix: conversations about whole images, and without an image.

Llava_v1_5_mix665k.json (665k records, 1 GB) becomes `Sample`s without masks:

    {"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "conversations": [{"from": "human", "value":
     "<image>\\nWhat are the colors of the bus?"}, {"from": "gpt", "value": "White and red."}, ...]}

    -> Sample(image_path=image_dir / "coco/train2017/000000033471.jpg", turns=(Turn(question="What are the colors of the
       bus?", answer="White and red."), ...)); a record without "image" gives a sample without one.

Differences from the released loader:
- It cut long conversations inside an answer, where a model then learned to stop, and never used the rest. Here a
  conversation that does not fit into a sequence (`data.packing.seq_len`) with its image is split between turns into
  parts that do (`data/turn_parts.py`). One part is sampled, or the first one with `long_conversations=released`.
- For consecutive messages of one side see `data/conversations.py`.
"""

from pathlib import Path
from typing import Any

import numpy as np

from pixel_sail.data.conversations import conversation_turns
from pixel_sail.data.details import OURS, is_released
from pixel_sail.data.images import image_file
from pixel_sail.data.records import Records, open_records
from pixel_sail.texts import shown
from pixel_sail.types import DataError, Sample, Source, Turn


def load(
    *, annotations: str | Path, image_dir: str | Path, name: str = "llava_mix665k", long_conversations: str = OURS
) -> Source:
    """Return the file as a training source.

    annotations: the JSON file. image_dir: folder of the records' image paths. long_conversations: for a conversation
    longer than a sequence, `ours` keeps a random part; `released` keeps the first turns (the release cuts the next
    turn, here it is dropped). A single longer turn is an error. Raises: DataError, ValueError."""
    keeps_beginning = is_released(name, "long_conversations", long_conversations)
    return LlavaSource(open_records(annotations), Path(image_dir), name=name, keeps_beginning=keeps_beginning)


class LlavaSource:
    """One item per record."""

    def __init__(self, records: Records, image_dir: Path, *, name: str, keeps_beginning: bool = False) -> None:
        self.name = name
        self._records = records
        self._image_dir = image_dir
        self._keeps_beginning = keeps_beginning

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._records)

    def image_path(self, index: int) -> Path | None:
        """Return the image path of an item, None for text only. Raises: DataError."""
        return self._image_of(self._checked_record(index), index)

    def get(self, index: int, rng: np.random.Generator) -> Sample:
        """Return record `index`; `rng` selects the part kept of a conversation that is too long.

        Raises: DataError.
        """
        record = self._checked_record(index)
        where = f"{self._records.where}[{index}]"
        pairs = conversation_turns(record.get("conversations"), where)
        if not pairs:
            raise DataError(f"{where}: found no question with an answer, expected at least one; repair the file")
        return Sample(
            sample_id=f"{self.name}/record={index}",
            source=self.name,
            image_path=self._image_of(record, index),
            image_hw=None,
            turns=tuple(Turn(question=question, answer=answer) for question, answer in pairs),
            part_choice=0.0 if self._keeps_beginning else float(rng.random()),
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
