"""Summarizes a synthetic dataset for meta.json: counts, how often color decides, and scores without a model.

`formats.py` passes its records and gets the second half of meta.json; the quickstart's report reads `blind_scores` from
there. A part of it, for example:

    {"num_sentences": {"train": 190112, "val": 900, ...}, "kinds": {"val": {"colour": 180, "shape": 171, ...}, ...},
     "colour_decides": {"train": 0.21, "val": 0.2}, "blind_scores": {"val_place": {"target's colour": {...}, ...}, ...}}
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pixel_sail.refshapes.baselines import ReferredObject, blind_choices, blind_scores
from pixel_sail.refshapes.queries import SceneExpression
from pixel_sail.types import Json


def summarize(splits: Sequence[str], records: Sequence[Json], num_refs: Json) -> Json:
    """Return counts by split and by kind of sentence, how often the named color decides, and the scores of guesses.

    A record has `split`, `focus`, `objects`, `colours` and, as `sentences`, its single-target expressions; `grefs` and
    `perbench` if there are any. num_refs: of the files, by name.
    """
    sentences = {
        split: [(r, found) for r in records if r["split"] == split for found in r["sentences"]] for split in splits
    }
    kinds = {split: _counted(found.kind for _, found in pairs) for split, pairs in sentences.items()}
    questions = [mcq for record in records if "perbench" in record for mcq in record["perbench"]["mcq"]["mcqs"]]
    return {
        **num_refs,
        "scenes": {split: _counted(r["focus"] for r in records if r["split"] == split) for split in splits},
        "num_sentences": {split: len(pairs) for split, pairs in sentences.items()},
        "kinds": kinds,
        "gref_kinds": _counted(found.kind for record in records for found in record.get("grefs", ())),
        "colour_decides": {
            split: kinds[split].get("colour", 0) / len(sentences[split])
            for split in ("train", "val")
            if sentences[split]
        },
        "blind_scores": {
            split: blind_scores(_referred_object(*pair) for pair in pairs)
            for split, pairs in sentences.items()
            if split != "train"
        },
        "blind_choices": blind_choices(questions),
    }


def _counted(words: Any) -> dict[str, int]:
    return dict(sorted(Counter(words).items()))


def _referred_object(record: Json, sentence: SceneExpression) -> ReferredObject:
    areas = [item["area"] for item in record["objects"]]
    return ReferredObject(areas=areas, colours=record["colours"], target=sentence.targets[0])
