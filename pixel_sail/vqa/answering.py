"""Short answers to visual questions, independent of the evaluation kit.

`kit_requests.py` turns each request of the kit into a `VqaRequest`, `answers` yields one text per request in the same
order, and `lmms_eval_model.py` returns them to the kit.

    VqaRequest(question="Is the star red? Please answer yes or no.", image=<Image 640x427>, max_new_tokens=16)
        -> "Yes"

Nearby questions about the same image share one encoding of it. Questions are batched if possible.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from PIL import Image

from pixel_sail.evaluation.predict import BatchPredictor, GenerationRequest
from pixel_sail.model.tokenization import special_tokens

WINDOW = 64
"""Number of questions that are grouped by image, and of images held at once."""


@dataclass(frozen=True, kw_only=True)
class VqaRequest:
    """One question about one image or none, with its limits."""

    question: str
    image: Image.Image | None
    """Image of any mode, converted to 8-bit RGB. None: a text-only question."""
    max_new_tokens: int
    until: tuple[str, ...] = ()
    """The answer ends before the first of these."""


def answer(
    predictor: BatchPredictor,
    image: Image.Image | None,
    question: str,
    *,
    max_new_tokens: int,
    until: Sequence[str] = (),
) -> str:
    """Return the greedy answer to one question, without special tokens; `until` ends it early."""
    request = VqaRequest(question=question, image=image, max_new_tokens=max_new_tokens, until=tuple(until))
    return next(answers(predictor, [request]))


def answers(predictor: BatchPredictor, requests: Iterable[VqaRequest]) -> Iterator[str]:
    """Yield the greedy answer to every question, in order.

    `predictor.config.max_batch_tokens` limits what runs as one batch. Masks are not returned.
    """
    waiting = iter(requests)
    while window := list(islice(waiting, WINDOW)):
        yield from _answer_window(predictor, window)


def plain_answer(text: str, special: Sequence[str], until: Sequence[str] = ()) -> str:
    """Return a generated text up to the first of `until`, without special tokens.

    A text without special tokens keeps its white space. `until` is searched before special tokens are removed, as it
    may be one of them, and after.
    """
    text = _before_first(text, until)
    without = re.sub("|".join(map(re.escape, special)), " ", text)
    if without != text:
        text = re.sub(r" +(?=[.,;:!?\n]|$)", "", re.sub(r" {2,}", " ", without))
    return _before_first(text, until).strip()


def _before_first(text: str, ends: Sequence[str]) -> str:
    """Return the text before the first place where one of `ends` begins."""
    return text[: min((place for end in ends if (place := text.find(end)) >= 0), default=len(text))]


def _answer_window(predictor: BatchPredictor, window: Sequence[VqaRequest]) -> list[str]:
    """Return the answers to a few questions. Questions with the same length limit are batched."""
    special = special_tokens(predictor.processor.settings.num_visual_prompts)
    texts = [""] * len(window)
    for limit in dict.fromkeys(request.max_new_tokens for request in window):
        by_image: dict[str, list[int]] = {}
        for index, request in enumerate(window):
            if request.max_new_tokens == limit:
                by_image.setdefault(_pixel_key(request.image), []).append(index)
        batch = [_generation_request(predictor, [window[index] for index in indices]) for indices in by_image.values()]
        outputs = predictor.changed(max_new_tokens=limit, answer="generated").ask_many(batch)
        for indices, own in zip(by_image.values(), outputs, strict=True):
            for index, output in zip(indices, own, strict=True):
                texts[index] = plain_answer(output.answer, special, window[index].until)
    return texts


def _generation_request(predictor: BatchPredictor, same_image: Sequence[VqaRequest]) -> GenerationRequest:
    """Return questions about one image as a request to the predictor."""
    image = same_image[0].image
    return GenerationRequest(
        image=None if image is None else predictor.prepare(image),
        questions=[request.question for request in same_image],
    )


def _pixel_key(image: Image.Image | None) -> str:
    """Return a key of an image: size and a hash of the pixels. Empty without an image."""
    if image is None:
        return ""
    # As RGB, because the bytes of a palette image depend on its palette.
    return f"{image.size} {hashlib.sha256(image.convert('RGB').tobytes()).hexdigest()}"
