"""Scenes of RefShapes: the positions of objects, the exact visible mask of every object, and the rendered image.

`focus.py` samples the objects; `expressions.py` describes a `Scene`, `formats.py` writes both to disk. Everything is a
pure function of the given generator. A scene, for example:

    Scene(image_hw=(128, 128), focus="place", objects=(
        SceneObject(index=0, colour="red", shape="star", texture="plain", size="large", centre_xy=(40.2, 91.7),
                    box_xyxy=(17, 70, 64, 115), area=1012, mask=<bool 128x128>), ...))

`objects` is in painting order: a later object covers an earlier one, and masks never overlap. The image is cluttered on
purpose (noise, blobs, strokes, muted fragments, uneven light, blur, sensor noise), but only the objects have a vivid
color, white or black.
"""

import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from pixel_sail.refshapes.focus import SceneRules, pick_focus, sample_kinds
from pixel_sail.refshapes.kinds import SHAPES, Attributes, pick
from pixel_sail.types import BoolMask, SizeHW

FloatArray = NDArray[np.floating[Any]]

COLOUR_RGB: dict[str, tuple[int, int, int]] = {
    "red": (206, 30, 38),
    "green": (36, 158, 58),
    "blue": (32, 78, 214),
    "yellow": (246, 220, 44),
    "purple": (140, 44, 176),
    "orange": (246, 132, 16),
    "pink": (246, 140, 190),
    "cyan": (64, 206, 226),
    "white": (246, 246, 244),
    "black": (16, 16, 20),
}
IMAGE_SIZES: tuple[SizeHW, ...] = ((128, 128), (112, 144), (144, 112))
ACROSS_PX = {"small": (24.0, 31.0), "large": (44.0, 58.0)}
"""Range of the diameter of each size class."""
MIN_VISIBLE_FRACTION = 0.6
MAX_TILT_DEG = {"circle": 180, "ring": 180, "square": 14, "triangle": 24, "star": 36, "cross": 18}
MUDDY_RGB = np.array(
    [(112, 96, 74), (138, 126, 100), (92, 104, 82), (88, 98, 110), (150, 138, 122), (74, 68, 62), (120, 110, 116),
     (104, 120, 112), (160, 142, 112), (96, 82, 76)],
    dtype=np.float32,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SceneObject(Attributes):
    """One rendered object with the geometry of its visible region."""

    index: int
    centre_xy: tuple[float, float]
    """Centroid of the visible region, in pixels."""
    box_xyxy: tuple[int, int, int, int]
    """Half-open: x1 and y1 are one past the last visible pixel."""
    area: int
    visible_fraction: float
    mask: BoolMask


@dataclass(frozen=True, kw_only=True)
class _Stamp:
    """One object before it is placed: square arrays centered on it."""

    kind: Attributes
    across_px: float
    alpha: FloatArray
    rgb: FloatArray


_Placed = tuple[_Stamp, int, int]
"""A stamp with the row and column of its upper left corner."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The objects of an image in painting order; `paint_scene` renders the image."""

    image_hw: SizeHW
    focus: str
    """The kind of words that identifies the targets, one of FOCI."""
    objects: tuple[SceneObject, ...]
    placed: tuple[_Placed, ...] = ()
    """The stamp of each object."""


def sample_scene(rng: np.random.Generator, rules: SceneRules) -> Scene:
    """Sample one scene that satisfies the rules."""
    image_hw, focus = pick(rng, IMAGE_SIZES), pick_focus(rng, rules)
    for _ in range(50):
        stamps = [_make_stamp(rng, kind) for kind in sample_kinds(rng, focus, rules)]
        placed, owner = _place(rng, stamps, image_hw)
        if len(placed) == len(stamps):
            objects = tuple(_measure(index, *item, owner) for index, item in enumerate(placed))
            return Scene(image_hw=image_hw, focus=focus, objects=objects, placed=tuple(placed))
    raise AssertionError(f"no scene in 50 attempts: image {image_hw}, focus {focus}, {rules}; the objects do not fit")


def signed_distance(shape: str, x: FloatArray, y: FloatArray) -> FloatArray:
    """Return the (nearly) signed distance to the outline of a shape of radius 1: negative inside, y points down."""
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        return np.hypot(x, y) - 1.0
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.76) - 0.24
    if shape == "square":
        return np.maximum(ax, ay) - 0.88
    if shape == "cross":
        bar, arm = np.float32(0.32), np.float32(1.0)
        return np.minimum(np.maximum(ax - bar, ay - arm), np.maximum(ax - arm, ay - bar))
    if shape == "triangle":
        return np.maximum(y - 0.72, ax * 0.8660254 - y * 0.5 - 0.62)
    assert shape == "star", f"unknown shape {shape!r}, expected one of {SHAPES}"
    return _star_distance(x, y)


def _star_distance(x: FloatArray, y: FloatArray) -> FloatArray:
    """Fold the plane to half of one of five points, in which the outline is a single straight edge."""
    outer, inner, sector = 1.14, 0.52, 2 * math.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
    radius = np.hypot(x, y)
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    end_along, end_across = inner * math.cos(sector / 2), inner * math.sin(sector / 2)
    edge_along, edge_across = end_along - outer, end_across
    length = math.hypot(edge_along, edge_across)
    return ((across * -edge_along) + (along - outer) * edge_across) / length


def _make_stamp(rng: np.random.Generator, kind: Attributes) -> _Stamp:
    """Render one object: its soft outline and its textured, slightly shaded paint."""
    across = float(rng.uniform(*ACROSS_PX[kind.size]))
    if kind.size == "large":
        across = min(across, float(rng.uniform(*ACROSS_PX[kind.size])))
    radius = across / 2
    reach = math.ceil(radius * 1.2) + 1
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32)
    tilt = math.radians(float(rng.uniform(-1, 1)) * MAX_TILT_DEG[kind.shape])
    u, v = x * math.cos(tilt) + y * math.sin(tilt), y * math.cos(tilt) - x * math.sin(tilt)
    alpha = np.clip(0.5 - signed_distance(kind.shape, u / radius, v / radius) * radius, 0.0, 1.0).astype(np.float32)
    hue_jitter = 2.5 if kind.colour in ("white", "black") else 8.0
    base = np.array(COLOUR_RGB[kind.colour], dtype=np.float32) + rng.normal(0, hue_jitter, 3).astype(np.float32)
    base = np.clip(base, 8, 252)
    is_dark = float(base @ (0.3, 0.59, 0.11)) < 120
    second = base + (255 - base) * 0.5 if is_dark else base * 0.52
    pattern = _pattern(rng, kind.texture, u, v, across)[:, :, None]
    slope = rng.normal(0, 0.1, 2).tolist()
    shade = 1.0 + (x * slope[0] + y * slope[1])[:, :, None] / radius
    rgb = (base * (1 - pattern) + second * pattern) * shade
    return _Stamp(kind=kind, across_px=across, alpha=alpha, rgb=rgb.astype(np.float32))


def _pattern(rng: np.random.Generator, texture: str, u: FloatArray, v: FloatArray, across: float) -> FloatArray:
    """Return how much of the second tone shows at each pixel, 0 to 1."""
    if texture == "plain":
        return np.zeros_like(u)
    period = float(np.clip(across * 0.22, 6.0, 9.0))
    wave = 2 * math.pi / period
    phase_u, phase_v = rng.uniform(0, 2 * math.pi, 2).tolist()
    if texture == "striped":
        angle = float(rng.uniform(0, math.pi))
        along = u * math.cos(angle) + v * math.sin(angle)
        return np.clip(np.sin(along * wave + phase_u) * 2.5 + 0.3, 0, 1)
    if texture == "dotted":
        return np.clip((np.cos(u * wave + phase_u) + np.cos(v * wave + phase_v) - 0.5) * 2.2, 0, 1)
    wave *= 0.62
    return np.clip(np.sin(u * wave + phase_u) * np.sin(v * wave + phase_v) * 5 + 0.5, 0, 1)


def _place(rng: np.random.Generator, stamps: list[_Stamp], image_hw: SizeHW) -> tuple[list[_Placed], NDArray[np.int64]]:
    """Return the placed stamps and the owner of each pixel (-1: none).

    An object may cover others of another color, as long as each keeps its visible fraction. Stamps without room are
    dropped.
    """
    height, width = image_hw
    owner = np.full(image_hw, -1, dtype=np.int64)
    placed: list[_Placed] = []
    full: list[int] = []
    visible: list[int] = []
    for stamp in stamps:
        inside = stamp.alpha > 0.5
        side, reach = len(inside), math.ceil(stamp.across_px / 2)
        low, high_y, high_x = reach - side // 2, height - reach - side // 2 - 1, width - reach - side // 2 - 1
        wants_room = rng.random() < 0.7
        for attempt in range(24):
            top, left = int(rng.integers(low, high_y)), int(rng.integers(low, high_x))
            rows, cols = slice(max(top, 0), top + side), slice(max(left, 0), left + side)
            under = owner[rows, cols]
            inside_here = inside[rows.start - top :, cols.start - left :][: under.shape[0], : under.shape[1]]
            covered = np.bincount(under[inside_here] + 1, minlength=len(placed) + 1)[1:].tolist()
            touched = [i for i, count in enumerate(covered) if count]
            if touched and wants_room and attempt < 12:
                continue
            if any(placed[i][0].kind.colour == stamp.kind.colour for i in touched):
                continue
            if all(visible[i] - covered[i] >= MIN_VISIBLE_FRACTION * full[i] for i in touched):
                under[inside_here] = len(placed)
                visible = [have - lost for have, lost in zip(visible, covered, strict=True)]
                placed.append((stamp, top, left))
                full.append(int(inside.sum()))
                visible.append(int(inside_here.sum()))
                break
    return placed, owner


def _measure(index: int, stamp: _Stamp, top: int, left: int, owner: NDArray[np.int64]) -> SceneObject:
    mask = owner == index
    rows, cols = np.nonzero(mask)
    box = (int(cols.min()), int(rows.min()), int(cols.max()) + 1, int(rows.max()) + 1)
    return SceneObject(
        **vars(stamp.kind),
        index=index,
        centre_xy=(float(cols.mean()), float(rows.mean())),
        box_xyxy=box,
        area=len(rows),
        visible_fraction=len(rows) / int((stamp.alpha > 0.5).sum()),
        mask=mask,
    )


def paint_scene(rng: np.random.Generator, scene: Scene) -> NDArray[np.uint8]:
    """Return background, clutter and objects, then camera effects: uneven light, blur and sensor noise."""
    height, width = scene.image_hw
    canvas = _clutter(rng, _background(rng, scene.image_hw))
    for stamp, top, left in scene.placed:
        for shift, rgb, strength in ((2, None, 0.3), (0, stamp.rgb, 1.0)):
            y0, x0 = max(top + shift, 0), max(left + shift, 0)
            side = len(stamp.alpha)
            view = canvas[y0 : top + shift + side, x0 : left + shift + side]
            part = (slice(y0 - top - shift, y0 - top - shift + view.shape[0]),
                    slice(x0 - left - shift, x0 - left - shift + view.shape[1]))  # fmt: skip
            alpha = stamp.alpha[part][:, :, None] * strength
            view *= 1 - alpha
            if rgb is not None:
                view += rgb[part] * alpha
    light_y, light_x = rng.uniform(-0.16, 0.16, 2)
    ramp_y = np.linspace(-light_y, light_y, height, dtype=np.float32)
    ramp_x = np.linspace(-light_x, light_x, width, dtype=np.float32)
    canvas *= (0.98 + ramp_y[:, None] + ramp_x)[:, :, None]
    blurred = _to_image(canvas).filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 0.7))))
    noise = rng.standard_normal((height, width, 3), dtype=np.float32) * np.float32(rng.uniform(2.0, 6.0))
    return np.clip(np.asarray(blurred, dtype=np.float32) + noise, 0, 255).astype(np.uint8)


def _to_image(canvas: FloatArray) -> Image.Image:
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


def _background(rng: np.random.Generator, image_hw: SizeHW) -> FloatArray:
    """Return soft gradients between muddy colors with five octaves of gray noise on top."""
    height, width = image_hw
    colours = MUDDY_RGB[rng.integers(len(MUDDY_RGB), size=3)]
    grid = colours[rng.integers(3, size=(4, 4))] + rng.normal(0, 10, (4, 4, 3))
    soft = _to_image(grid.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    canvas = np.array(soft, dtype=np.float32)
    roughness = float(rng.uniform(0.5, 1.3))
    grey = np.zeros(image_hw, dtype=np.float32)
    for cells, amplitude in ((5, 16), (10, 12), (22, 9), (46, 7), (90, 5)):
        octave = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32) * amplitude * roughness)
        grey += np.asarray(octave.resize((width, height), Image.Resampling.BILINEAR))
    return canvas + grey[:, :, None]


def _muddy(rng: np.random.Generator) -> tuple[int, ...]:
    """Return one muddy color, darker or lighter than in the table but never nearly white."""
    colour = MUDDY_RGB[int(rng.integers(len(MUDDY_RGB)))] * rng.uniform(0.55, 1.38)
    return tuple(int(value) for value in np.minimum(colour, 212))


def _clutter(rng: np.random.Generator, canvas: FloatArray) -> FloatArray:
    """Paint what no expression names: blobs, muted fragments and thin strokes."""
    height, width = canvas.shape[:2]
    over = _to_image(canvas)
    draw = ImageDraw.Draw(over)
    for _ in range(int(rng.integers(8, 16))):
        x, y, reach = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(5, 20)
        colour = _muddy(rng)
        if rng.random() < 0.4:
            flat = float(rng.uniform(0.3, 0.8)) * reach
            draw.ellipse((x - reach, y - flat, x + reach, y + flat), fill=colour)
            continue
        angles = np.sort(rng.uniform(0, 2 * math.pi, int(rng.integers(5, 9))))
        radii = rng.uniform(0.25, 1.0, len(angles)) * reach
        corners = np.stack([x + radii * np.cos(angles), y + radii * np.sin(angles)], 1)
        draw.polygon(corners.ravel().tolist(), fill=colour)
    over = over.filter(ImageFilter.BoxBlur(float(rng.uniform(0.8, 2.0))))
    draw = ImageDraw.Draw(over)
    for _ in range(int(rng.integers(4, 11))):
        points = np.cumsum(rng.normal(0, 14, (4, 2)), 0) + rng.uniform(0, 1, 2) * (width, height)
        colour = _muddy(rng)
        draw.line(points.ravel().tolist(), fill=colour, width=int(rng.integers(1, 3)), joint="curve")
    strength = np.float32(rng.uniform(0.55, 0.85))
    return canvas * (1 - strength) + np.asarray(over, dtype=np.float32) * strength


def encode_jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """Return an image as a JPEG of quality 90."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()
