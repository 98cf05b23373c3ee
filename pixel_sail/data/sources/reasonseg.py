"""ReasonSeg: one object per image, described by what it implies, as training samples and expressions to score.

Reads `<root>/<split>/x.jpg` with `x.json` next to it into `Sample` or `Expression`. One JSON file:

    {"text": ["something that keeps the rain off"], "is_sentence": false,
     "shapes": [{"label": "target", "points": [[853.0, 512.0], [841.0, 513.0], ...]},
                {"label": "ignore", "points": [...]}, {"label": "flag", "points": [...]}]}

Files are in LabelMe format: shapes may be polygons, rectangles, circles or masks, see `data/labelme.py`. They are
painted from large to small, outline included, so that a small one inside a large one stays visible. `flag` shapes are
ignored; pixels under a label containing `ignore` are neither target nor background. Files are UTF-8 or cp1252. The size
is that of the upright image, as annotated.

Errors of the released code that do not occur here: ignored pixels were trained as background, and scored as noise
because the values 0, 1 and 255 went through a binary run-length encoder; an image with an EXIF rotation was shown
sideways, with the points painted as on the upright one; a missing prediction was excluded from cIoU, which the scorer
here avoids.
"""

import hashlib
import json
import logging
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pixel_sail.data.coordinates import check_pixels
from pixel_sail.data.details import OURS, is_released
from pixel_sail.data.fields import field, strings
from pixel_sail.data.fingerprint import add_to_fingerprint
from pixel_sail.data.image_sizes import stored_hw, turn_of, upright_hw
from pixel_sail.data.images import existing_file
from pixel_sail.data.labelme import Shape, paint_shape, read_shape
from pixel_sail.data.masks import decode_rle
from pixel_sail.data.templates.reasoning import evaluation_question, reasoning_turn
from pixel_sail.files import is_hidden
from pixel_sail.rle import encode_as_released, encode_mask
from pixel_sail.texts import shown
from pixel_sail.types import RLE, BoolMask, DataError, Expression, MissingDataError, Sample, SizeHW, Source

logger = logging.getLogger(__name__)

QUERIES = ("all", "short", "long")
"""Items to score: phrases are short, whole sentences are long. The benchmark reports each and all."""

SENTENCES = ("first", "all")
"""Texts of an item to score; the published protocol uses the first only."""

_NO_TARGETS = ("background", "negative")
"""Labels with one of these are not targets. They are rejected, as all labels but `ignore` and `flag` are painted."""


@dataclass(frozen=True, kw_only=True)
class ReasonItem:
    """One JSON file."""

    json_path: Path
    texts: tuple[str, ...]
    """Stripped, non-empty, without repeats."""
    is_sentence: bool
    shapes: tuple[Shape, ...]
    stated_hw: SizeHW | None
    """Size of the annotated image, if the file states it."""

    @property
    def image_path(self) -> Path:
        """Return the image next to the file."""
        return existing_file(self.json_path.with_suffix(".jpg"))


def load(
    *,
    root: str | Path,
    split: str = "train",
    name: str = "reasonseg",
    sentences_per_image: int = 3,
    templates: str = OURS,
    ignored_pixels: str = OURS,
) -> Source:
    """Return one split as a training source: the `_target_` of `configs/source/reasonseg.yaml`.

    root: folder with the folders train, val and test. sentences_per_image: maximum turns per sample. templates: `ours`
    samples several questions and answers; `released` uses those of the evaluation. ignored_pixels: `ours` excludes them
    from the loss; `released` makes them background. Raises: DataError, also for a wrong setting.
    """
    return ReasonSegSource(
        _json_files(Path(root), split),
        name=name,
        split=split,
        most=sentences_per_image,
        released_templates=is_released(name, "templates", templates),
        ignored_as_background=is_released(name, "ignored_pixels", ignored_pixels),
    )


def expressions(
    *, root: str | Path, split: str, query: str = "all", sentences: str = "first", upright: bool = True
) -> list[Expression]:
    """Return the expressions of one split in file name order; the images must exist for their sizes.

    `text` is the whole released question, so the evaluation adds nothing to it. Ids count the items of the split from
    1, whatever `query` is. `target` is None without an annotated target, `ignored` None if every pixel counts. upright:
    True applies the EXIF rotation. False keeps images as stored and paints the same points on them, as in the released
    evaluation, whose target misses the object of a rotated image; with True, that target, rotated with the image, is
    `released_target`. Raises: DataError, also for an unknown query or sentences.
    """
    _check_choice("query", query, QUERIES)
    _check_choice("sentences", sentences, SENTENCES)
    result = []
    for number, path in enumerate(_json_files(Path(root), split), start=1):
        item = read_item(path)
        if query != "all" and item.is_sentence != (query == "long"):
            continue
        image_hw = upright_hw(item.image_path, str(path))
        target, ignored = paint_item(item, image_hw)
        released = _turned_as_released(item) if upright else None
        if not upright:
            image_hw = stored_hw(item.image_path, str(path))
            target, ignored = paint_shapes(item.shapes, image_hw)
        for sent_id, text in enumerate(item.texts[: 1 if sentences == "first" else None], start=1):
            result.append(
                Expression(
                    ref_id=number,
                    sent_id=sent_id,
                    image_id=number,
                    image_path=item.image_path,
                    image_hw=image_hw,
                    text=evaluation_question(text, is_sentence=item.is_sentence),
                    target=encode_mask(target) if target.any() else None,
                    ignored=None if ignored is None else encode_mask(ignored),
                    released_target=released,
                )
            )
    return result


def _turned_as_released(item: ReasonItem) -> RLE | None:
    """Return the released target of an image with an EXIF rotation, in upright coordinates; None without a rotation."""
    turn = turn_of(item.image_path, str(item.json_path))
    if turn is None:
        return None
    target, ignored = paint_shapes(item.shapes, stored_hw(item.image_path, str(item.json_path)))
    values = target.astype(np.uint8) if ignored is None else target + ignored * np.uint8(255)
    stored = decode_rle(encode_as_released(values))
    return encode_mask(np.asarray(Image.fromarray(stored).transpose(turn)))


class ReasonSegSource:
    """One item per image with a text and a target; up to three of its texts as turns, without repeats."""

    def __init__(
        self,
        files: Sequence[Path],
        *,
        name: str,
        split: str,
        most: int,
        released_templates: bool = False,
        ignored_as_background: bool = False,
    ) -> None:
        """Skip files without text or target, and log how many. Raises: DataError."""
        if most < 1:
            raise DataError(f"source {name}: found sentences_per_image {most}, expected 1 or more; correct the config")
        self.name = name
        self._split = split
        self._most = most
        self._released_templates = released_templates
        self._ignored_as_background = ignored_as_background
        self._files = [path for path in files if _is_usable(path)]
        if len(self._files) < len(files):
            num_left_out = len(files) - len(self._files)
            logger.warning("source %s: skipped %d of %d files without text or target", name, num_left_out, len(files))

    def __len__(self) -> int:
        """Return the number of images with a text and a target."""
        return len(self._files)

    def image_path(self, index: int) -> Path:
        """Return the image of an item."""
        return existing_file(self._files[index].with_suffix(".jpg"))

    def get(self, index: int, rng: np.random.Generator) -> Sample:
        """Return an image with its texts in random order. Raises: DataError.

        `image_hw` is None since the file states no size; the image is rotated upright when it is opened.
        """
        item = read_item(self._files[index])
        sample_id = f"{self.name}/{self._split}/{item.json_path.stem}"
        mask, ignored = paint_item(item, upright_hw(item.image_path, sample_id))
        chosen = [item.texts[i] for i in rng.permutation(len(item.texts))[: self._most]]
        turns = [
            reasoning_turn(
                text,
                mask,
                rng,
                is_sentence=item.is_sentence,
                ignored=None if self._ignored_as_background else ignored,
                as_released=self._released_templates,
            )
            for text in chosen
        ]
        return Sample(
            sample_id=sample_id, source=self.name, image_path=item.image_path, image_hw=None, turns=tuple(turns)
        )


def read_item(path: Path) -> ReasonItem:
    """Return one checked file. Raises: DataError."""
    record = _read_json(path)
    texts = dict.fromkeys(text.strip() for text in strings(record, "text", str(path)))
    shapes = field(record, "shapes", list, str(path))
    labelled = [(_label(shape, f"{path}: shape {i}"), shape, i) for i, shape in enumerate(shapes)]
    return ReasonItem(
        json_path=path,
        texts=tuple(text for text in texts if text),
        is_sentence=field(record, "is_sentence", bool, str(path)),
        shapes=tuple(
            read_shape(shape, f"{path}: shape {i}", is_ignored="ignore" in label)
            for label, shape, i in labelled
            if label != "flag"
        ),
        stated_hw=_stated_hw(record, str(path)),
    )


def paint_item(item: ReasonItem, image_hw: SizeHW) -> tuple[BoolMask, BoolMask | None]:
    """Return the target and the ignored pixels of a file for its image of upright size `image_hw`.

    Raises: DataError if the shapes evidently belong to another image: the file states another size, all coordinates
    look like fractions, or a target is outside.
    """
    if item.stated_hw not in (None, image_hw):
        raise DataError(
            f"{item.json_path}: found imageHeight and imageWidth {item.stated_hw}, expected {image_hw} as of the image "
            "held upright; the image was resized or turned after it was annotated, or is another one"
        )
    numbers = [value for shape in item.shapes for point in shape.points for value in point]
    check_pixels(numbers, image_hw, str(item.json_path))
    return paint_shapes(item.shapes, image_hw)


def paint_shapes(shapes: Sequence[Shape], size_hw: SizeHW) -> tuple[BoolMask, BoolMask | None]:
    """Return the target and the ignored pixels, which do not overlap; None if nothing is ignored.

    Areas are counted in pixels within the image; of two equal ones the later in the file is painted last. Raises:
    DataError for a target outside the image.
    """
    painted = [(paint_shape(shape, size_hw), shape) for shape in shapes]
    target, ignored = np.zeros(size_hw, dtype=np.bool_), np.zeros(size_hw, dtype=np.bool_)
    for mask, shape in sorted(painted, key=lambda pair: -int(pair[0].sum())):
        if not (shape.is_ignored or mask.any()):
            raise DataError(
                f"{shape.where}: found a {shape.kind} without a pixel in the image of {size_hw} (height, width), "
                "expected one at least; image and file do not belong together"
            )
        target[mask], ignored[mask] = not shape.is_ignored, shape.is_ignored
    return target, ignored if ignored.any() else None


def _stated_hw(record: object, where: str) -> SizeHW | None:
    """Return the image size stated by LabelMe, None without one. Raises: DataError."""
    if not isinstance(record, dict) or record.get("imageHeight") is None or record.get("imageWidth") is None:
        return None
    return field(record, "imageHeight", int, where), field(record, "imageWidth", int, where)


def _label(shape: object, where: str) -> str:
    """Return the label of a shape in lower case. Raises: DataError."""
    label = field(shape, "label", str, where).lower()
    if any(name in label for name in _NO_TARGETS):
        raise DataError(
            f"{where}: found the label {shown(label)}, expected target, ignore or flag; remove other shapes"
        )
    return label


def _read_json(path: Path) -> object:
    try:
        data = path.read_bytes()
        add_to_fingerprint(path, hashlib.sha256(data).hexdigest())
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = data.decode("cp1252")
        return json.loads(text)
    except FileNotFoundError:
        raise DataError(
            f"{path}: found no such file, expected one beside its image; unpack the dataset again"
        ) from None
    except ValueError as error:
        raise DataError(
            f"{path}: found no readable JSON ({error}), expected text and shapes; download it again"
        ) from error


def _json_files(root: Path, split: str) -> list[Path]:
    """Return the files of a split by name. An image without a file counts too, so that using it raises the error."""
    folder = root / split
    if not folder.is_dir():
        raise MissingDataError(f"{folder}: found no such folder, expected images with JSON files; check root and split")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".jpg", ".json") and not is_hidden(path):
            # Image and file may have different Unicode forms of one name.
            files.setdefault(unicodedata.normalize("NFC", path.stem), existing_file(path.with_suffix(".json")))
    if not files:
        raise DataError(f"{folder}: found no .jpg and no .json, expected images with JSON files; unpack the dataset")
    return sorted(files.values())


def _is_usable(path: Path) -> bool:
    """Return whether a file has a text and a target; an unreadable one is kept, so that `get` raises the error."""
    try:
        item = read_item(path)
    except DataError:
        return True
    return bool(item.texts) and any(not shape.is_ignored for shape in item.shapes)


def _check_choice(name: str, found: str, expected: tuple[str, ...]) -> None:
    if found not in expected:
        raise DataError(f"{name}: found {found!r}, expected one of {expected}; correct the config")
