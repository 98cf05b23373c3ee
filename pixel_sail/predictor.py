"""Python API for questions about images.

It uses `evaluation/predict.py`, so answers are the same as in evaluation. An image is encoded once per chat. The
preceding conversation is encoded again with every question, which is cheap compared with the image.

    predictor = pixel_sail.Predictor.from_pretrained("runs/mine")
    predictor.segment("image.jpg", "the dog on the left").mask            # bool [427, 640]
    predictor.describe("image.jpg", Box(10, 20, 200, 180)).text           # "A brown dog."
    chat = predictor.chat("image.jpg", [Point(120, 80)])
    chat.ask("What is <Prompt0>?"), chat.ask("Please segment what it looks at.")
"""

import re
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from PIL import Image

from pixel_sail.config import ConfigError, PredictConfig
from pixel_sail.data.images import load_image, rgb_image
from pixel_sail.data.templates.region import REGION_CAPTION_PROMPT
from pixel_sail.evaluation.predict import BatchPredictor, GenerationRequest
from pixel_sail.evaluation.refer_seg import PROMPTS
from pixel_sail.evaluation.run import checkpoint_folder
from pixel_sail.evaluation.task import LONG_ANSWER_TOKENS
from pixel_sail.model.folder import MODEL_FILES
from pixel_sail.model.generation import GenerationOutput, ImagePrefixes, NotFiniteError, generate_steps
from pixel_sail.model.tokenization import END_TOKEN, IMAGE_TOKENS, SEG_TOKEN, TURN_END, TURN_START
from pixel_sail.predictor_io import ImageLike, PredictorOutput, PredictorRequest, Region, Timing, visual_prompts
from pixel_sail.types import DTYPES, DataError, VisualPrompt

DESCRIBE_IMAGE = "Please describe this image."
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_NAMED_PROMPT = re.compile(r"<Prompt(\d+)>")
_CONTROL_TOKENS = (SEG_TOKEN, *IMAGE_TOKENS, TURN_START, TURN_END, END_TOKEN)


class Predictor:
    """A loaded model that answers questions about images."""

    def __init__(self, batch: BatchPredictor) -> None:
        self.batch = batch

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        device: str | None = None,
        precision: str = "fp32",
        config: PredictConfig | None = None,
    ) -> "Predictor":
        """Load a model.

        name: a run folder, an exported folder, or "owner/name" on the Hugging Face hub at `revision`; device: None for
        CUDA if available, else the CPU; precision: fp32 or bf16; config: generation settings.
        Raises: ConfigError for a model that is missing or damaged, and for a device or precision that this machine does
        not support.
        """
        if precision not in DTYPES:
            raise ConfigError(f"precision: found {precision!r}, expected one of {tuple(DTYPES)}")
        has_cuda = torch.cuda.is_available()
        place = device if device is not None else "cuda" if has_cuda else "cpu"
        if not re.fullmatch(r"cpu|cuda(:\d+)?", place):
            raise ConfigError(f"device: found {place!r}, expected 'cpu', 'cuda' or 'cuda:0', 'cuda:1', ...")
        if place.startswith("cuda") and not has_cuda:
            raise ConfigError(f"device: found {place!r}, but torch sees no CUDA device; use device='cpu'")
        if int(place.partition(":")[2] or 0) >= max(1, torch.cuda.device_count()):
            raise ConfigError(
                f"device: found {place!r}, but torch sees {torch.cuda.device_count()}, counted from 'cuda:0'"
            )
        config = config if config is not None else PredictConfig()
        if config.max_new_tokens is None:
            config = replace(config, max_new_tokens=LONG_ANSWER_TOKENS)
        folder = _local_folder(name, revision)
        try:
            return cls(BatchPredictor.from_pretrained(folder, config=config, precision=precision, device=place))
        except DataError as error:
            raise ConfigError(f"model {folder}: cannot be loaded ({error}); copy or export it again") from error

    def segment(self, image: ImageLike, text: str, prompts: Sequence[Region] = ()) -> PredictorOutput:
        """Return the mask of a referring expression, for example "the red cup" or "what `<Prompt0>` holds".

        Uses the question template of the evaluation, see `PredictConfig.prompt`. Raises: DataError as `ask`.
        """
        _check_text(text, len(_region_list(prompts, "")))
        return self.ask(image, PROMPTS[self.batch.config.prompt].format(sent=text), prompts)

    def describe(self, image: ImageLike, prompt: Region | None = None) -> PredictorOutput:
        """Return a description of a region, or of the whole image. Raises: DataError as `ask`."""
        if prompt is None:
            return self.ask(image, DESCRIBE_IMAGE)
        return self.ask(image, REGION_CAPTION_PROMPT, [prompt])

    def ask(self, image: ImageLike | None, text: str, prompts: Sequence[Region] = ()) -> PredictorOutput:
        """Return the answer to one question; its text refers to regions as `<Prompt0>`, `<Prompt1>`, ...

        Raises: DataError for an invalid image, region or text.
        """
        return self.chat(image, prompts).ask(text)

    def ask_many(self, requests: Sequence[PredictorRequest]) -> list[PredictorOutput]:
        """Return the answers to many questions, computed in batches. Questions with the same image object and regions
        share its encoding.

        Raises: DataError as `ask`, with the index of the question.
        """
        groups: dict[Any, list[int]] = {}
        # Kept to the end, because ids of deleted objects are reused.
        marked = [_region_list(item.prompts, f"question {index}: ") for index, item in enumerate(requests)]
        for index, (item, regions) in enumerate(zip(requests, marked, strict=True)):
            _check_text(item.text, len(regions), f"question {index}: ")
            source = item.image if isinstance(item.image, str | Path) else id(item.image)
            groups.setdefault((source, tuple(map(id, regions))), []).append(index)
        batch = []
        for members in groups.values():
            first = requests[members[0]]
            image, prompts = _open(first.image, marked[members[0]], f"question {members[0]}")
            prepared = None if image is None else self.batch.prepare(image)
            questions = [requests[index].text for index in members]
            batch.append(GenerationRequest(image=prepared, questions=questions, prompts=prompts))
        results: dict[int, PredictorOutput] = {}
        for members, outputs in zip(groups.values(), self.batch.ask_many(batch), strict=True):
            results |= dict(zip(members, outputs, strict=True))
        return [results[index] for index in range(len(requests))]

    def chat(self, image: ImageLike | None, prompts: Sequence[Region] = ()) -> "Chat":
        """Begin a conversation about an image. Raises: DataError as `ask`."""
        return Chat(self.batch, *_open(image, prompts, "image"))


class Chat:
    """A conversation about one image: each question sees the preceding ones and their answers."""

    def __init__(self, batch: BatchPredictor, image: Image.Image | None, prompts: tuple[VisualPrompt, ...]) -> None:
        self.batch = batch
        self.results: list[PredictorOutput] = []
        """All answers so far."""
        self._prepared = None if image is None else batch.prepare(image)
        self._prompts = prompts
        self._prefixes: ImagePrefixes | None = None
        self._spoken_ids: list[int] = []

    @property
    def num_prompts(self) -> int:
        """Return how many regions are marked."""
        return len(self._prompts)

    def mark(self, *regions: Region) -> None:
        """Mark further regions, as the next `<Prompt..>`. The image is encoded again with the next question, as its
        encoding depends on the regions.

        Raises: DataError as `Predictor.ask`.
        """
        if self._prepared is None:
            raise DataError("prompts: found in a chat without an image, expected an image; give one to Predictor.chat")
        self._prompts += visual_prompts(regions, self._prepared.size_hw, first=len(self._prompts))
        self._prefixes = None

    def ask(self, text: str) -> PredictorOutput:
        """Return the answer to the next question. Raises: DataError as `Predictor.ask`."""
        for _ in self.stream(text):
            pass
        return self.results[-1]

    def stream(self, text: str) -> Iterator[str]:
        """Yield the answer in pieces; `results[-1]` is the full answer after the last piece.

        If the iteration is not finished, the question is not added to the chat. Raises: DataError as `Predictor.ask`.
        """
        _check_text(text, len(self._prompts))
        try:
            yield from self._answer(text)
        except NotFiniteError as error:
            raise NotFiniteError(f"{error}; {self.batch.why_not_finite()}", request=0, question=0) from None

    def _answer(self, text: str) -> Iterator[str]:
        """Yield the answer to a checked question and add it to the results. Raises: NotFiniteError."""
        start = time.perf_counter()
        encodes = self._prepared is not None and self._prefixes is None
        if encodes:
            self._prefixes = self.batch.encode(
                [GenerationRequest(image=self._prepared, questions=[], prompts=self._prompts)]
            )
        self._wait()
        encoded = time.perf_counter()
        is_first = not self._spoken_ids
        question_ids = self.batch.question_ids(text, follows_image=is_first and self._prepared is not None)
        heard_ids = [*self._spoken_ids, *question_ids]
        generated = yield from self._pieces(heard_ids)
        # The states of [SEG] tokens in earlier turns come first.
        earlier = self._spoken_ids.count(self.batch.processor.seg_id)
        generated = replace(generated, seg_states_ND=generated.seg_states_ND[earlier:])
        self._wait()
        ended = time.perf_counter()
        states = None if self._prefixes is None else self._prefixes.patch_states(0)
        size_hw = (0, 0) if self._prepared is None else self._prepared.size_hw
        (output,) = self.batch.outputs([generated], states, size_hw)
        timing = Timing(
            encode_s=encoded - start if encodes else 0.0,
            generate_s=ended - encoded,
            mask_s=time.perf_counter() - ended,
        )
        said = [token for token in generated.token_ids if token not in self.batch.end_ids]
        self._spoken_ids = [*heard_ids, *said, self.batch.processor.end_id]
        self.results.append(replace(output, timing=timing))

    def _pieces(self, heard_ids: list[int]) -> Generator[str, None, GenerationOutput]:
        """Yield new text of the answer during generation, and return the generated output."""
        steps = generate_steps(
            self.batch.model,
            self._prefixes,
            [[heard_ids]],
            max_new_tokens=self.batch.max_new_tokens,
            end_ids=self.batch.end_ids,
            compiled=self.batch.config.compile == "decode",
        )
        shown = ""
        while True:
            try:
                ((token_ids,)) = next(steps)
            except StopIteration as finished:
                ((generated,),) = finished.value
                if rest := self.batch.processor.decode(generated.token_ids).removeprefix(shown):
                    yield rest
                return generated
            text = self.batch.processor.decode(token_ids)
            # A character of several tokens is shown when it is complete.
            if text.startswith(shown) and len(text) > len(shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text[len(shown) :]
                shown = text

    def _wait(self) -> None:
        """Synchronize the device, so that timings are attributed correctly."""
        if self.batch.model.device.type == "cuda":
            torch.cuda.synchronize(self.batch.model.device)


def _local_folder(name: str | Path, revision: str | None) -> Path:
    """Return the folder of a model, downloaded from the hub if there is no local one. Raises: ConfigError."""
    if Path(name).exists() or not _HUB_NAME.fullmatch(str(name)):
        return checkpoint_folder(str(name))
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=list(MODEL_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model {name}: neither a local folder nor available from the Hugging Face hub ({error}); "
            "use a run folder, an exported folder, or owner/name of a model you may read"
        ) from error


def _open(
    image: ImageLike | None, prompts: Sequence[Region], where: str
) -> tuple[Image.Image | None, tuple[VisualPrompt, ...]]:
    """Return the image as upright RGB, and its marked regions. Raises: DataError."""
    own = "" if where == "image" else f"{where}: "
    regions = _region_list(prompts, own)
    if image is None:
        if regions:
            raise DataError(f"{where}: {len(regions)} prompts found without an image; give the image they mark")
        return None, ()
    if isinstance(image, str | Path):
        if Path(image).is_dir():
            raise DataError(f"{where}: {image} is a folder, expected an image file")
        opened = load_image(image, where=where)
    elif isinstance(image, Image.Image):
        opened = rgb_image(image, where=where)
    elif isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        opened = Image.fromarray(image)
    else:
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise DataError(f"{where}: found {found}, expected a path, a PIL image, or uint8 pixels [height, width, 3]")
    if not (opened.height and opened.width):
        raise DataError(f"{where}: found {opened.width} x {opened.height} pixels, expected at least one")
    return opened, visual_prompts(regions, (opened.height, opened.width), where=own)


def _region_list(prompts: Sequence[Region], where: str) -> tuple[Region, ...]:
    """Return regions from a list or from masks [N, H, W]. Raises: DataError for anything else."""
    if isinstance(prompts, np.ndarray) and prompts.ndim != 3:
        raise DataError(f"{where}prompts: found one array {prompts.shape}, expected a list of regions; write [mask]")
    if not isinstance(prompts, Sequence | np.ndarray) or isinstance(prompts, str | bytes):
        found = type(prompts).__name__
        raise DataError(f"{where}prompts: found {found}, expected a list of regions, such as [Box(10, 20, 200, 180)]")
    return tuple(prompts)


def _check_text(text: str, num_prompts: int, where: str = "") -> None:
    """Raise DataError unless a text is a valid question with this number of marked regions."""
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}text: found {text!r}, expected a question of at least one word")
    for token in _CONTROL_TOKENS:
        if token in text:
            raise DataError(f"{where}text: {token} found, which only the model may say; remove it from the question")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}text: holds half a character ({error.reason}), expected whole ones") from error
    # Compared as texts: Python refuses to read numbers of thousands of digits.
    numbers = {number.lstrip("0") or "0" for number in _NAMED_PROMPT.findall(text)}
    unmarked = sorted(numbers - set(map(str, range(num_prompts))), key=lambda number: (len(number), number))
    if unmarked:
        raise DataError(
            f"{where}text: <Prompt{unmarked[0]}> found, but {num_prompts} regions are marked; mark it, or name one of "
            "those that are, counted from <Prompt0>"
        )
