"""Free questions about image files.

Place in the flow: `scripts/predict.py` calls `ask_files`. For `photo.jpg` it writes `photo.json` and `photo.png`:

    {"image": "photo.jpg", "question": "Please segment the dog.", "answer": "It is [SEG].",
     "masks": [{"size": [427, 640], "counts": "..."}], "scores": [0.93]}
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from pixel_sail import dist
from pixel_sail.config import AskConfig, ConfigError
from pixel_sail.data.images import load_image
from pixel_sail.evaluation.overlay import PALETTE, Picture, paint
from pixel_sail.evaluation.predict import Predictor, Reply
from pixel_sail.evaluation.run import checkpoint_folder
from pixel_sail.files import replace_text
from pixel_sail.rle import encode_mask
from pixel_sail.types import SizeHW, VisualPrompt

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def ask_files(config: AskConfig) -> Iterator[tuple[Path, Reply]]:
    """Answer the question about every image, write the results, and yield each image with its reply.

    Raises: ConfigError for a missing checkpoint or no image; DataError for an image or visual prompt that cannot be
    used.
    """
    predictor = Predictor.from_pretrained(
        checkpoint_folder(config.checkpoint),
        config=config.predict,
        precision=config.precision,
        device=str(dist.local_device()),
    )
    for path in image_files(Path(config.image)):
        image = load_image(path, where="image")
        prompts = visual_prompts(config, (image.height, image.width))
        (reply,) = predictor.ask(image, [config.question], prompts)
        write_reply(Path(config.output), path, config.question, image, reply)
        yield path, reply


def image_files(path: Path) -> list[Path]:
    """Return the image itself, or the images of a folder in order; ConfigError when there is none."""
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"image {path}: the folder holds no image, expected files ending in {IMAGE_SUFFIXES}")
    return files


def visual_prompts(config: AskConfig, image_hw: SizeHW) -> tuple[VisualPrompt, ...]:
    """Return boxes, then points, as prompts 0, 1, ...; ConfigError for one outside the image."""
    height, width = image_hw
    prompts = []
    for box in config.boxes:
        if len(box) != 4 or not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
            raise ConfigError(
                f"boxes: found {box}, expected x0, y0, x1, y1 inside the image of {width} x {height} pixels"
            )
        mask = np.zeros(image_hw, dtype=bool)
        mask[int(box[1]) : max(int(box[3]), int(box[1]) + 1), int(box[0]) : max(int(box[2]), int(box[0]) + 1)] = True
        prompts.append(mask)
    for point in config.points:
        if len(point) != 2 or not (0 <= point[0] < width and 0 <= point[1] < height):
            raise ConfigError(f"points: found {point}, expected x, y inside the image of {width} x {height} pixels")
        mask = np.zeros(image_hw, dtype=bool)
        mask[int(point[1]), int(point[0])] = True
        prompts.append(mask)
    return tuple(VisualPrompt(prompt_id=index, mask=mask) for index, mask in enumerate(prompts))


def write_reply(output: Path, path: Path, question: str, image: Image.Image, reply: Reply) -> None:
    """Write answer and masks as JSON and as a picture."""
    record = {
        "image": path.name,
        "question": question,
        "answer": reply.text,
        "masks": [encode_mask(mask) for mask in reply.masks_NHW],
        "scores": list(reply.scores),
    }
    replace_text(output / f"{path.stem}.json", json.dumps(record, indent=1) + "\n")
    picture: Picture = np.asarray(image)
    for index, mask in enumerate(reply.masks_NHW):
        picture = paint(picture, mask, PALETTE[index % len(PALETTE)])
    Image.fromarray(picture).save(output / f"{path.stem}.png")
