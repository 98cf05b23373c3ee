"""Answers a question about image files and writes the results.

`scripts/predict.py` calls `predict_files`, which uses a `Predictor`. For `image.jpg` it writes `image.json` and
`image.png`, the image with its masks:

    {"image": "image.jpg", "question": "Please segment the dog.", "answer": "It is [SEG].", "text": "It is.",
     "phrases": [""], "masks": [{"size": [427, 640], "counts": "..."}], "scores": [0.93],
     "boxes": [[120, 48, 311, 402]], "timing": {"encode_s": 0.21, "generate_s": 0.08, "mask_s": 0.02}}
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from pixel_sail.config import PREDICT_TEXTS, ConfigError, PredictCommandConfig, load_config, plain_options
from pixel_sail.data.images import existing_file, load_image
from pixel_sail.evaluation.overlay import PALETTE, ImageArray, tint_mask
from pixel_sail.files import check_writable, is_hidden, replace_bytes, replace_text
from pixel_sail.model.generation import NotFiniteError
from pixel_sail.predictor import Predictor
from pixel_sail.predictor_io import Box, Point, PredictorOutput
from pixel_sail.types import DataError

REGIONS = {"box": ("boxes", 4), "point": ("points", 2)}
"""Option -> the setting it appends to, and its number of coordinates."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def predict_command_config(arguments: Sequence[str]) -> PredictCommandConfig:
    """Return the configuration of a command line: `--image FILE`, `--question TEXT`, `--checkpoint FOLDER` and
    `--output FOLDER` verbatim, any number of `--box X0,Y0,X1,Y1` and `--point X,Y`, and overrides.

    Raises: ConfigError as `load_config`, and for an option that is given twice or has invalid numbers.
    """
    options, overrides = plain_options(arguments, (*PREDICT_TEXTS, *REGIONS))
    texts: dict[str, str] = {}
    regions: dict[str, list[str]] = {}
    for name, text in options:
        if name in REGIONS:
            setting, length = REGIONS[name]
            regions.setdefault(setting, []).append(f"[{','.join(map(repr, _numbers(name, text, length)))}]")
        elif name in texts:
            raise ConfigError(f"--{name} is given twice: {texts[name]!r} and {text!r}")
        else:
            texts[name] = text
    for setting, written in regions.items():
        if any(override.startswith(f"{setting}=") for override in overrides):
            raise ConfigError(f"{setting}=... and the options for it are both given; use one of them")
        overrides.append(f"{setting}=[{','.join(written)}]")
    return load_config("predict", PredictCommandConfig, overrides, given=texts)


def _numbers(name: str, text: str, length: int) -> list[float]:
    """Return the coordinates of an option. Raises: ConfigError."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != length or not all(map(math.isfinite, numbers)):
        raise ConfigError(f"--{name}: found {text!r}, expected {length} comma-separated numbers, in pixels")
    return numbers


def predict_files(config: PredictCommandConfig) -> Iterator[tuple[Path, PredictorOutput | DataError]]:
    """Answer the question about every image, write the results, and yield each image with its answer. With several
    images, the error of an unusable one is yielded instead.

    Boxes, then points, are `<Prompt0>`, `<Prompt1>`, ... Raises: ConfigError for a missing checkpoint, no image, or
    results that would replace an image; DataError for an unusable single image, visual prompt or question.
    """
    files, output = image_files(Path(config.image)), Path(config.output)
    names = result_names(files, output)
    check_writable(output)
    predictor = Predictor.from_pretrained(config.checkpoint, config=config.predict, precision=config.precision)
    regions = _regions(config)
    for path, name in zip(files, names, strict=True):
        try:
            image = load_image(path, where="image")
            result = predictor.ask(image, config.question, regions)
        except NotFiniteError as error:
            # The model is at fault, not the image, so other images would fail too.
            raise DataError(f"{path}: {error}") from None
        except DataError as error:
            if len(files) == 1:
                raise
            yield path, error
            continue
        write_result(output / name, path, config.question, image, result)
        yield path, result


def result_names(files: Sequence[Path], output: Path) -> list[str]:
    """Return the name of each image's results: that of the image, with its suffix if several differ only in it.

    Raises: ConfigError if a result would replace one of the images, or `output` is not a folder.
    """
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output: {output} is a file, expected a folder")
    stems = Counter(path.stem for path in files)
    names = [path.stem if stems[path.stem] == 1 else path.name for path in files]
    # Unlike `Path.resolve` it does not raise for circular links; opening the image does.
    images = {os.path.realpath(path) for path in files}
    for name in names:
        if os.path.realpath(output / f"{name}.png") in images:
            raise ConfigError(f"output: {output / name}.png is one of the images; give another folder for the results")
    return names


def image_files(path: Path) -> list[Path]:
    """Return the image itself, or the sorted images of a folder. Raises: ConfigError if there are none."""
    path = existing_file(path)
    if not path.is_dir():
        return [path]
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(p))
    if not files:
        raise ConfigError(f"image {path}: the folder holds no image, expected files ending in {IMAGE_SUFFIXES}")
    return files


def _regions(config: PredictCommandConfig) -> list[Box | Point]:
    """Return the marked regions. Raises: ConfigError for a wrong number of coordinates."""
    for name, regions, length in (("boxes", config.boxes, 4), ("points", config.points, 2)):
        for region in regions:
            if not isinstance(region, list) or len(region) != length:
                raise ConfigError(
                    f"{name}: found {region!r:.100}, expected {'x0, y0, x1, y1' if length == 4 else 'x, y'} in a list "
                    "of its own"
                )
    return [*(Box(*box) for box in config.boxes), *(Point(*point) for point in config.points)]


def write_result(place: Path, path: Path, question: str, image: Image.Image, result: PredictorOutput) -> None:
    """Write an answer as `<place>.json`, and its masks as an image, `<place>.png`."""
    record = {"image": path.name, "question": question, **result.to_json()}
    replace_text(place.with_name(f"{place.name}.json"), json.dumps(record, indent=1) + "\n")
    painted: ImageArray = np.asarray(image)
    for index, mask in enumerate(result.masks_NHW):
        painted = tint_mask(painted, mask, PALETTE[index % len(PALETTE)])
    content = BytesIO()
    Image.fromarray(painted).save(content, format="PNG")
    replace_bytes(place.with_name(f"{place.name}.png"), content.getvalue())
