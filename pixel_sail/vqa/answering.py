"""Short answers to general visual questions; knows nothing of the kit that asks them.

`kit_requests.py` makes a `VqaRequest` of each request of the kit, `answers` yields one text each in the same order,
`lmms_eval_model.py` returns them to the kit, which scores them.

    VqaRequest(question="Is the star red? Please answer yes or no.", image=<Image 640x427>, max_new_tokens=16)
        -> "Yes"

Questions about the same image that stand near each other share it: it is encoded once. What the predictor can answer
as one batch, it does.
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
"""Questions among which those about the same image are looked for; so many images are held at once."""


@dataclass(frozen=True, kw_only=True)
class VqaRequest:
    """One question, about one image or none, with its own limits."""

    question: str
    image: Image.Image | None
    """Any mode; asked about as 8-bit RGB. None: a question of text alone."""
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
    """Return a generated text up to the first of `until`, without the special tokens.

    A text without special tokens keeps its blanks and lines. `until` is looked for both before special tokens are
    removed, as it may be one of them, and after.
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
    """Return the answers to a few questions, asked together as far as they have the same length limit."""
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
    """Return questions about one image as the predictor takes them."""
    image = same_image[0].image
    return GenerationRequest(
        image=None if image is None else predictor.prepare(image),
        questions=[request.question for request in same_image],
    )


def _pixel_key(image: Image.Image | None) -> str:
    """Return what is equal for equal images: size and a hash of the pixels. Nothing for no image."""
    if image is None:
        return ""
    # As RGB, because the bytes of a palette image say nothing without their palette.
    return f"{image.size} {hashlib.sha256(image.convert('RGB').tobytes()).hexdigest()}"
