"""Numbers outside their band warn once or end the run, also when it is started again."""

import json
import sys

import pytest
from running import start
from test_train import SMALL, log_lines

from pixel_sail.config import BandConfig, ConfigError, LogConfig, TrainConfig, load_config
from pixel_sail.training.corridor import Corridor, LeftCorridorError
from pixel_sail.training.log import RunLog


def open_log(folder, *, start=0):
    return RunLog(folder, LogConfig(tensorboard=False, progress=False), steps=100, start=start, resolved={})


def band(action="warn", **changes):
    return BandConfig(**{"metric": "total", "after": 20, "low": 0.5, "high": 2.0, "action": action} | changes)


@pytest.mark.parametrize(
    ("value", "is_outside"), [(0.5, False), (2.0, False), (0.49, True), (2.01, True), (float("nan"), True)]
)
def test_the_first_value_at_its_step_or_later_is_judged_once(tmp_path, caplog, value, is_outside):
    with open_log(tmp_path) as log:
        corridor = Corridor({"early": band()}, tmp_path / "log.jsonl", start=0)
        for step, total in ((10, 9.0), (30, value), (40, 9.0)):
            log.scalars(step, {"total": total, "bce": 0.1})
            assert corridor.judge(step, log) is None
            assert corridor.judge(step, log) is None, "the numbers were judged"
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    notes = [(line["step"], line["corridor"]) for line in lines if "corridor" in line]
    assert [(step, list(found)) for step, found in notes] == ([(30, ["early"])] if is_outside else [])
    assert caplog.text.count("corridor.early: total is") == int(is_outside)
    assert not is_outside or "at step 30, expected 0.5 .. 2" in caplog.text


def test_one_limit_is_enough_and_validation_scores_have_bands_too(tmp_path):
    with open_log(tmp_path) as log:
        bands = {"score": band("stop", metric="refshapes_val/ciou", after=5, low=0.3, high=None)}
        corridor = Corridor(bands, tmp_path / "log.jsonl", start=0)
        log.scalars(5, {"total": 1.0})
        log.scalars(5, {"refshapes_val/ciou": 0.29})
        finding = corridor.judge(5, log)
    assert finding is not None and "refshapes_val/ciou is 0.29 at step 5, expected 0.3 .. inf" in finding


def test_a_run_that_goes_on_judges_what_it_has_not_judged(tmp_path):
    with open_log(tmp_path) as log:
        log.scalars(20, {"total": 9.0})
        log.scalars(40, {"total": 9.0})
    file = tmp_path / "log.jsonl"
    with pytest.raises(LeftCorridorError, match=r"at step 20, .* ended the run before"):
        Corridor({"early": band("stop")}, file, start=30)
    Corridor({"early": band("warn")}, file, start=30)
    Corridor({"early": band("stop")}, file, start=10)
    with open_log(tmp_path, start=30) as log:
        corridor = Corridor({"early": band("warn"), "late": band("stop", after=40)}, file, start=30)
        log.scalars(40, {"total": 9.0})
        assert "corridor.late" in corridor.judge(40, log)


def test_a_band_that_never_met_its_number_is_named(tmp_path, caplog):
    bands = {"typo": band(metric="totl"), "later": band(after=1000)}
    Corridor(bands, tmp_path / "log.jsonl", start=0).finish(100)
    assert "corridor.typo was not judged: no totl was logged" in caplog.text and "later" not in caplog.text


def test_a_run_outside_its_corridor_is_saved_and_ends(data_root, tmp_path):
    bands = "+corridor={low:{metric:bce,after:2,low:5,action:stop}}"
    command = [sys.executable, "scripts/train.py", *SMALL, f"run_dir={tmp_path}", "deepspeed=none"]
    done = start([*command, bands], data_root)
    assert done.returncode == 2
    assert "LeftCorridorError: corridor.low: bce is 0." in done.stderr and "step 2 is saved" in done.stderr
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2, 2]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


@pytest.mark.parametrize("wrong", ["{metric:bce,after:2,low:5,action:halt}", "{metric:bce,after:2}", "{after:2,low:1}"])
def test_wrong_bands_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"halt|neither low nor high|metric"):
        load_config("train", TrainConfig, ["name=x", f"+corridor={{a:{wrong}}}"])
