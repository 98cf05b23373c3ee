"""Damaged files of every format are either read or rejected with a DataError, for any changed bytes."""

import io
import json
import pickle
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shared_data import SHARED

from pixel_sail.data.checking.findings import Findings
from pixel_sail.data.checking.refer_files import ReferFolder, check_refer
from pixel_sail.data.images import load_image
from pixel_sail.data.masks import decode_segmentation
from pixel_sail.data.pickles import load_plain_pickle
from pixel_sail.data.records import open_records
from pixel_sail.data.refs_files import convert
from pixel_sail.data.sources.refer import ReferSource, expressions, load_refer
from pixel_sail.rle import encode_mask
from pixel_sail.types import DataError

NUM_DAMAGES = 40
REAL = SHARED / "data" / "derived_refer_mini"
REAL_IMAGE = REAL / "images" / "mscoco" / "images" / "train2014" / "COCO_train2014_000000099598.jpg"


def mutated_bytes(rng, data):
    """Return the bytes with one or two damages: bits, bytes, cuts, repeats and digits."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 3)):
        at = int(rng.integers(max(1, len(changed))))
        length = int(rng.integers(1, 9))
        piece = bytes(rng.integers(0, 256, length, dtype=np.uint8))
        match rng.integers(7):
            case 0:
                changed[at : at + 1] = bytes([(changed[at] if changed else 0) ^ (1 << int(rng.integers(8)))])
            case 1:
                changed[at : at + length] = piece
            case 2:
                del changed[at : at + length]
            case 3:
                changed[at:at] = bytes(changed[at : at + 20 * length])
            case 4:
                del changed[max(1, at) :]
            case 5:
                changed[at : at + 1] = b'0123456789-.eE,:[]{}"\\ntf'[at % 25 : at % 25 + 1]
            case _:
                changed[at:at] = piece
    return bytes(changed)


def _outcomes(read, data, path, *, seed, number=NUM_DAMAGES):
    """Read damaged copies of a file; return how many were read and how many rejected. Other errors propagate."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    read(path)
    counts = {"read": 0, "refused": 0}
    for _ in range(number):
        path.write_bytes(mutated_bytes(rng, data))
        try:
            read(path)
            counts["read"] += 1
        except DataError:
            counts["refused"] += 1
    return counts


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXEL_SAIL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def limited_memory():
    """A damaged length may request any amount of memory; more than 2 GB raises an error."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def _random_image():
    grid = np.arange(48)[:, None, None] * np.arange(64)[None, :, None] * np.array([1, 2, 3])
    return Image.fromarray((grid % 256).astype(np.uint8))


def _encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


IMAGES = {
    "JPEG": lambda: _encoded(_random_image(), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00"
                             b"\x03\x00\x00\x00\x01\x00\x06\x00\x00\x00\x00\x00\x00"),
    "progressive JPEG": lambda: _encoded(_random_image(), "JPEG", progressive=True),
    "PNG": lambda: _encoded(_random_image(), "PNG"),
    "palette PNG": lambda: _encoded(_random_image().quantize(16), "PNG"),
    "16-bit PNG": lambda: _encoded(Image.fromarray(np.arange(3000, dtype=np.uint16).reshape(50, 60)), "PNG"),
}  # fmt: skip


@pytest.mark.parametrize("kind", IMAGES)
def test_damaged_images_are_read_or_rejected(tmp_path, kind):
    def read(path):
        image = load_image(path, where="fuzz")
        assert image.mode == "RGB" and min(image.size) > 0

    counts = _outcomes(read, IMAGES[kind](), tmp_path / "a.img", seed=1, number=3 * NUM_DAMAGES)
    assert counts["refused"] > 0


def test_a_damaged_real_image_is_read_or_rejected(tmp_path):
    if not REAL_IMAGE.is_file():
        pytest.skip(f"{REAL_IMAGE} is absent")
    data = REAL_IMAGE.read_bytes()
    counts = _outcomes(lambda path: load_image(path, where="fuzz"), data, tmp_path / "a.jpg", seed=2, number=30)
    assert min(counts.values()) > 0


def _records():
    rows = [
        {"id": i, "image_id": i // 2, "text": "caf\u00e9 \U0001f600"[: i % 7], "box": [0.5, i, -1e3]} for i in range(12)
    ]
    return json.dumps({"info": {"a": None}, "images": rows[:3], "annotations": rows}, ensure_ascii=False).encode()


def _read_records(path):
    records = open_records(path, "annotations")
    assert len(list(records)) == len(records)
    records.lookup("image_id").all(1)


def test_damaged_record_files_are_read_or_rejected(tmp_path):
    counts = _outcomes(_read_records, _records(), tmp_path / "a.json", seed=3, number=2 * NUM_DAMAGES)
    assert min(counts.values()) > 0


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_damaged_pickles_are_read_or_rejected(tmp_path, protocol):
    content = [{"ref_id": i, "box": (1.5, None, True), "text": "two words", "ids": [1, i]} for i in range(9)]
    data = pickle.dumps(content, protocol=protocol)
    counts = _outcomes(load_plain_pickle, data, tmp_path / "a.p", seed=4, number=4 * NUM_DAMAGES)
    assert min(counts.values()) > 0


@pytest.mark.parametrize("segmentation", ["rle", "runs", "polygons"])
def test_damaged_segmentations_are_read_or_rejected(tmp_path, segmentation):
    mask = np.zeros((30, 40), bool)
    mask[4:20, 5:30] = mask[10:28, 20:22] = True
    value = {
        "rle": encode_mask(mask),
        "runs": {"size": [30, 40], "counts": [100, 20, 1080]},
        "polygons": [[1, 2, 30.5, 2, 30.5, 20, 1, 20], [5, 5, 9, 5, 9, 9]],
    }[segmentation]

    def read(path):
        try:
            found = json.loads(path.read_bytes())
        except ValueError:
            raise DataError("not JSON, so nothing for this reader") from None
        assert decode_segmentation(found, (30, 40), "fuzz").shape == (30, 40)

    data = json.dumps(value).encode()
    counts = _outcomes(read, data, tmp_path / "a.json", seed=5, number=3 * NUM_DAMAGES)
    # After damage, runs rarely still fill the image exactly.
    assert counts["refused"] > 0 and (counts["read"] > 0 or segmentation != "polygons")


def _write_refer(folder):
    """Write a REFER and a gRefCOCO folder of two synthetic images."""
    image_dir = folder / "images" / "train2014"
    image_dir.mkdir(parents=True)
    for image_id in (1, 2):
        (image_dir / f"{image_id}.png").write_bytes(_encoded(_random_image(), "PNG"))
    images = [{"id": i, "file_name": f"{i}.png", "height": 48, "width": 64} for i in (1, 2)]
    rle = encode_mask(np.eye(48, 64, dtype=bool))
    annotations = [
        {"id": 10 + i, "image_id": i, "segmentation": rle if i == 1 else [[1, 1, 9, 1, 9, 9]]} for i in (1, 2)
    ]
    refs = [
        {"ref_id": i, "image_id": i, "ann_id": 10 + i, "split": "train",
         "sentences": [{"sent_id": i, "sent": "it", "raw": "It."}], "sent_ids": [i]} for i in (1, 2)
    ]  # fmt: skip
    for name, data in (("toy", pickle.dumps(refs)), ("gtoy", json.dumps(refs).encode())):
        (folder / name).mkdir()
        (folder / name / ("refs(unc).p" if name == "toy" else "grefs(unc).json")).write_bytes(data)
        (folder / name / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder


def _read_refer(root, dataset, split):
    annotations = load_refer(root, dataset, split)
    expressions(annotations)
    source = ReferSource(annotations, name="fuzz")
    for index in range(len(source)):
        source.get(index, np.random.default_rng(0))


REFER_FILES = ["toy/refs(unc).p", "toy/instances.json", "gtoy/grefs(unc).json"]


@pytest.mark.parametrize("file", REFER_FILES)
def test_damaged_refer_folders_are_read_or_rejected_and_the_check_survives_them(tmp_path, file):
    root = _write_refer(tmp_path / "root")
    dataset = file.split("/")[0]

    def read(path):
        # The check reports the error instead of raising it.
        check_refer(ReferFolder(root=root, dataset=dataset), Findings(), sample=None, progress=False)
        _read_refer(root, dataset, "train")

    counts = _outcomes(read, (root / file).read_bytes(), root / file, seed=6)
    assert min(counts.values()) > 0


@pytest.mark.parametrize("file", ["refcocog/refs(google).p", "refcocog/instances.json"])
def test_damaged_real_refer_files_are_read_or_rejected_and_the_check_survives_them(tmp_path, file):
    if not REAL.is_dir():
        pytest.skip(f"{REAL} is absent; set PIXEL_SAIL_SHARED to the folder that holds data/derived_refer_mini")
    root = tmp_path / "root"
    shutil.copytree(REAL / "refcocog", root / "refcocog", copy_function=shutil.copyfile)
    for path in (root, *root.rglob("*")):
        path.chmod(0o755)

    def read(path):
        check_refer(ReferFolder(root=root, dataset="refcocog"), Findings(), sample=None, progress=False)
        _read_refer(root, "refcocog", "val")

    counts = _outcomes(read, (root / file).read_bytes(), root / file, seed=7, number=30)
    assert min(counts.values()) > 0


def test_damaged_converted_refs_are_rejected(tmp_path):
    root = _write_refer(tmp_path / "root")
    converted, _ = convert(root / "toy" / "refs(unc).p")
    counts = _outcomes(lambda path: _read_refer(root, "toy", "train"), converted.read_bytes(), converted, seed=8)
    assert counts["refused"] > NUM_DAMAGES // 2
