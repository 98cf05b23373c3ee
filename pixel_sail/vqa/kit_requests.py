"""Conversion of the kit's requests to ours, with an error for unsupported ones.

Lmms-eval passes `Instance` objects to `lmms_eval_model.py`. Their `args` and the kit's documents are read here, without
importing the kit:

    ("Is it red?", {"max_new_tokens": 16, "until": ["\\n\\n"]}, doc_to_visual, 7, "mme", "test")
        -> VqaRequest(question="Is it red?", image=<Image>, max_new_tokens=16, until=("\\n\\n",))
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from pixel_sail.data.images import check_format
from pixel_sail.types import DataError
from pixel_sail.vqa.answering import VqaRequest

DEFAULT_MAX_NEW_TOKENS = 512
"""Default maximum answer length, as for the project's other tasks with text answers."""

Documents = Mapping[str, Mapping[str, Sequence[Any]]]
"""Task name -> split -> documents."""


def to_request(arguments: Sequence[Any], documents: Documents, *, default_max_new_tokens: int) -> VqaRequest:
    """Convert one `generate_until` request of the kit.

    Raises: DataError for several images, other media, sampling, and settings of a wrong type. The message names the
    task and the document.
    """
    text, settings, doc_to_visual, doc_id, task, split = arguments
    where = f"task {task}, split {split}, document {doc_id}"
    if not isinstance(text, str):
        raise DataError(f"{where}: a question of type {type(text).__name__} found, expected text; exclude the task")
    _check_greedy(settings, where)
    return VqaRequest(
        question=text,
        image=one_image(_visuals(doc_to_visual, documents[task][split][doc_id]), where),
        max_new_tokens=_max_new_tokens(settings, default_max_new_tokens, where),
        until=_until(settings, where),
    )


def one_image(visuals: Sequence[Any], where: str) -> Image.Image | None:
    """Return the only image, None if there is none.

    Raises: DataError for several images, for other media, and for a vector graphic such as EPS.
    """
    for visual in visuals:
        if not isinstance(visual, Image.Image):
            raise DataError(
                f"{where}: {type(visual).__name__} found, expected an image; the model supports neither video nor "
                "audio, exclude the task"
            )
        check_format(visual, where)
    if len(visuals) > 1:
        raise DataError(
            f"{where}: {len(visuals)} images found, expected one or none, as the model was trained on; exclude the "
            "task (pixel_sail_seed_image has the single-image questions of SEED-Bench)"
        )
    return visuals[0] if visuals else None


def _visuals(doc_to_visual: Callable[[Any], Any] | None, document: Any) -> list[Any]:
    """Return the visuals of a document. Some text-only tasks return None."""
    found = None if doc_to_visual is None else doc_to_visual(document)
    return [] if found is None else list(found)


def _check_greedy(settings: Mapping[str, Any], where: str) -> None:
    """Raise DataError if the task requests anything but greedy decoding."""
    temperature = settings.get("temperature") or 0
    # Tasks often have a temperature together with `do_sample: false`, which then has no effect.
    is_sampled = settings.get("do_sample", temperature > 0)
    if is_sampled or (settings.get("num_beams") or 1) > 1:
        asked = {key: settings[key] for key in ("do_sample", "temperature", "num_beams") if key in settings}
        raise DataError(
            f"{where}: {asked} found, but answers are greedy; "
            "add --gen_kwargs do_sample=False,temperature=0,num_beams=1"
        )


def _max_new_tokens(settings: Mapping[str, Any], default: int, where: str) -> int:
    """Return the length limit, which tasks specify in two ways."""
    limits = [settings[key] for key in ("max_new_tokens", "max_gen_toks") if settings.get(key) is not None]
    limit = limits[0] if limits else default
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise DataError(
            f"{where}: max_new_tokens is {limit!r}, expected a whole number from 1; add --gen_kwargs max_new_tokens=16"
        )
    return limit


def _until(settings: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Return the texts that end an answer. A task may specify one, several or none."""
    found = settings.get("until")
    ends = [found] if isinstance(found, str) else [] if found is None else list(found)
    if not all(isinstance(end, str) and end for end in ends):
        raise DataError(f"{where}: until is {found!r}, expected non-empty texts; fix the task file")
    return tuple(ends)
