"""Painted visual prompts: each stays visible, small ones are on top of large ones, their order does not matter."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from pixel_sail.data.prompts import point_prompt
from pixel_sail.model.patches import covered_patches, visible_owners
from pixel_sail.types import DataError, VisualPrompt

GRID = (2, 3)
SIZE = (16, 24)  # patches of 8 pixels


def _box(top, left, bottom, right, size_hw=SIZE):
    mask = np.zeros(size_hw, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def _paint(processor, *masks, ids=None, grid_hw=GRID):
    numbers = range(len(masks)) if ids is None else ids
    prompts = tuple(VisualPrompt(prompt_id=i, mask=mask) for i, mask in zip(numbers, masks, strict=True))
    painted = processor.paint_prompts(prompts, grid_hw, "toy/1").numpy()
    assert painted[[0, -1]].tolist() == [-1, -1]
    return painted[1:-1].reshape(grid_hw)


def _plain(masks, grid_hw=GRID):
    """Paint large to small and nothing else."""
    painted = np.full(grid_hw, -1)
    for index in sorted(range(len(masks)), key=lambda i: (-masks[i].sum(), i)):
        painted[covered_patches(masks[index], grid_hw)] = index
    return painted


@st.composite
def _masks(draw, most=6):
    """Up to `most` rectangles and points, often nested, equal or within one patch."""
    masks = []
    for _ in range(draw(st.integers(1, most))):
        top, left = draw(st.integers(0, SIZE[0] - 1)), draw(st.integers(0, SIZE[1] - 1))
        height, width = draw(st.integers(1, SIZE[0])), draw(st.integers(1, SIZE[1]))
        masks.append(_box(top, left, top + height, left + width))
    return masks


def _can_all_be_seen(masks, grid_hw=GRID):
    """Return whether every prompt can have its own patch, by solving the assignment independently."""
    covered = np.array([covered_patches(mask, grid_hw).ravel() for mask in masks])
    rows, columns = linear_sum_assignment(covered, maximize=True)
    return int(covered[rows, columns].sum()) == len(masks)


@given(masks=_masks(most=8))
@settings(max_examples=150, deadline=None)
def test_every_prompt_is_seen_on_a_patch_it_covers_or_the_error_is_true(processor, masks):
    if not _can_all_be_seen(masks):
        with pytest.raises(DataError, match=rf"^toy/1: {len(masks)} visual prompts found on \d patches"):
            _paint(processor, *masks)
        return
    painted = _paint(processor, *masks)
    covered = np.array([covered_patches(mask, GRID) for mask in masks])
    for index in range(len(masks)):
        assert (painted == index).any()
        assert not (painted == index)[~covered[index]].any()
    np.testing.assert_array_equal(painted >= 0, covered.any(axis=0))


@given(masks=_masks())
@settings(max_examples=100, deadline=None)
def test_where_nothing_is_hidden_painting_is_large_to_small(processor, masks):
    expected = _plain(masks)
    if set(range(len(masks))) <= set(expected.ravel().tolist()):
        np.testing.assert_array_equal(_paint(processor, *masks), expected)


@given(masks=_masks(), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_the_order_of_the_prompts_is_irrelevant(processor, masks, seed):
    if not _can_all_be_seen(masks):
        return
    order = np.random.default_rng(seed).permutation(len(masks)).tolist()
    shuffled = _paint(processor, *(masks[i] for i in order), ids=order)
    np.testing.assert_array_equal(shuffled, _paint(processor, *masks))


@given(masks=_masks())
@settings(max_examples=60, deadline=None)
def test_the_ids_are_names_only(processor, masks):
    """Other ids in the same order give the same image with other names."""
    if not _can_all_be_seen(masks):
        return
    ids = [2 * i + 3 for i in range(len(masks))]
    painted = _paint(processor, *masks)
    np.testing.assert_array_equal(_paint(processor, *masks, ids=ids), np.where(painted < 0, -1, 2 * painted + 3))


def test_two_equal_prompts_share_their_patches(processor):
    painted = _paint(processor, np.ones(SIZE, dtype=bool), np.ones(SIZE, dtype=bool))
    assert painted.tolist() == [[1, 0, 1], [1, 1, 1]]  # the hidden one gets a middle patch, the first of two


def test_a_prompt_under_many_small_ones_takes_a_patch_from_the_one_with_most(processor):
    large = _box(0, 0, 8, 24)
    left, right = _box(0, 0, 7, 15), _box(0, 16, 7, 20)
    assert _paint(processor, large, left, right).tolist() == [[1, 0, 2], [-1, -1, -1]]


def test_coverers_with_one_patch_each_move_aside(processor):
    """The large prompt is hidden by three of one patch, of which only the last can go elsewhere."""
    large = _box(0, 0, 8, 24)
    first, second = _box(0, 0, 4, 4), _box(0, 8, 4, 12)
    third = _box(5, 18, 11, 23)  # reaches into the row below, where a fourth one covers it
    fourth = _box(8, 16, 10, 18)
    fifth = _box(9, 17, 16, 24)
    covers = [large, first, second, third]
    assert _paint(processor, *covers).tolist() == [[1, 2, 0], [-1, -1, 3]]
    with pytest.raises(DataError, match="5 visual prompts found on 4 patches in all"):
        _paint(processor, *covers, fourth)
    assert _can_all_be_seen([*covers]) and not _can_all_be_seen([*covers, fifth])


def test_a_chain_of_moves_is_found():
    """Five regions in a row of patches, each hidden but for one move of all the others."""
    row = np.eye(5, dtype=bool)
    covered = [(row[i] | row[min(i + 1, 4)])[None] for i in range(4)]
    order = [row[0][None], *covered]
    owners = visible_owners(order)
    assert owners is not None and sorted(owners.ravel().tolist()) == [0, 1, 2, 3, 4]


def test_a_point_inside_a_box_inside_a_mask_is_seen(processor):
    rng = np.random.default_rng(0)
    whole, box = np.ones((64, 64), dtype=bool), _box(16, 16, 48, 48, (64, 64))
    for _ in range(20):
        point = point_prompt(box, rng)
        for masks in ([whole, box, point], [point, whole, box], [box, point, whole]):
            painted = _paint(processor, *masks, grid_hw=(8, 8))
            areas = [int((painted == index).sum()) for index in range(3)]
            assert sorted(areas) == [1, 15, 48]
            assert areas[int(np.argmin([mask.sum() for mask in masks]))] == 1


def test_points_beside_each_other_in_a_large_image_each_keep_a_patch_or_are_named(processor):
    first, second = np.zeros((2, 3000, 2000), dtype=bool)
    first[1234, 567], second[1234, 568] = True, True
    grid_hw = processor.grid_of(first.shape)
    with pytest.raises(DataError, match="2 visual prompts found on 1 patches in all"):
        _paint(processor, first, second, grid_hw=grid_hw)
    second[1234, 900] = True
    assert (_paint(processor, first, second, grid_hw=grid_hw) >= 0).sum() == 2


def test_no_prompt_paints_nothing(processor):
    assert processor.paint_prompts((), GRID, "toy/1").tolist() == [-1] * 8


def test_a_prompt_without_pixels_or_without_a_token_is_rejected(processor):
    with pytest.raises(DataError, match=r"^toy/1: the mask of <Prompt0> marks no pixel"):
        _paint(processor, np.zeros(SIZE, dtype=bool))
    with pytest.raises(DataError, match=r"^toy/1: visual prompt 15 found, expected 0 \.\. 14"):
        _paint(processor, np.ones(SIZE, dtype=bool), ids=[15])
