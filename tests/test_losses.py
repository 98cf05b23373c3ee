"""Mask and text losses against reference implementations; sums do not depend on how a batch is split."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pixel_sail.losses.mask import (
    ImageMasks,
    PointSampling,
    bce_means,
    dice_losses,
    full_map_losses,
    losses_at_points,
    point_losses,
    sample_map,
    sample_points,
)
from pixel_sail.losses.text import text_losses
from pixel_sail.losses.total import Counts, LossConfig, combine, count, loss_sums, text_weights
from pixel_sail.types import DataError

SAMPLING = PointSampling(num_points=16, oversample_ratio=3.0, importance_ratio=0.75)
CONFIG = LossConfig(points=SAMPLING)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _bilinear(cells, x, y):
    """Return one map read at (x, y) in [0, 1], where cell centers are at (i + 0.5) / n and outside is 0."""
    rows, columns = len(cells), len(cells[0])
    row, column = y * rows - 0.5, x * columns - 0.5
    total = 0.0
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < rows and 0 <= j < columns:
                total += (1 - abs(row - i)) * (1 - abs(column - j)) * cells[i][j]
    return total


def _slow_losses(logits_NQ, targets_NQ):
    """Return the sums of both losses over masks, point by point."""
    bce = dice = 0.0
    for logits, targets in zip(logits_NQ, targets_NQ, strict=True):
        probabilities = [1.0 / (1.0 + math.exp(-value)) for value in logits]
        costs = [-t * math.log(p) - (1 - t) * math.log(1 - p) for p, t in zip(probabilities, targets, strict=True)]
        bce += sum(costs) / len(costs)
        overlap = sum(p * t for p, t in zip(probabilities, targets, strict=True))
        dice += 1.0 - (2.0 * overlap + 1.0) / (sum(probabilities) + sum(targets) + 1.0)
    return bce, dice


def test_maps_are_read_bilinearly_between_cell_centres():
    maps, points = torch.randn(2, 3, 5), torch.rand(2, 40, 2)
    points[:, :4] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.1, 0.5], [0.999, 0.001]])
    found = sample_map(maps, points)
    for n in range(2):
        expected = [_bilinear(maps[n].tolist(), x, y) for x, y in points[n].tolist()]
        assert found[n].tolist() == pytest.approx(expected, abs=1e-5)


def test_a_point_means_the_same_place_in_maps_of_different_size():
    coarse = torch.zeros(1, 4, 6)
    coarse[0, 1, 4] = 1.0
    fine = coarse.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    centre = torch.tensor([[[4.5 / 6, 1.5 / 4]]])
    assert sample_map(coarse, centre).item() == pytest.approx(1.0)
    assert sample_map(fine, centre).item() == pytest.approx(1.0)


def test_point_losses_equal_a_loop_over_masks_and_points():
    logits, masks = 3.0 * torch.randn(3, 4, 6), torch.rand(3, 20, 31) < 0.4
    sums = point_losses(logits, masks, SAMPLING, _generator(5))
    points = sample_points(logits, SAMPLING, _generator(5)).tolist()
    read = [[_bilinear(logits[n].tolist(), x, y) for x, y in points[n]] for n in range(3)]
    true = [[_bilinear(masks[n].float().tolist(), x, y) for x, y in points[n]] for n in range(3)]
    bce, dice = _slow_losses(read, true)
    assert sums.bce.item() == pytest.approx(bce, rel=1e-4)
    assert sums.dice.item() == pytest.approx(dice, rel=1e-4)
    assert sums.count == 3


def test_most_points_are_the_most_uncertain_candidates_and_the_rest_are_fresh():
    logits = 3.0 * torch.randn(2, 5, 5)
    points = sample_points(logits, SAMPLING, _generator(1))
    generator = _generator(1)
    candidates, fresh = torch.rand(2, 48, 2, generator=generator), torch.rand(2, 4, 2, generator=generator)
    assert points.shape == (2, 16, 2)
    assert torch.equal(points[:, 12:], fresh)
    for n in range(2):
        ranked = sorted(candidates[n].tolist(), key=lambda point: abs(_bilinear(logits[n].tolist(), *point)))
        assert sorted(points[n, :12].tolist()) == sorted(ranked[:12])


def test_points_depend_on_the_seed_alone():
    logits, masks = torch.randn(2, 5, 5), torch.rand(2, 9, 9) < 0.5
    torch.manual_seed(1)
    first = point_losses(logits, masks, SAMPLING, _generator(7)).bce
    torch.manual_seed(2)
    assert torch.equal(point_losses(logits, masks, SAMPLING, _generator(7)).bce, first)
    assert not torch.equal(point_losses(logits, masks, SAMPLING, _generator(8)).bce, first)


def test_choosing_points_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    sample_points(torch.randn(1, 4, 4, generator=_generator()), SAMPLING, _generator())
    assert torch.equal(torch.get_rng_state(), before)


def test_full_map_losses_equal_a_loop_and_pytorch():
    logits, masks = 2.0 * torch.randn(3, 4, 6), torch.rand(3, 4, 6) < 0.4
    sums = full_map_losses(logits, masks)
    bce, dice = _slow_losses(logits.flatten(1).tolist(), masks.flatten(1).float().tolist())
    assert sums.bce.item() == pytest.approx(bce, rel=1e-4)
    assert sums.dice.item() == pytest.approx(dice, rel=1e-4)
    assert sums.bce.item() / 3 == pytest.approx(F.binary_cross_entropy_with_logits(logits, masks.float()).item())


def test_full_map_losses_reject_maps_of_different_size():
    with pytest.raises(ValueError, match=r"logits \(1, 4, 4\), masks \(1, 8, 8\)"):
        full_map_losses(torch.zeros(1, 4, 4), torch.zeros(1, 8, 8))


def test_uniform_points_cover_a_map_evenly():
    mask = torch.zeros(1, 6, 6)
    mask[0, 2:4, 2:4] = 1.0
    uniform = PointSampling(num_points=40_000, oversample_ratio=1.0, importance_ratio=0.0)
    points = sample_points(torch.randn(1, 6, 6), uniform, _generator())
    assert points.mean((0, 1)).tolist() == pytest.approx([0.5, 0.5], abs=0.01)
    assert sample_map(mask, points).mean().item() == pytest.approx(4 / 36, abs=0.005)


def test_an_empty_prediction_of_an_empty_mask_costs_nothing():
    sums = full_map_losses(torch.full((2, 4, 4), -60.0), torch.zeros(2, 4, 4))
    assert sums.dice.item() == pytest.approx(0.0, abs=1e-6)
    assert sums.bce.item() == pytest.approx(0.0, abs=1e-6)


def test_a_full_prediction_of_an_empty_mask_costs_the_whole_dice():
    sums = full_map_losses(torch.full((1, 4, 4), 60.0), torch.zeros(1, 4, 4))
    assert sums.dice.item() == pytest.approx(1.0 - 1.0 / 17.0)


def test_a_perfect_prediction_costs_nothing():
    masks = torch.rand(2, 8, 8) < 0.5
    sums = full_map_losses(120.0 * masks - 60.0, masks)
    assert sums.dice.item() == pytest.approx(0.0, abs=1e-6)
    assert sums.bce.item() == pytest.approx(0.0, abs=1e-6)


def test_losses_of_a_mask_do_not_depend_on_the_others():
    logits, targets = torch.randn(5, 30), (torch.rand(5, 30) < 0.5).float()
    for loss in (bce_means, dice_losses):
        parts = torch.cat((loss(logits[:2], targets[:2]), loss(logits[2:], targets[2:])))
        torch.testing.assert_close(loss(logits, targets), parts)


def test_losses_of_half_precision_logits_are_computed_in_float32():
    logits, masks = torch.randn(1, 4, 4).bfloat16(), torch.ones(1, 4, 4, dtype=torch.bool)
    sums = point_losses(logits, masks, SAMPLING, _generator())
    assert (sums.bce.dtype, sums.dice.dtype) == (torch.float32, torch.float32)
    assert torch.equal(sums.bce, point_losses(logits.float(), masks, SAMPLING, _generator()).bce)


def test_text_losses_equal_a_loop_over_tokens():
    logits, targets = torch.randn(4, 7), torch.tensor([1, 0, 6, 3])
    rows = [[math.exp(value) for value in row] for row in logits.tolist()]
    costs = [-math.log(row[t] / sum(row)) for row, t in zip(rows, targets.tolist(), strict=True)]
    assert text_losses(logits, targets).tolist() == pytest.approx(costs, rel=1e-5)


def test_no_token_costs_nothing_and_still_has_a_gradient():
    logits = torch.zeros(0, 7, requires_grad=True)
    total = text_losses(logits * 1.0, torch.zeros(0, dtype=torch.long)).sum()
    total.backward()
    assert total.item() == 0.0
    assert logits.grad is not None


@pytest.fixture
def examples(processor, make_sample):
    """One sample with two masks, one with one mask, one with an image only, one with text only."""
    rng = np.random.default_rng(2)
    sampled = [
        make_sample(rng, size_hw=(16, 24), masks_per_turn=(2,), sample_id="two"),
        make_sample(rng, size_hw=(9, 9), masks_per_turn=(1, 0), sample_id="one"),
        make_sample(rng, size_hw=(16, 8), masks_per_turn=(0,), sample_id="image only"),
        make_sample(rng, size_hw=None, masks_per_turn=(0,), sample_id="text only"),
    ]
    encoded = [processor.encode_sample(sample, image, independent_turns=False) for sample, image in sampled]
    return [replace(example, point_seed=50 + index) for index, example in enumerate(encoded)]


def _total(model, batches, config):
    """Return the loss of batches with shared counts, as in the training step."""
    counts = [count(batch) for batch in batches]
    whole = Counts(
        tokens=sum(c.tokens for c in counts), masks=sum(c.masks for c in counts), samples=sum(c.samples for c in counts)
    )
    return sum(combine(loss_sums(model(**b.model_inputs()), b, config), whole, config) for b in batches)


def _gradients(model):
    return {name: value.grad.clone() for name, value in model.named_parameters()}


def test_two_micro_batches_with_global_counts_equal_one_batch(tiny_model, make_batch, examples):
    model = tiny_model().train()
    losses, gradients = [], []
    for rows in ([examples], [examples[:1], examples[1:]], [examples[3:], examples[:3]]):
        model.zero_grad()
        loss = _total(model, [make_batch(row) for row in rows], CONFIG)
        loss.backward()
        losses.append(loss.item())
        gradients.append(_gradients(model))
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)
    for other in gradients[1:]:
        for name, value in gradients[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_total_is_the_formula_of_the_module_docstring(tiny_model, make_batch, examples):
    model = tiny_model()
    batch = make_batch(examples)
    output = model(**batch.model_inputs())
    bce = dice = 0.0
    true = {0: batch.masks[:2], 1: batch.masks[2:]}
    for image, masks in true.items():
        sums = point_losses(
            output.mask_logits[image], torch.stack(masks), SAMPLING, _generator(batch.point_seeds[image])
        )
        bce, dice = bce + sums.bce.item(), dice + sums.dice.item()
    costs = F.cross_entropy(output.logits, batch.targets_M, reduction="none")
    factor = torch.tensor([0.1, 0.1, 1.0, 1.0])[batch.target_samples_M]
    expected = (factor * costs).sum().item() / len(costs) + 2.0 * bce / 3 + 0.5 * dice / 3
    found = combine(loss_sums(output, batch, CONFIG), count(batch), CONFIG)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert count(batch) == Counts(tokens=len(costs), masks=3, samples=4)


SAMPLE_MEANS = replace(CONFIG, mean="sample")


def _released_loss(model, batch_of_one):
    """Return the release's loss of a single sample: means over the sample, text times 0.1 if there are masks."""
    output = model(**batch_of_one.model_inputs())
    text = F.cross_entropy(output.logits, batch_of_one.targets_M)
    if not batch_of_one.masks:
        return CONFIG.text * text + output.zero_loss
    (logits,) = output.mask_logits
    sums = point_losses(logits, torch.stack(batch_of_one.masks), SAMPLING, _generator(batch_of_one.point_seeds[0]))
    masks = len(batch_of_one.masks)
    text = CONFIG.text_factor_with_masks * CONFIG.text * text
    return text + (CONFIG.bce * sums.bce + CONFIG.dice * sums.dice) / masks + output.zero_loss


@pytest.mark.parametrize("cut", [(4,), (1, 3), (3, 1), (2, 1, 1), (1, 1, 1, 1)], ids=str)
def test_means_of_samples_are_the_released_loss_however_samples_are_packed(tiny_model, make_batch, examples, cut):
    model = tiny_model().train()
    expected = sum(_released_loss(model, make_batch([example])) for example in examples) / len(examples)
    expected.backward()
    slow = _gradients(model)
    model.zero_grad()
    rest, batches = list(examples), []
    for size in cut:
        batches.append(make_batch(rest[:size]))
        rest = rest[size:]
    found = _total(model, batches, SAMPLE_MEANS)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, value in _gradients(model).items():
        torch.testing.assert_close(value, slow[name], rtol=1e-4, atol=1e-5, msg=name)


def test_means_of_samples_and_global_means_differ_where_samples_are_unequal(tiny_model, make_batch, examples):
    model, batch = tiny_model(), make_batch(examples)
    both = [_total(model, [batch], config).item() for config in (CONFIG, SAMPLE_MEANS)]
    assert abs(both[0] - both[1]) > 0.01 * both[0]
    alone = make_batch(examples[:1])
    assert _total(model, [alone], SAMPLE_MEANS).item() == pytest.approx(_total(model, [alone], CONFIG).item(), rel=1e-6)


def test_a_mean_that_does_not_exist_is_rejected():
    with pytest.raises(DataError, match=r"loss\.mean is 'batch', expected one of"):
        LossConfig(mean="batch")


def test_text_of_samples_with_masks_counts_a_tenth(make_batch, examples):
    batch = make_batch(examples[2:], examples[:2])
    weights = text_weights(batch, CONFIG)
    for sample, expected in enumerate((1.0, 1.0, 0.1, 0.1)):
        own = weights[batch.target_samples_M == sample]
        assert own.tolist() == pytest.approx([expected] * len(own))
        assert len(own) > 0


@pytest.mark.parametrize("supervised", [True, False])
def test_a_batch_without_masks_or_tokens_gives_zero_and_gradients(tiny_model, make_batch, examples, supervised):
    model = tiny_model().train()
    batch = make_batch(examples[3:])
    inputs = batch.model_inputs()
    targets = {"targets_M": batch.targets_M, "target_samples_M": batch.target_samples_M}
    if not supervised:
        inputs["logit_positions_M2"] = torch.zeros(0, 2, dtype=torch.long)
        targets = {name: value[:0] for name, value in targets.items()}
    share = SimpleNamespace(**(vars(batch) | targets))
    output = model(**inputs)
    sums = loss_sums(output, share, CONFIG)
    total = combine(sums, count(share), CONFIG) + output.zero_loss
    total.backward()
    assert sums.bce_S.tolist() == sums.dice_S.tolist() == [0.0]
    assert (total.item() > 0.0) == supervised
    assert math.isfinite(total.item())
    assert [name for name, value in model.named_parameters() if not bool(torch.isfinite(value.grad).all())] == []


def test_detached_sums_are_in_the_order_text_bce_dice(tiny_model, make_batch, examples):
    batch = make_batch(examples)
    sums = loss_sums(tiny_model()(**batch.model_inputs()), batch, CONFIG)
    columns = [sums.text_S.tolist(), sums.bce_S.tolist(), sums.dice_S.tolist()]
    assert sums.detached().T.tolist() == columns
    assert sums.detached().dtype == torch.float64
    assert not sums.detached().requires_grad


def test_losses_of_a_sample_are_those_it_has_alone(tiny_model, make_batch, examples):
    model = tiny_model()
    together = make_batch(examples[:2], examples[2:])
    sums = loss_sums(model(**together.model_inputs()), together, CONFIG).detached()
    for sample, example in enumerate(examples):
        alone = make_batch([example])
        expected = loss_sums(model(**alone.model_inputs()), alone, CONFIG).detached()
        torch.testing.assert_close(sums[sample], expected[0], rtol=1e-4, atol=1e-5)


def test_ignored_pixels_do_not_count():
    logits = torch.randn(2, 8, 8)
    masks = torch.rand(2, 8, 8) < 0.5
    ignored = torch.zeros_like(masks)
    ignored[:, :, 4:] = True
    changed = masks.clone()
    changed[:, :, 4:] = ~changed[:, :, 4:]
    first = point_losses(logits, masks, SAMPLING, _generator(), ignored)
    second = point_losses(logits, changed, SAMPLING, _generator(), ignored)
    # Points between the last counted and the first ignored column touch both and are excluded.
    assert (first.bce, first.dice) == (second.bce, second.dice)
    assert first.bce != point_losses(logits, masks, SAMPLING, _generator()).bce


@pytest.mark.parametrize("importance", [0.75, 0.0])
@pytest.mark.parametrize("has_ignored", [False, True])
def test_masks_of_many_images_have_the_losses_that_each_image_has_alone(importance, has_ignored):
    sampling, images, expected = replace(SAMPLING, importance_ratio=importance), [], []
    tall, wide, other = ((8, 6), (32, 24)), ((6, 8), (24, 32)), ((8, 6), (31, 24))
    for seed, ((cells, pixels), number) in enumerate(((tall, 2), (wide, 1), (tall, 3), (other, 1), (wide, 2))):
        logits = (3.0 * torch.randn(number, *cells)).requires_grad_()
        masks, ignored = (torch.rand(number, *pixels) < share for share in (0.4, 0.1))
        has_own = has_ignored and seed == 2
        without = (*ignored[:-1], None) if has_own else (None,) * number
        images.append(ImageMasks(logits=logits, masks=tuple(masks), ignored=without, seed=seed))
        if has_own:
            ignored[-1] = False
        alone = point_losses(logits, masks, sampling, _generator(seed), ignored if has_own else None)
        gradient = torch.autograd.grad(alone.bce + 3.0 * alone.dice, logits)[0]
        expected.append((alone.bce.item(), alone.dice.item(), gradient))
    losses_2N, owners = losses_at_points(images, sampling)
    assert sorted(owners) == [0, 0, 1, 2, 2, 2, 3, 4, 4]
    (losses_2N[0].sum() + 3.0 * losses_2N[1].sum()).backward()
    for index, (bce, dice, gradient) in enumerate(expected):
        found = losses_2N[:, [owner == index for owner in owners]].sum(1)
        assert found.tolist() == pytest.approx([bce, dice], rel=1e-6)
        torch.testing.assert_close(images[index].logits.grad, gradient, rtol=1e-5, atol=1e-8)


def test_a_mask_without_a_counting_pixel_costs_nothing():
    logits, masks = torch.randn(1, 8, 8), torch.rand(1, 8, 8) < 0.5
    sums = point_losses(logits, masks, SAMPLING, _generator(), torch.ones_like(masks))
    assert (sums.bce.item(), sums.dice.item()) == (0.0, 0.0)


def test_the_ignored_pixels_of_a_turn_reach_the_loss(tiny_model, processor, make_batch, make_sample):
    sample, image = make_sample(np.random.default_rng(4), size_hw=(16, 24), masks_per_turn=(1, 1))
    everything = np.ones((16, 24), dtype=bool)
    turns = (replace(sample.turns[0], ignored=everything), sample.turns[1])
    batches = []
    for sampled in (sample, replace(sample, turns=turns)):
        batches.append(make_batch([processor.encode_sample(sampled, image, independent_turns=False)]))
    model = tiny_model()
    plain, partly = (loss_sums(model(**batch.model_inputs()), batch, CONFIG) for batch in batches)
    assert 0.0 < partly.dice_S.item() < plain.dice_S.item()
    assert torch.equal(partly.text_S, plain.text_S)
