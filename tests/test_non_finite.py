"""A non-finite gradient stops every rank before the update, at every ZeRO stage."""

import json

import pytest
from running import ROOT, launcher, start

STAGES = ("none", "zero0", "zero1", "zero2", "zero3", "zero2-bf16", "zero3-bf16")


@pytest.fixture(scope="module")
def outcomes(data_root, tmp_path_factory):
    """Return the outcome, by rank and stage, of a step with a NaN in a gradient of rank 1."""
    out = tmp_path_factory.mktemp("outcomes")
    done = start([*launcher("torchrun"), str(ROOT / "tests" / "nonfinite_stages.py"), str(out), *STAGES], data_root)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_stops_every_rank_before_the_update(outcomes, stage):
    for rank, by_stage in enumerate(outcomes):
        found = by_stage[stage]
        assert "a gradient is not finite" in found["message"], f"rank {rank}"
        assert found["step"] == 2 and all(found["kept"]) and len(found["kept"]) == 4
    assert "rank 0 is not the cause" in outcomes[0][stage]["message"]
    assert "rank 1 holds it, among its samples ['a', 'b']" in outcomes[1][stage]["message"]
