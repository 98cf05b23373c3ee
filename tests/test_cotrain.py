"""The released 0.5B configuration: two processes take one step on synthetic files of all its sources."""

import re

import pytest
from running import launcher, start
from synthetic_cotrain import TINY, WHOLE_EPOCH, render_and_lay_out, tiny_teachers

from pixel_sail.config import TrainConfig, load_config

CARD = ("experiment=pixel_sail_0_5b", "recipe=released")


def counted(line):
    return {name: int(number) for name, number in re.findall(r"(\w+) (\d+)", line)}


@pytest.mark.slow
def test_a_step_of_the_card_takes_samples_of_every_source_and_leaves_none_out(tmp_path):
    render_and_lay_out(tmp_path / "data")
    run_dir = tmp_path / "run"
    command = [*launcher("torchrun"), "scripts/train.py", *CARD, *TINY, *tiny_teachers(), *WHOLE_EPOCH]
    done = start([*command, f"run_dir={run_dir}", "--dry-run"], tmp_path / "data")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert not run_dir.exists()
    items = counted(re.search(r"^data: items of each source: (.+);", done.stdout, re.M)[1])
    samples = counted(re.search(r"^  samples of each source: (.+)$", done.stdout, re.M)[1])
    sources = load_config("train", TrainConfig, [*CARD, "model.init_from=null"]).data.sources
    assert items.keys() == samples.keys() == sources.keys() and len(sources) == 20
    assert min(items.values()) > 0 and min(samples.values()) > 0, done.stdout
    assert "skipped: " not in done.stdout
    assert re.search(r"^step 1: total [\d.]+, text [\d.]+, bce [\d.]+, dice [\d.]+", done.stdout, re.M)
    assert "distill/mask2former" in done.stdout and "distill/sam2" in done.stdout
