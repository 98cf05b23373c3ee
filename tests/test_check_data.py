"""The data check reports every kind of damage, passes clean data, and lists what to download."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running import load_tool
from shared_data import shared_data

from pixel_sail.config import ConfigError
from pixel_sail.evaluation.check_plan import parse_arguments
from pixel_sail.rle import encode_mask


@pytest.fixture
def check(tmp_path, capsys):
    """Return a function from arguments to (exit status, screen, report.json by source)."""

    def run(*arguments):
        out = tmp_path / "report"
        status = load_tool("check_data").main([*arguments, f"out={out}", "progress=false"])
        content = json.loads((out / "report.json").read_text())
        return status, capsys.readouterr().out, {source["name"]: source for source in content["sources"]}

    return run


def _troubles(source):
    return [(f["kind"], f["subject"], f["message"]) for f in source["findings"] if f["is_trouble"]]


def _kinds(source):
    return {kind for kind, _, _ in _troubles(source)}


def test_clean_real_refs_are_sound_and_counted(check, tmp_path):
    root = shared_data("derived_refer_mini")
    status, screen, sources = check(f"root={root}", "dataset=refcocog", "split=val", "sample=all")
    found = sources["refcocog"]
    assert (status, _troubles(found), found["items"]) == (0, [], 4)
    assert (found["images"], found["masks"]["checked"]) == ({"checked": 4, "sound": 4}, 46)
    (split,) = found["splits"]
    assert (split["images"], split["refs"], split["sentences"], split["known_sentences"]) == (4, 4, 4, 9536)
    assert [note["kind"] for note in found["findings"]] == ["known count"]
    assert [Path(fact["path"]).name for fact in found["files"]] == ["refs(google).p", "instances.json"]
    assert "1 source checked: sound, 1 note" in screen
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("data:image/jpeg") == 4 and "the yellow plane with a pink stripe" in page


def test_clean_real_grefs_are_sound(check):
    status, _, sources = check(f"root={shared_data('derived_gref_mini')}", "dataset=grefcoco", "sheet=1")
    (split,) = sources["grefcoco/val"]["splits"]
    assert (status, split["refs"], split["refs_without_target"]) == (0, 27, 5)


def test_missing_images_are_named_with_what_to_download(check):
    status, screen, sources = check(f"root={shared_data('derived_refer_mini_nophotos')}", "dataset=refcocog")
    assert status == 1
    assert {source["splits"][0]["split"] for source in sources.values() if source["splits"]} == {"train"}
    assert all(_kinds(source) == {"missing file"} for source in sources.values())
    assert "data/ref_seg/images/train2014: the images of COCO train2014" in screen


def _damaged_copy(source, target):
    """Copy four real refs and damage each file or record in a different way."""
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    for folder in (target, *target.rglob("*")):
        folder.chmod(0o755)
    refs_file, instances_file = target / "refcocog" / "refs(google).p", target / "refcocog" / "instances.json"
    refs, instances = pickle.loads(refs_file.read_bytes()), json.loads(instances_file.read_text())
    images = target / "images" / "mscoco" / "images" / "train2014"
    (images / "COCO_train2014_000000099598.jpg").unlink()
    truncated = images / "COCO_train2014_000000573854.jpg"
    truncated.write_bytes(truncated.read_bytes()[:60_000])
    rows = {row["id"]: row for row in instances["annotations"]}
    rows[161542]["segmentation"] = encode_mask(np.ones((640, 639), dtype=bool))
    rows[247144]["segmentation"] = [[x + 5000 for x in rows[247144]["segmentation"][0]]]
    refs[3]["ref_id"] = refs[0]["ref_id"]
    refs[1]["sentences"] = []
    refs_file.write_bytes(pickle.dumps(refs, protocol=2))
    instances_file.write_text(json.dumps(instances))
    return target


DAMAGES = {
    "missing image": "COCO_train2014_000000099598.jpg",
    "unreadable image": "COCO_train2014_000000573854.jpg",
    "mask size": "id 161542",
    "duplicate ref_id": "refs[3], ref_id 0",
    "sentence missing": "refs[1], ref_id 1",
    "polygon outside image": "id 247144",
}


@pytest.mark.parametrize("sample", ["1", "all"])
def test_every_damage_of_a_copy_is_named_and_none_hides_another(check, tmp_path, sample):
    root = _damaged_copy(shared_data("derived_refer_mini"), tmp_path / "damaged")
    status, screen, sources = check(f"root={root}", "dataset=refcocog", "split=val", f"sample={sample}")
    troubles = _troubles(sources["refcocog"])
    # Which images are decoded depends on the sample; everything else is always checked.
    expected = DAMAGES if sample == "all" else {k: v for k, v in DAMAGES.items() if k != "unreadable image"}
    for kind, subject in expected.items():
        assert [found for found in troubles if found[0] == kind and subject in found[1]], (kind, troubles)
        assert f"TROUBLE: {kind}" in screen and subject in screen
    assert status == 1


def test_synthetic_data_is_sound_for_every_source_of_a_run(check, data_root, monkeypatch):
    monkeypatch.setenv("PIXEL_SAIL_DATA", str(data_root))
    status, _, sources = check("experiment=quickstart", "sample=5", "sheet=1")
    assert (status, sorted(sources)) == (0, ["groupshapes", "refshapes"])
    by_split = {split["split"]: split for split in sources["refshapes"]["splits"]}
    assert (by_split["train"]["images"], by_split["val"]["images"]) == (10, 3)
    assert all(not source["findings"] for source in sources.values())


def test_notes_fail_only_a_strict_check(check):
    arguments = (f"root={shared_data('derived_gref_mini')}", "dataset=grefcoco", "sample=1", "sheet=0")
    assert [check(*arguments, *strict)[0] for strict in ([], ["strict=true"])] == [0, 1]


def test_absent_data_is_named_with_what_to_download_and_synthetic_data_is_skipped(check, tmp_path, monkeypatch):
    monkeypatch.setenv("PIXEL_SAIL_DATA", str(tmp_path / "nothing"))
    for name in ("REFER", "GREF"):
        monkeypatch.setenv(f"PIXEL_SAIL_{name}_MINI", str(tmp_path / "neither"))
    status, screen, sources = check("sheet=0")
    assert status == 1
    assert {"refcoco", "refcocog", "grefcoco"} <= set(sources) and "refshapes" not in sources
    assert all(source["troubles"] > 0 for source in sources.values())
    assert "data/ref_seg/refcoco+: refs(unc).p, instances.json. From github.com/lichengunc/refer" in screen
    assert "left out" in screen and "refshapes" in screen


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["source=nothing"], "names of configs/source"),
        (["source=refcoco", "root=a"], "expected one of them"),
        (["root=a"], "root=DIR dataset=NAME"),
        (["source=refcoco", "sample=many"], "expected a number or all"),
        (["source=refcoco", "sample=0"], "at least 1"),
        (["source=refcoco", "strict=yes"], "true or false"),
        (["refcoco"], "key=value"),
        (["data=nothing"], "nothing"),
    ],
)
def test_wrong_command_lines_are_rejected(arguments, reason):
    with pytest.raises(ConfigError, match=reason):
        parse_arguments(arguments)
    assert load_tool("check_data").main(arguments) == 2


def test_overrides_reach_the_chosen_sources():
    plan, settings = parse_arguments(["source=refcoco,refshapes", "data.sources.refcoco.root=elsewhere", "sample=all"])
    assert (sorted(plan.sources), plan.sources["refcoco"]["root"]) == (["refcoco", "refshapes"], "elsewhere")
    assert settings.sample is None


def _write_folder(root, refs, images, annotations):
    (root / "toy").mkdir(parents=True)
    (root / "images" / "train2014").mkdir(parents=True)
    (root / "toy" / "refs(unc).p").write_bytes(pickle.dumps(refs))
    (root / "toy" / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    for image in images:
        if isinstance(image.get("file_name"), str):
            Image.new("RGB", (5, 4)).save(root / "images" / "train2014" / image["file_name"])
    return root


def _ref(ref_id, image_id, ann_id, split="val"):
    return {"ref_id": ref_id, "image_id": image_id, "ann_id": ann_id, "split": split,
            "sentences": [{"sent_id": ref_id, "sent": "it", "raw": "It"}]}  # fmt: skip


SQUARE = [[0, 0, 3, 0, 3, 3, 0, 3]]


def test_everything_wrong_in_instances_is_named(check, tmp_path):
    images = [
        {"id": 1, "file_name": "1.png", "height": 4, "width": 5},
        {"id": 1, "file_name": "1.png", "height": 4, "width": 5},
        {"id": 2, "file_name": 3, "height": 4, "width": 5},
        {"id": 3, "file_name": "3.png", "height": 0, "width": 5},
        {"id": 4, "file_name": "4.png", "height": 5, "width": 4},
        {"id": "5"},
    ]
    annotations = [
        {"id": 10, "image_id": 1, "segmentation": SQUARE},
        {"id": 10, "image_id": 1, "segmentation": SQUARE},
        {"id": 11, "image_id": 9, "segmentation": SQUARE},
        {"id": 12, "image_id": 1, "segmentation": [[1, 2, 3]]},
        {"id": 13, "image_id": 1, "segmentation": {"size": [4, 5], "counts": "zzz"}},
        {"id": 14, "image_id": 1, "segmentation": {"size": [4, 5], "counts": [20]}},
        {"id": 15, "image_id": 4, "segmentation": SQUARE},
        {"id": None},
    ]
    refs = [
        _ref(i, *pair)
        for i, pair in enumerate([(1, 10), (1, 11), (1, 12), (1, 13), (1, 14), (4, 15), (9, 10), (1, 99)])
    ]
    refs += [_ref(50, 1, 10, "train")]
    status, _, sources = check(f"root={_write_folder(tmp_path / 'root', refs, images, annotations)}", "dataset=toy")
    troubles = _troubles(sources["toy/train"])
    expected = {
        ("duplicate image id", "images[1], id 1"),
        ("image record", "images[2], id 2"),
        ("image record", "images[3], id 3"),
        ("image record", "images[5]"),
        ("duplicate annotation id", "annotations[1], id 10"),
        ("annotation record", "annotations[7]"),
        ("unknown id", "annotations[2], id 11"),
        ("undecodable mask", "annotations[3], id 12"),
        ("undecodable mask", "annotations[4], id 13"),
        ("empty mask", "annotations[5], id 14"),
        ("image size", "4.png"),
        ("unknown id", "refs[1], ref_id 1"),
        ("unknown id", "refs[6], ref_id 6"),
        ("unknown id", "refs[7], ref_id 7"),
        ("contamination", "refs(unc).p"),
    }
    missed = {pair for pair in expected if not any(k == pair[0] and s.endswith(pair[1]) for k, s, _ in troubles)}
    assert (status, missed) == (1, set())


def test_training_images_of_an_evaluation_split_are_reported(check, tmp_path, monkeypatch):
    root = tmp_path / "data" / "ref_seg"
    images = [{"id": i, "file_name": f"COCO_train2014_{i:012d}.jpg", "height": 4, "width": 5} for i in (1, 2)]
    annotations = [{"id": 10 + i, "image_id": i, "segmentation": SQUARE} for i in (1, 2)]
    _write_folder(root, [_ref(1, 1, 11, "train"), _ref(2, 2, 12, "val")], images, annotations)
    (root / "toy").rename(root / "refcoco")
    shutil.copytree(root / "refcoco", root / "refcoco+")
    (root / "refcoco+" / "refs(unc).p").write_bytes(pickle.dumps([_ref(1, 2, 12, "train"), _ref(2, 1, 11, "val")]))
    monkeypatch.setenv("PIXEL_SAIL_DATA", str(tmp_path / "data"))
    status, _, sources = check("source=refcoco", "sheet=0")
    messages = [f["message"] for f in sources["refcoco"]["findings"] if f["kind"] == "contamination"]
    assert status == 0
    assert [m.split(";")[0] for m in messages] == [
        "found 1 of 1 images also in the evaluation split refcoco+(unc) val, which has 1"
    ]


def _evals(folder, file):
    return (
        "evals=[perbench_visual_referring,refshapes_val]",
        f"paths.data={folder.parent}",
        f"evals.perbench_visual_referring.annotations={file}",
        f"evals.perbench_visual_referring.image_dir={folder / 'images/train2014'}",
    )


def test_a_check_of_evals_counts_perbench_records_with_a_tag_in_both_texts(check, tmp_path, data_root):
    folder = data_root / "refshapes"
    records = json.loads((folder / "perbench" / "STBench_VRES.json").read_text())
    records[0]["answer"] = "It is not <obj0>, it is <obj1>."
    file = tmp_path / "STBench_VRES.json"
    file.write_text(json.dumps(records))
    status, screen, sources = check(*_evals(folder, file))
    found = sources["perbench_visual_referring"]
    assert (status, _troubles(found), found["items"]) == (0, [], len(records))
    assert found["images"]["checked"] == found["images"]["sound"] == len({record["image_name"] for record in records})
    assert [fact["path"] for fact in found["files"]] == [str(file)]
    (note,) = found["findings"]
    assert note["message"].startswith(f"{file}: 1 of {len(records)} records name a tag in question and answer")
    assert "1 of" in screen and sources["refshapes_val"]["findings"] == []


def test_a_check_of_evals_names_absent_images_and_files_that_cannot_be_read(check, tmp_path, data_root):
    folder = data_root / "refshapes"
    file = tmp_path / "STBench_VRES.json"
    file.write_text("[{}]")
    status, _, sources = check(*_evals(folder, file), f"+evals.refshapes_val.image_dir={tmp_path}")
    assert status == 1
    assert _kinds(sources["perbench_visual_referring"]) == {"source"}
    assert _kinds(sources["refshapes_val"]) == {"missing image"}
    absent = file.with_name("nothing.json")
    status, _, sources = check(*_evals(folder, absent))
    assert (status, _kinds(sources["perbench_visual_referring"])) == (1, {"missing file"})
    assert _kinds(sources["refshapes_val"]) == set()


def test_a_check_of_no_eval_is_rejected():
    with pytest.raises(ConfigError, match="evals is empty"):
        parse_arguments(["evals=[]"])
