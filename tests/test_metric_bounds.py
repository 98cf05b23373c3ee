"""A metric outside its bounds logs one warning or stops the run, also after a restart."""

import json
import sys

import pytest
from running import start
from test_train import SMALL, log_lines

from pixel_sail.config import ConfigError, LogConfig, MetricBoundConfig, TrainConfig, load_config
from pixel_sail.training.log import RunLog
from pixel_sail.training.metric_bounds import MetricBounds, MetricOutOfBoundsError


def open_log(folder, *, start=0):
    return RunLog(folder, LogConfig(tensorboard=False, progress=False), steps=100, start=start, resolved={})


def bound(action="warn", **changes):
    return MetricBoundConfig(
        **{"metric": "loss/total", "after": 20, "low": 0.5, "high": 2.0, "action": action} | changes
    )


@pytest.mark.parametrize(
    ("value", "is_outside"), [(0.5, False), (2.0, False), (0.49, True), (2.01, True), (float("nan"), True)]
)
def test_the_first_value_at_its_step_or_later_is_judged_once(tmp_path, caplog, value, is_outside):
    with open_log(tmp_path) as log:
        metric_bounds = MetricBounds({"early": bound()}, tmp_path / "log.jsonl", start=0)
        for step, total in ((10, 9.0), (30, value), (40, 9.0)):
            log.scalars(step, {"loss/total": total, "loss/bce": 0.1})
            assert metric_bounds.check(step, log) is None
            assert metric_bounds.check(step, log) is None, "the numbers were judged"
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    notes = [(line["step"], line["metric_bounds"]) for line in lines if "metric_bounds" in line]
    assert [(step, list(found)) for step, found in notes] == ([(30, ["early"])] if is_outside else [])
    assert caplog.text.count("metric_bounds.early: loss/total is") == int(is_outside)
    assert not is_outside or "at step 30, expected 0.5 .. 2" in caplog.text


def test_one_limit_is_enough_and_validation_scores_have_bounds_too(tmp_path):
    with open_log(tmp_path) as log:
        bounds = {"score": bound("stop", metric="refshapes_val/ciou", after=5, low=0.3, high=None)}
        metric_bounds = MetricBounds(bounds, tmp_path / "log.jsonl", start=0)
        log.scalars(5, {"loss/total": 1.0})
        log.scalars(5, {"refshapes_val/ciou": 0.29})
        finding = metric_bounds.check(5, log)
    assert finding is not None and "refshapes_val/ciou is 0.29 at step 5, expected 0.3 .. inf" in finding


def test_a_run_that_goes_on_judges_what_it_has_not_judged(tmp_path):
    with open_log(tmp_path) as log:
        log.scalars(20, {"loss/total": 9.0})
        log.scalars(40, {"loss/total": 9.0})
    file = tmp_path / "log.jsonl"
    with pytest.raises(MetricOutOfBoundsError, match=r"at step 20, .* ended the run"):
        MetricBounds({"early": bound("stop")}, file, start=30)
    MetricBounds({"early": bound("warn")}, file, start=30)
    MetricBounds({"early": bound("stop")}, file, start=10)
    with open_log(tmp_path, start=30) as log:
        metric_bounds = MetricBounds({"early": bound("warn"), "late": bound("stop", after=40)}, file, start=30)
        log.scalars(40, {"loss/total": 9.0})
        assert "metric_bounds.late" in metric_bounds.check(40, log)


def test_a_log_of_an_earlier_version_is_judged_under_todays_keys(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 20, "total": 9.0}\n')
    with pytest.raises(MetricOutOfBoundsError, match="loss/total is 9 at step 20"):
        MetricBounds({"early": bound("stop")}, file, start=30)


def test_an_earlier_name_of_a_metric_is_rejected_with_the_new_one():
    with pytest.raises(ConfigError, match="metric is 'total', which was renamed; write loss/total"):
        bound(metric="total")


def test_a_bound_that_never_met_its_number_is_named(tmp_path, caplog):
    bounds = {"typo": bound(metric="totl"), "later": bound(after=1000)}
    MetricBounds(bounds, tmp_path / "log.jsonl", start=0).finish(100)
    assert "metric_bounds.typo was not checked: no totl was logged" in caplog.text and "later" not in caplog.text


def test_a_run_outside_its_metric_bounds_is_saved_and_ends(data_root, tmp_path):
    bounds = "+metric_bounds={low:{metric:loss/bce,after:2,low:5,action:stop}}"
    command = [sys.executable, "scripts/train.py", *SMALL, f"run_dir={tmp_path}", "deepspeed=none"]
    done = start([*command, bounds], data_root)
    assert done.returncode == 2
    assert "MetricOutOfBoundsError: metric_bounds.low: loss/bce is 0." in done.stderr
    assert "step 2 is saved" in done.stderr
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2, 2]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


@pytest.mark.parametrize(
    "wrong", ["{metric:loss/bce,after:2,low:5,action:halt}", "{metric:loss/bce,after:2}", "{after:2,low:1}"]
)
def test_wrong_bounds_are_rejected(wrong):
    with pytest.raises(ConfigError, match=r"halt|neither low nor high|metric"):
        load_config("train", TrainConfig, ["name=x", f"+metric_bounds={{a:{wrong}}}"])
