"""The parts of the data check: records, items, paths, published numbers and the table of downloads."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running import ROOT
from shared_data import shared_data

from pixel_sail.config import CONFIG_FOLDER
from pixel_sail.data.checking.contamination import contamination_key
from pixel_sail.data.checking.downloads import DOWNLOADS, advice_for, downloads_of
from pixel_sail.data.checking.files import annotation_files, check_source_paths, file_fact
from pixel_sail.data.checking.findings import FindingKind, Findings, Lengths, SoundFraction
from pixel_sail.data.checking.instances import read_instances, segmentation_problems
from pixel_sail.data.checking.items import ItemCheck, check_items, check_sample, chosen_items
from pixel_sail.data.checking.known import KNOWN_FILE, expected_images, known_split
from pixel_sail.data.checking.refs import check_refs
from pixel_sail.types import DataError, Sample, Turn, VisualPrompt

SQUARE = [[0, 0, 3, 0, 3, 3, 0, 3]]


REFS = [
    "no dict",
    {"ref_id": "7", "image_id": 1, "ann_id": 9, "split": "val", "sentences": [{"sent_id": 1, "sent": "a", "raw": "A"}]},
    {"ref_id": 1, "image_id": None, "ann_id": 10, "split": "val", "sentences": []},
    {"ref_id": 2, "image_id": 1, "ann_id": [], "split": "", "sentences": [{"sent_id": 1, "sent": " ", "raw": " "}]},
    {"ref_id": 2, "image_id": 1, "ann_id": -1, "split": "val", "sentences": [{"sent_id": 1, "sent": "a"}]},
    {"ref_id": 4, "image_id": 1, "ann_id": [-1], "split": "val", "sentences": None},
    {"ref_id": 5, "image_id": 1, "ann_id": [10], "split": "val", "sent_ids": [1, 2],
     "sentences": [{"sent_id": 1, "sent": "two words", "raw": "Two words."}, {"sent": "no id", "raw": "no id"}]},
]  # fmt: skip


def test_every_wrong_ref_is_named(tmp_path):
    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps(REFS))
    findings = Findings()
    rows = check_refs(path, findings)
    troubles = {(f.kind, f.subject.removeprefix(f"{path}: ")) for f in findings.all() if f.is_trouble}
    assert troubles == {
        (FindingKind.REF_RECORD, "refs[0]"),
        (FindingKind.REF_RECORD, "refs[1]"),
        (FindingKind.REF_RECORD, "refs[2], ref_id 1"),
        (FindingKind.NO_SENTENCE, "refs[2], ref_id 1"),
        (FindingKind.REF_RECORD, "refs[3], ref_id 2"),
        (FindingKind.DUPLICATE_REF_ID, "refs[4], ref_id 2"),
        (FindingKind.REF_RECORD, "refs[4], ref_id 2"),
        (FindingKind.DUPLICATE_SENTENCE, "refs[4], ref_id 2, sentence 0"),
        (FindingKind.NO_SENTENCE, "refs[4], ref_id 2, sentence 0"),
        (FindingKind.REF_RECORD, "refs[5], ref_id 4"),
        (FindingKind.NO_SENTENCE, "refs[5], ref_id 4"),
        (FindingKind.REF_RECORD, "refs[6], ref_id 5, sentence 1"),
        (FindingKind.NO_SENTENCE, "refs[6], ref_id 5"),
    }
    assert [(row.image_id, row.ann_ids, row.text_lengths) for row in rows][-1] == (1, (10,), (9,))
    assert [f.kind for f in findings.all() if not f.is_trouble] == [FindingKind.EMPTY_TEXT]


def test_generalised_refs_may_have_no_target_and_no_sentence(tmp_path):
    path = tmp_path / "grefs(unc).json"
    path.write_text(json.dumps([{"ref_id": 1, "image_id": 1, "ann_id": [-1], "split": "val", "sentences": []}]))
    findings = Findings()
    (row,) = check_refs(path, findings)
    assert row.ann_ids == ()
    assert [(f.kind, f.is_trouble) for f in findings.all()] == [(FindingKind.NO_SENTENCE, False)]


def checked_instances(tmp_path, *annotations):
    images = [{"id": 1, "file_name": "a.jpg", "height": 100, "width": 100}]
    path = tmp_path / "instances.json"
    annotations = [{"id": i, "image_id": 1} | row for i, row in enumerate(annotations, start=1)]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    findings = Findings()
    read_instances(path, findings, is_chosen=lambda _: True, is_used=lambda _: True, progress=False)
    return [(found.kind, found.is_trouble, found.message) for found in findings.all()]


def square(start, end):
    return [start, start, end, start, end, end, start, end]


def test_masks_that_differ_from_the_stated_area_are_counted_with_examples(tmp_path):
    rows = [
        {"segmentation": [square(10, 50)], "area": 1600},
        {"segmentation": [square(10, 50)], "area": 1500.5},
        {"segmentation": [square(10, 50), square(20, 40)], "area": 1200},
        {"segmentation": [square(10, 50)], "area": 16},
        {"segmentation": [square(10, 14)], "area": 30},
        {"segmentation": [square(10, 50)]},
    ]
    ((kind, is_trouble, message),) = checked_instances(tmp_path, *rows)
    assert (kind, is_trouble) == (FindingKind.AREA, False)
    assert message.startswith(
        "found 2 of 5 masks whose pixels differ from the stated area by more than 15% (annotations[2], id 3: 1600 "
        "pixels, stated 1200; annotations[3], id 4: 1600 pixels, stated 16)"
    )


def test_fractions_are_a_trouble_and_the_corner_of_a_file_in_pixels_is_none(tmp_path):
    fractions, corner = {"segmentation": [[0.1, 0.2, 0.6, 0.2, 0.6, 0.8]]}, {"segmentation": [square(0, 1)]}
    assert [(kind, bad) for kind, bad, _ in checked_instances(tmp_path, fractions, corner)] == [
        (FindingKind.FRACTIONS, True)
    ] * 2
    assert checked_instances(tmp_path, {"segmentation": [square(10, 50)]}, corner) == []


def test_lists_of_encodings_are_accepted_and_short_polygons_reported(tmp_path):
    rle = {"size": [100, 100], "counts": [0, 50, 9950]}
    assert checked_instances(tmp_path, {"segmentation": [rle], "area": 50}) == []
    ((kind, is_trouble, message),) = checked_instances(tmp_path, {"segmentation": [square(10, 50), [1, 1, 2, 2]]})
    assert (kind, is_trouble) == (FindingKind.SHORT_POLYGON, False)
    assert message.startswith("found 1 polygons with fewer than three points, the first is polygon 1")
    ((kind, is_trouble, _),) = checked_instances(tmp_path, {"segmentation": [[1, 1, 2, 2]]})
    assert (kind, is_trouble) == (FindingKind.BAD_MASK, True)
    ((kind, is_trouble, _),) = checked_instances(tmp_path, {"segmentation": [rle | {"size": [1, 2]}]})
    assert (kind, is_trouble) == (FindingKind.MASK_SIZE, True)


def test_half_a_character_in_a_ref_is_named(tmp_path):
    sentence = {"sent_id": 1, "sent": "\ud800 star", "raw": "a star"}
    ref = {"ref_id": 1, "image_id": 1, "ann_id": 10, "split": "val", "sentences": [sentence]}
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([ref]))
    findings = Findings()
    check_refs(tmp_path / "refs(unc).p", findings)
    (found,) = findings.all()
    assert (found.kind, found.is_trouble) == (FindingKind.REF_RECORD, True) and "half a character" in found.message


@pytest.mark.parametrize("content", [b"", b"{}", b"[1", b"\x80\x04"])
@pytest.mark.parametrize("name", ["refs(unc).p", "grefs(unc).json", "refs(unc).jsonl"])
def test_an_unreadable_refs_file_is_one_trouble(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    findings = Findings()
    assert check_refs(tmp_path / name, findings) == []
    assert [f.kind for f in findings.all()] == [FindingKind.UNREADABLE_FILE]


def test_the_same_image_has_one_key_and_synthetic_images_have_their_own(tmp_path):
    old, new = Path("a/train2014/COCO_train2014_000000000009.jpg"), Path("b/train2017/000000000009.jpg")
    assert contamination_key(old) == contamination_key(new) == "coco 9"
    assert contamination_key(Path("a/sa_1.jpg")) == "sa_1.jpg"
    (tmp_path / "meta.json").write_text('{"generator_version": 1}')
    assert contamination_key(tmp_path / "images" / "train2014" / old.name) != "coco 9"


class _Listed:
    """A source of given samples; a DataError in the list is raised."""

    name = "listed"

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def image_path(self, index):
        return getattr(self.samples[index], "image_path", None)

    def get(self, index, rng):
        if isinstance(self.samples[index], DataError):
            raise self.samples[index]
        return self.samples[index]


def _sample(sample_id, turns, prompts=(), path=None, image_hw=(4, 5)):
    return Sample(
        sample_id=sample_id, source="listed", image_path=path, image_hw=image_hw, turns=turns, prompts=prompts
    )


def test_every_wrong_item_of_any_source_is_named(tmp_path):
    image = tmp_path / "a.png"
    Image.new("RGB", (5, 4)).save(image)
    full, empty, other = np.ones((4, 5), bool), np.zeros((4, 5), bool), np.ones((5, 4), bool)

    def turn(answer="It is [SEG].", masks=(full,), question="where?"):
        return Turn(question=question, answer=answer, masks=masks)

    prompt = VisualPrompt(prompt_id=3, mask=full)
    samples = {
        "good": _sample("good", (turn(),), path=image),
        "no target": _sample("no target", (turn("No target [SEG].", (empty,)),), path=image),
        "empty": _sample("empty", (turn(masks=(empty,)),), path=image),
        "size": _sample("size", (turn(masks=(other,)),), path=image),
        "places": _sample("places", (turn("nothing"),), path=image),
        "question": _sample("question", (turn(question="[SEG]?"),), path=image),
        "silent": _sample("silent", (turn(question=" "),), path=image),
        "no turn": _sample("no turn", (), path=image),
        "unnamed": _sample("unnamed", (turn(),), (prompt,), path=image),
        "twice": _sample("twice", (turn(question="<Prompt3>?"),), (prompt, prompt), path=image),
        "no image": _sample("no image", (turn(),)),
        "lost": _sample("lost", (turn(),), path=tmp_path / "lost.png"),
        "broken": DataError("record 12: found nothing"),
    }
    findings = Findings()
    result = check_items(_Listed(list(samples.values())), findings, sample=None, num_shown=9, progress=False)
    found = {(f.kind, Path(f.subject).name) for f in findings.all()}
    assert found == {
        (FindingKind.EMPTY_MASK, "empty"),
        (FindingKind.MASK_SIZE, "size"),
        (FindingKind.ITEM, "places"),
        (FindingKind.ITEM, "question"),
        (FindingKind.EMPTY_TEXT, "silent"),
        (FindingKind.ITEM, "no turn"),
        (FindingKind.ITEM, "unnamed"),
        (FindingKind.ITEM, "twice"),
        (FindingKind.ITEM, "no image"),
        (FindingKind.MISSING_IMAGE, "lost.png"),
        (FindingKind.ITEM, "listed item 12"),
    }
    assert [sample.sample_id for sample in result.shown] == ["good", "no target"]
    assert (result.images, result.empty_masks) == (SoundFraction(checked=11, sound=10), 1)


def test_a_sample_of_items_is_synthetic_without_repeats_and_all_of_a_small_source():
    chosen = chosen_items(1000, 50, 0)
    assert len(set(chosen)) == 50 and chosen == sorted(chosen) == chosen_items(1000, 50, 0)
    assert chosen_items(3, 50, 0) == chosen_items(3, None, 0) == [0, 1, 2]


def test_masks_of_unknown_image_size_are_compared_with_nothing():
    findings = Findings()
    turn = Turn(question="a", answer="[SEG]", masks=(np.ones((2, 2), bool),))
    assert check_sample(_sample("x", (turn,), path=Path("a"), image_hw=None), ItemCheck(), findings)


@pytest.mark.parametrize(
    ("segmentation", "kinds"),
    [
        (SQUARE, []),
        ([[0, 0, 5.9, 0, 5.9, 4.9, 0, 4.9]], []),
        ([[-1.5, 0, 3, 0, 3, 3]], [FindingKind.OUTSIDE_IMAGE]),
        ([*SQUARE, [0, 0, 9, 0, 3, 3], [0, 0, 3, 0, 3, 7]], [FindingKind.OUTSIDE_IMAGE] * 2),
        ({"size": [5, 4], "counts": "x"}, [FindingKind.MASK_SIZE]),
        ({"counts": "x"}, [FindingKind.MASK_SIZE]),
        ([], [FindingKind.BAD_MASK]),
        (None, [FindingKind.BAD_MASK]),
        ([[0, 0, float("nan"), 0, 3, 3]], [FindingKind.BAD_MASK]),
    ],
)
def test_segmentations_are_judged_without_decoding(segmentation, kinds):
    assert [kind for kind, _ in segmentation_problems(segmentation, (4, 5))] == kinds


def test_real_polygons_are_within_their_images():
    file = shared_data("tiny_coco") / "tiny_coco" / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    found = [segmentation_problems(row["segmentation"], sizes[row["image_id"]]) for row in content["annotations"]]
    assert len(found) == 382 and not any(found)


def test_published_splits_add_up_and_name_their_origin():
    known = json.loads(KNOWN_FILE.read_text())
    totals = {"refcoco(unc)": (50000, 142210), "refcoco+(unc)": (49856, 141564), "refcocog(umd)": (49822, 95010)}
    for name, total in totals.items():
        splits = known["refer"][name].values()
        assert (sum(s["refs"] for s in splits), sum(s["sentences"] for s in splits)) == total
    assert sum(split["sentences"] for split in known["refer"]["grefcoco(unc)"].values()) == 259859
    assert all(split["origin"] for splits in known["refer"].values() for split in splits.values())
    assert known_split("grefs", "unc", "val") == known_split("grefcoco", "unc", "val")
    assert known_split("toy", "unc", "val") is None
    assert expected_images(Path("data/lisa_reasoning/val"))[0] == 200


def test_the_readme_has_every_row_of_the_download_table():
    text = (ROOT / "data" / "README.md").read_text()
    assert [entry.folder for entry in DOWNLOADS if entry.table_row() not in text] == []
    names = {name for entry in DOWNLOADS for name in entry.sources.split(",") if name}
    assert names <= {path.stem for path in (CONFIG_FOLDER / "source").glob("*.yaml")}


@pytest.mark.parametrize(
    ("path", "folder"),
    [
        ("/x/data/ref_seg/refcoco+/refs(unc).p", "ref_seg/refcoco+"),
        ("/x/data/ref_seg/grefs/instances.json: no such file", "ref_seg/grefcoco"),
        ("/y/images/mscoco/images/train2014", "ref_seg/images/train2014"),
        ("data/coco/annotations/panoptic_train2017.json", "coco"),
        ("data/refshapes/refshapes", "refshapes"),
        ("data/refshapes/muse/MUSE_train.json", "refshapes"),
        ("data/llava_data/LLaVA-Instruct-150K/llava_v1_5_mix665k.json", "llava_data"),
        ("data/llava_data/LLaVA-Pretrain/images", "llava_data/LLaVA-Pretrain"),
        ("/z/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "llava_data/LLaVA-Pretrain"),
    ],
)
def test_a_path_leads_to_its_dataset(path, folder):
    assert [entry.folder for entry in downloads_of(path)] == [folder]
    assert advice_for(path)[0].startswith(f"data/{folder}: ")


def test_every_synthetic_file_belongs_to_the_row_that_lists_it(data_root):
    (row,) = (entry for entry in DOWNLOADS if entry.is_synthetic)
    named = {name.partition("/")[0] for name in row.holds.split(", ")}
    assert {path.name for path in (data_root / row.folder).iterdir() if path.is_dir()} == named
    files = [path for path in (data_root / row.folder).rglob("*") if path.is_file()]
    assert [path for path in files if downloads_of(f"data/{path.relative_to(data_root)}") != [row]] == []


def test_a_path_of_no_dataset_leads_nowhere():
    assert advice_for("/x/mycoco/file.json") == ()


def test_files_are_measured_and_unexpected_sizes_reported(tmp_path):
    path = tmp_path / "osprey_short_form.json"
    path.write_text("[]")
    findings = Findings()
    fact = file_fact(path, findings)
    assert (fact.num_bytes, fact.sha256[:8]) == (2, "4f53cda1")
    assert [(f.kind, f.is_trouble) for f in findings.all()] == [(FindingKind.FILE_SIZE, False)]
    assert file_fact(tmp_path / "none.json", findings) is None
    assert findings.subjects(FindingKind.MISSING_FILE) == {str(tmp_path / "none.json")}


def test_one_of_several_folders_is_enough_and_every_missing_path_is_named(tmp_path):
    findings = Findings()
    assert check_source_paths({"_target_": "a/b", "dirs": ["/no/where", str(tmp_path)], "style": "short"}, findings)
    assert findings.all() == ()
    assert not check_source_paths({"file": "/no/a.json", "dirs": ["/no/b", "/no/c"], "root": str(tmp_path)}, findings)
    assert findings.subjects(FindingKind.MISSING_FILE) == {"/no/a.json", "/no/b, /no/c"}


def test_the_files_that_a_source_references_are_found(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("[]")
    source = _Listed([])
    source.inner, source.image = ItemCheck(), tmp_path / "a.jpg"
    source.inner.where = file
    assert annotation_files(source) == [file]


def test_lengths_and_fractions_are_summarised():
    assert (str(Lengths.of([3, 9, 4])), Lengths.of([])) == ("3/4/9", None)
    assert (str(SoundFraction()), str(SoundFraction(checked=3, sound=2))) == ("-", "2/3")
