"""The quickstart's report: every split with its chance level; runs of other versions are rejected."""

import importlib.util
import json
import shutil

import pytest
from running import ROOT

from pixel_sail.config import EvalConfig, TrainConfig, load_config
from pixel_sail.evaluation.run import run_evals
from pixel_sail.refshapes.baselines import GUESSES
from pixel_sail.refshapes.formats import KIND_SPLITS
from pixel_sail.types import DataError


@pytest.fixture(scope="module")
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "scripts" / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run_dir(quickstart, data_root, tiny_model, processor, tmp_path_factory):
    """The folder of a run with a random model, whose stages are finished."""
    folder = tmp_path_factory.mktemp("run")
    tiny_model().save_pretrained(folder / "export")
    processor.save_pretrained(folder / "export")
    (folder / "config.json").write_text(json.dumps({"optim": {"steps": 2}, "data": {"global_batch_size": 16}}))
    (folder / "log.jsonl").write_text("".join(json.dumps({"step": n, "total": 3.0 - n}) + "\n" for n in (1, 2)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIXEL_SAIL_DATA", str(data_root))
        options = [f"checkpoint={folder}", f"evals=[{','.join(quickstart.EVALS)}]", "predict.answer=forced"]
        options += ["progress=false", "examples=0", "resamples=0", "predict.prompt=short"]
        run_evals(load_config("evaluate", EvalConfig, options))
        timing = quickstart.StageTimes(folder / "timing.json")
        timing.add("train", 10.0)
        timing.add("evaluate", 2.5)
        config = load_config("train", TrainConfig, ["experiment=quickstart", f"run_dir={folder}"])
        quickstart.report(config, data_root / "refshapes", folder, timing)
    return folder


def test_every_split_is_reported_with_its_chance_level(run_dir, data_root):
    metrics = json.loads((run_dir / "metrics.json").read_text())
    meta = json.loads((data_root / "refshapes" / "meta.json").read_text())
    splits = ["val", *KIND_SPLITS, "testA", "testB"]
    assert list(metrics["splits"]) == list(metrics["guesses"]) == splits
    assert {split: row["count"] for split, row in metrics["splits"].items()} == {
        split: meta["num_sentences"][split] for split in splits
    }
    assert metrics["guesses"] == {split: meta["blind_scores"][split] for split in splits}
    assert metrics["blind"].keys() == {"language-blind", "image-blind"} and metrics["seconds"] == 12.5
    lines = (run_dir / "report.md").read_text().splitlines()
    head = lines.index("| | count | ciou | giou | " + " | ".join(GUESSES) + " |")
    for line, split in zip(lines[head + 2 :], splits, strict=False):
        own, every = metrics["splits"][split], metrics["guesses"][split]["every object"]
        start = f"| {split} | {own['count']} | {own['ciou']:.3f} | {own['giou']:.3f} | "
        assert line.startswith(start + f"{every['ciou']:.3f} / {every['giou']:.3f} | ")


def test_images_of_every_kind_are_shown(run_dir):
    text = (run_dir / "report.md").read_text()
    for split in (*KIND_SPLITS, "testA", "testB"):
        assert f"## Examples from {split}: " in text and (run_dir / "examples" / f"{split}_05.png").is_file()


def test_a_run_of_an_earlier_version_is_rejected(quickstart, run_dir, tmp_path):
    shutil.copytree(run_dir / "evaluation", tmp_path / "evaluation")
    rows = (tmp_path / "evaluation" / "results.jsonl").read_text().splitlines()
    kept = [row for row in rows if json.loads(row)["eval"] != "refshapes_val_shape"]
    (tmp_path / "evaluation" / "results.jsonl").write_text("\n".join(kept) + "\n")
    with pytest.raises(DataError, match=r"no scores of refshapes_val_shape, expected 11 evals.*Move its folder away"):
        quickstart.read_scores(tmp_path)
