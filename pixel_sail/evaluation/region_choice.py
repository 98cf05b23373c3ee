"""The task of PerBench's multiple-choice questions about a marked region.

`data/sources/perbench.py` -> here -> `Task`, scored by `metrics/choice.py`. An eval in a config is
`{_target_: pixel_sail.evaluation.region_choice.load, annotations: ..., image_dir: ...}`. `protocols: [paper]` does not
parse the options, for files with another format.

Scores of one question with the options "A. red" and "B. blue", right answer "B. blue", generated `<Prompt0>: B`:
accuracy 1 (the letter names an option), paper_accuracy 0 (release: the text does not contain "B. blue").
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pixel_sail.config import ConfigError
from pixel_sail.data.sources import perbench
from pixel_sail.data.templates.region import MARKED_OBJECT, PERBENCH_CHOICE_PROMPT
from pixel_sail.evaluation.item_predictions import ItemPrediction, long_answer_task, region_request
from pixel_sail.evaluation.overlay import TRUE_COLOR
from pixel_sail.evaluation.result_examples import ResultExample
from pixel_sail.evaluation.source_image import SourceImage
from pixel_sail.evaluation.task import ItemRequest, Task, prompt_template
from pixel_sail.evaluation.task_scores import PAPER_PREFIX, TaskScores, measure, merge_scores
from pixel_sail.metrics.choice import score_choice, score_choice_as_released
from pixel_sail.types import PROTOCOLS, RegionChoice

KIND = "region choices"

PROMPTS = {"standard": PERBENCH_CHOICE_PROMPT, "paper": PERBENCH_CHOICE_PROMPT, "short": "{stem}"}
"""The released question has no stray blanks. short: the question without its options, for models trained on short
questions about regions; "the marked object" becomes the prompt's token."""


def load(
    *, annotations: str | Path, image_dir: str | Path, protocols: Sequence[str] = PROTOCOLS
) -> Task[RegionChoice, ItemPrediction]:
    """Return PerBench's choices from the files of `perbench.load_choices`.

    Raises: DataError; ConfigError for an unknown protocol.
    """
    if not set(protocols) <= set(PROTOCOLS) or not protocols:
        raise ConfigError(f"{KIND}: found protocols {list(protocols)}, expected one or more of {PROTOCOLS}")
    items = perbench.load_choices(annotations, image_dir=image_dir)
    return long_answer_task(
        kind=KIND,
        items=items,
        request=_request,
        measure=partial(_measure, protocols=protocols),
        example=_example,
        check=partial(_check, items, protocols),
    )


def _request(item: RegionChoice, prompt: str) -> ItemRequest[RegionChoice]:
    stem = item.question.partition("\n")[0].replace(MARKED_OBJECT, "<Prompt0>")
    return region_request(item, prompt_template(PROMPTS, prompt, KIND).format(question=item.question, stem=stem))


def _example(item: RegionChoice, answer: ItemPrediction) -> ResultExample:
    source_image = SourceImage(path=item.image_path, size_hw=item.image_hw)
    panels = (((item.region, TRUE_COLOR),),)
    return ResultExample(
        text=item.question, answer=answer.answer, source_image=source_image, panels=panels, expected=item.answer
    )


def _check(items: Sequence[RegionChoice], protocols: Sequence[str]) -> None:
    """Parse every question's options before inference. Raises: DataError if one cannot be scored."""
    for item in items if "standard" in protocols else ():
        score_choice("", question=item.question, right=item.answer, where=item.item_id)


def _measure(
    items: Sequence[RegionChoice], answers: Sequence[ItemPrediction], *, protocols: Sequence[str]
) -> TaskScores:
    pairs = list(zip(items, answers, strict=True))
    parts = []
    if "standard" in protocols:
        standard = [
            score_choice(answer.answer, question=item.question, right=item.answer, where=item.item_id)
            for item, answer in pairs
        ]
        parts.append(measure(standard))
    if "paper" in protocols:
        released = [score_choice_as_released(answer.answer, right=item.answer) for item, answer in pairs]
        parts.append(measure(released, prefix=PAPER_PREFIX))
    return merge_scores(*parts, count=len(items))
