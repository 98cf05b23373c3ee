"""The model card reports the records of the run and the evaluation of these weights, and is uploaded with them."""

import json
from dataclasses import asdict

import pytest
from huggingface_hub.errors import HfHubHTTPError
from running import load_tool

from pixel_sail import Predictor
from pixel_sail import predictor as predictor_module
from pixel_sail.config import TrainConfig, load_config
from pixel_sail.evaluation.results import append_row
from pixel_sail.files import sha256
from pixel_sail.model_card import MADE_BY
from pixel_sail.provenance import STARTS, machine, packages

SCORES = {"ciou": 0.8123, "paper_ciou": 0.8111, "count": 7, "missing": 0}


@pytest.fixture
def run(tmp_path, tiny_model, processor):
    """Return the folder of a finished run, as written by training."""
    config = asdict(
        load_config("train", TrainConfig, ["experiment=quickstart", "name=mine", f"run_dir={tmp_path / 'mine'}"])
    )
    run = tmp_path / "mine"
    tiny_model().save_pretrained(run / "export")
    processor.save_pretrained(run / "export")
    (run / "config.json").write_text(json.dumps(config))
    start = {"time": "2026-01-02T03:04:05+00:00", "step": 0, "command": ["x"], **machine(), "packages": packages()}
    (run / STARTS).write_text(json.dumps(start) + "\n" + json.dumps(start | {"step": 600, "code": "abc1234"}) + "\n")
    return run


def scored(run, name, weights, **changes):
    shared = {"prompt": "short", "precision": "fp32", "code": "def5678", "intervals": {"ciou": [0.80, 0.82]}}
    row = {"eval": name, "scores": SCORES, "weights_sha256": weights, **shared, **changes}
    append_row(run / "evaluation", row)


def make(run, *more):
    return load_tool("publish_model").main([str(run), "--license", "apache-2.0", *more])


def test_the_card_reports_the_records_of_the_run(run, tmp_path):
    weights = sha256(run / "export" / "model.safetensors")
    scored(run, "refshapes_val", weights, limit_images=3)
    scored(run, "refshapes_testA", "0" * 64)
    assert make(run) == 0
    card = (run / "export" / "README.md").read_text()
    front = dict(line.split(": ", 1) for line in card.split("---\n")[1].splitlines())
    assert json.loads(front["license"]) == "apache-2.0" and "arxiv:2504.10465" in json.loads(front["tags"])
    assert "| refshapes_val | 0.812 (0.800-0.820) | 0.811 | 7 | 0 |" in card and "on 3 images only" in card
    # Scores of other weights are not listed.
    assert "testA" not in card
    assert "| refshapes | refer refshapes train | 1 x per epoch |" in card
    assert f"| from step 0 | code {machine()['code']}," in card and "| from step 600 | code abc1234," in card
    assert f"torch {packages()['torch']}" in card
    assert 'PredictConfig(prompt="short")' in card and "## Limits" in card
    # Paths of the machine are not published.
    assert str(tmp_path) not in card and "/home" not in card


def test_the_size_on_the_card_is_that_of_the_weights(run, tiny_model):
    assert make(run) == 0
    count = sum(parameter.numel() for parameter in tiny_model().parameters())
    assert f"{count / 1e6:,.1f} M parameters" in (run / "export" / "README.md").read_text()


def test_unscored_weights_are_called_so_and_a_model_with_a_card_still_loads(run):
    assert make(run) == 0
    assert "These weights were not scored." in (run / "export" / "README.md").read_text()
    assert Predictor.from_pretrained(run).batch.model is not None
    # Written again, with new scores.
    scored(run, "refshapes_val", sha256(run / "export" / "model.safetensors"))
    assert make(run) == 0
    assert "refshapes_val" in (run / "export" / "README.md").read_text()


def test_a_card_written_by_hand_is_left_alone(run, capsys):
    (run / "export" / "README.md").write_text("# mine\n")
    assert make(run) == 2
    assert "was not made by this tool" in capsys.readouterr().err
    assert (run / "export" / "README.md").read_text() == "# mine\n"


def test_a_folder_that_is_no_finished_run_is_rejected(run, tmp_path, capsys):
    (run / "config.json").unlink()
    assert make(run) == 2 and make(tmp_path / "nowhere") == 2
    assert "training finished" in capsys.readouterr().err
    assert not (run / "export" / "README.md").exists()


class Hub:
    """Replaces the hub and records the requests."""

    def __init__(self, refuses=False):
        self.refuses = refuses

    def create_repo(self, name, *, private, exist_ok):
        if self.refuses:
            import httpx

            request = httpx.Request("POST", "https://example.invalid")
            raise HfHubHTTPError("403 forbidden", response=httpx.Response(403, request=request))
        self.created = (name, private, exist_ok)

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        from fnmatch import fnmatch
        from types import SimpleNamespace

        names = sorted(path.name for path in folder_path.iterdir())
        self.uploaded = {name for name in names if any(fnmatch(name, pattern) for pattern in allow_patterns)}
        self.repo = repo_id
        return SimpleNamespace(oid="c0ffee")


def test_only_a_model_and_its_card_are_uploaded(run, monkeypatch, capsys):
    hub = Hub()
    monkeypatch.setattr("pixel_sail.model_card.HfApi", lambda: hub)
    (run / "export" / "notes.log").write_text("private")
    assert make(run, "--push", "me/my-model") == 0
    assert hub.created == ("me/my-model", True, True) and hub.repo == "me/my-model"
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= hub.uploaded
    assert "notes.log" not in hub.uploaded
    card = (run / "export" / "README.md").read_text()
    assert "# my-model\n" in card and 'from_pretrained("me/my-model"' in card and MADE_BY in card
    assert 'Predictor.from_pretrained("me/my-model", revision="c0ffee")' in capsys.readouterr().out
    # The downloaded files are those that a model needs.
    fetched = {}
    monkeypatch.setattr(
        predictor_module, "snapshot_download", lambda name, **given: fetched.update(given) or run / "export"
    )
    Predictor.from_pretrained("me/my-model", revision="c0ffee")
    assert fetched["revision"] == "c0ffee" and set(fetched["allow_patterns"]) >= {"*.json", "*.safetensors"}


def test_an_error_of_the_hub_is_reported(run, monkeypatch, capsys):
    monkeypatch.setattr("pixel_sail.model_card.HfApi", lambda: Hub(refuses=True))
    assert make(run, "--push", "me/my-model") == 2
    said = capsys.readouterr().err
    assert "403" in said and "hf auth login" in said and "Traceback" not in said
