"""Every fast path matches the outputs and gradients of its reference, without device synchronization."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from one_device import MixedDevices, TensorsOfNumbers, step_on_one_device
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from varlen_kernels import new_varlen, old_varlen

from pixel_sail.config import ConfigError, TrainConfig, load_config
from pixel_sail.losses.mask import PointSampling, point_losses, sample_map, sample_points
from pixel_sail.losses.text import text_losses
from pixel_sail.losses.total import Counts, LossConfig, combine, count, loss_sums
from pixel_sail.model import decoder, upsampler
from pixel_sail.model.attention_backends import (
    SegmentAttention,
    attention_backend,
    attention_segments,
    resolve_attention,
)
from pixel_sail.model.attention_mask import attention_mask
from pixel_sail.model.decoder import MaskedAttention, RMSNorm, SwiGLU, attend
from pixel_sail.model.kernels import REFERENCE, Kernels
from pixel_sail.model.mask_head import MaskHead, PointLogits, folded_logits, mask_logits
from pixel_sail.model.spans import sample_spans
from pixel_sail.model.text_head import TextHead
from pixel_sail.model.transfer import to_device
from pixel_sail.model.turn_attention import TurnAttention, fastest_on_cpu
from pixel_sail.renamed import current_config
from pixel_sail.types import DataError, SampleSpan

FAST = Kernels(attention="segments")
CONFIG = LossConfig(points=PointSampling(num_points=64))
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture
def batch(processor, make_sample, make_batch):
    """Two rows with two images of one grid, one of another, one without masks, text alone, and independent turns."""
    rng = np.random.default_rng(3)

    def example(independent=False, **what):
        return processor.encode_sample(*make_sample(rng, **what), independent_turns=independent)

    rows = [
        [
            example(masks_per_turn=(1, 2), prompts=(3, 7), sample_id="conversation"),
            example(masks_per_turn=(1, 0, 2), independent=True, sample_id="branches"),
            example(size_hw=None, masks_per_turn=(0, 0), sample_id="text"),
        ],
        [
            example(size_hw=None, masks_per_turn=(0, 0), independent=True, sample_id="text branches"),
            example(size_hw=(40, 9), masks_per_turn=(3,), sample_id="tall"),
            example(size_hw=(8, 8), masks_per_turn=(0,), sample_id="no mask"),
        ],
    ]
    return make_batch(*rows)


def losses_and_gradients(model, batch, kernels):
    model.use(kernels)
    model.zero_grad()
    output = model(**batch.training_inputs())
    sums = loss_sums(output, batch, CONFIG)
    counts = count(batch)
    (combine(sums, counts, CONFIG) + output.zero_loss).backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters()}
    return torch.cat((sums.text_S, sums.bce_S, sums.dice_S)).detach(), found, output


ONE_CHANGE = [
    replace(REFERENCE, attention="segments"),
    replace(REFERENCE, attention="turns"),
    replace(REFERENCE, attention="varlen"),
    replace(REFERENCE, text_loss="chunked"),
    replace(REFERENCE, mask_head="folded"),
    replace(REFERENCE, mask_head="points"),
    replace(REFERENCE, recompute_elementwise=True),
    FAST,
    replace(FAST, attention="varlen"),
    Kernels(),
]


@pytest.mark.parametrize("kernels", ONE_CHANGE, ids=lambda kernels: "-".join(str(v) for v in vars(kernels).values()))
@pytest.mark.parametrize("tied", [True, False])
def test_losses_and_gradients_are_those_of_the_reference(tiny_model, batch, monkeypatch, kernels, tied):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", new_varlen)
    if kernels != Kernels():
        monkeypatch.setattr(upsampler, "SMALL_MAP", 0)
    model = tiny_model(tie_word_embeddings=tied).train()
    expected, slow, _ = losses_and_gradients(model, batch, REFERENCE)
    found, fast, output = losses_and_gradients(model, batch, kernels)
    assert output.hidden_BTD.shape[:2] == batch.input_ids_BT.shape
    torch.testing.assert_close(found, expected, **TOLERANCE)
    for name, gradient in slow.items():
        torch.testing.assert_close(fast[name], gradient, rtol=1e-3, atol=2e-5 * float(gradient.abs().max()), msg=name)
    assert max(float(gradient.abs().max()) for gradient in slow.values()) > 0.01


def test_a_batch_without_masks_or_supervised_text_still_gives_every_parameter_a_gradient(tiny_model, batch):
    model = tiny_model().train()
    model.use(FAST)
    none = torch.zeros(0, 2, dtype=torch.long)
    inputs = batch.training_inputs() | {"targets_M": none[:, 0], "logit_positions_M2": none}
    inputs |= {"seg_positions_N2": none, "masks_per_image": [0] * len(batch.grids)}
    model(**inputs).zero_loss.backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


def test_half_precision_stays_as_close_to_float32_as_the_reference_does(tiny_model, batch):
    """bf16 keeps 8 bits: the fast path may be at most 1.5 times as far from float32 as the slow one, plus 1 %."""
    model = tiny_model().train()
    exact, gradients, _ = losses_and_gradients(model, batch, REFERENCE)
    model.to(torch.bfloat16)
    errors = []
    for kernels in (REFERENCE, FAST):
        found, own, _ = losses_and_gradients(model, batch, kernels)
        loss = ((found - exact).norm() / exact.norm()).item()
        distance = sum((own[n].float() - g).square().sum() for n, g in gradients.items()).sqrt()
        errors.append((loss, (distance / sum(g.square().sum() for g in gradients.values()).sqrt()).item()))
    (slow_loss, slow_gradient), (fast_loss, fast_gradient) = errors
    assert fast_loss <= 1.5 * slow_loss + 0.01
    assert fast_gradient <= 1.5 * slow_gradient + 0.01


def test_autocast_takes_the_fast_path_too(tiny_model, batch):
    model = tiny_model().train()
    with torch.autocast("cpu", torch.bfloat16):
        slow = losses_and_gradients(model, batch, REFERENCE)
        fast = losses_and_gradients(model, batch, FAST)
    torch.testing.assert_close(fast[0], slow[0], rtol=0.05, atol=0.05)
    assert all(gradient.dtype == torch.float32 for gradient in fast[1].values())


def test_flex_attention_gives_every_real_token_the_states_of_the_dense_mask(tiny_model, batch):
    """Outputs only: torch has no backward pass of FlexAttention on a CPU."""
    model, states = tiny_model(), []
    for attention in ("dense", "flex"):
        model.use(Kernels(attention=attention))
        with torch.no_grad():
            states.append(model(**batch.model_inputs()).hidden_BTD[batch.sample_index_BT >= 0])
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-5)


def test_every_real_token_gets_the_values_of_the_dense_mask(batch):
    torch.manual_seed(1)
    where = (batch.sample_index_BT, batch.branch_ids_BT, batch.in_image_BT)
    shape = (*batch.input_ids_BT.shape, 16)
    queries, keys, values = (
        torch.randn(shape[0], heads, *shape[1:], dtype=torch.double, requires_grad=True) for heads in (4, 2, 2)
    )
    is_real = (batch.sample_index_BT >= 0)[:, None, :, None]
    weights = torch.randn(queries.shape, dtype=torch.double) * is_real
    expected = attend(queries, keys, values, attention_mask(*where))
    slow = torch.autograd.grad((expected * weights).sum(), (queries, keys, values))
    found = attention_backend("segments", *where, batch.spans, dtype=torch.double)(0, queries, keys, values)
    torch.testing.assert_close(found * is_real, expected * is_real)
    fast = torch.autograd.grad((found * weights).sum(), (queries, keys, values))
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kernel", [old_varlen, new_varlen])
def test_inputs_of_variable_length_kernels_give_the_values_of_the_dense_mask(batch, monkeypatch, kernel):
    """The kernels are for CUDA only; a plain replacement has the same contract."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    where = (batch.sample_index_BT, batch.branch_ids_BT, batch.in_image_BT)
    shape = (*batch.input_ids_BT.shape, 16)
    queries, keys, values = (torch.randn(shape[0], heads, *shape[1:], dtype=torch.double) for heads in (4, 2, 2))
    is_real = (batch.sample_index_BT >= 0)[:, None, :, None]
    backend = attention_backend("varlen", *where, batch.spans, dtype=torch.double)
    reordered = (backend.reorder(x.transpose(1, 2)).transpose(1, 2) for x in (queries, keys, values))
    found = backend.restore_order(backend(0, *reordered).transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(found * is_real, attend(queries, keys, values, attention_mask(*where)) * is_real)


def test_the_kernel_of_a_norm_is_the_norm():
    torch.manual_seed(0)
    norm = RMSNorm(24, 1e-5)
    torch.nn.init.normal_(norm.weight)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        states = torch.randn(3, 5, 24, dtype=dtype, requires_grad=True)
        norm.to(dtype)
        found = F.rms_norm(states, norm.weight.shape, norm.weight, norm.eps)
        torch.testing.assert_close(found, norm(states), rtol=tolerance, atol=tolerance)


def test_samples_of_one_shape_are_computed_together(processor, make_sample, make_batch):
    sample, image = make_sample(np.random.default_rng(0), masks_per_turn=(1,))
    example = processor.encode_sample(sample, image, independent_turns=False)
    batch = make_batch([example] * 3, [example] * 2)
    where = (batch.sample_index_BT, batch.branch_ids_BT, batch.in_image_BT)
    backend = attention_backend("segments", *where, batch.spans, dtype=torch.float32)
    assert [len(segments) for _, segments in backend.groups] == [5, 5]


def test_spans_are_read_from_the_tokens_and_make_segments():
    sample = torch.tensor([[0] * 9 + [1] * 4, [2] * 5 + [-1] * 8])
    branch = torch.tensor([[0] * 5 + [1, 1, 2, 2] + [1] * 4, [0] * 3 + [1] * 2 + [0] * 8])
    in_image = torch.tensor([[1] * 3 + [0] * 10, [1] * 3 + [0] * 10]).bool()
    spans = sample_spans(sample, branch, in_image)
    assert spans == (
        SampleSpan(row=0, start=0, image=3, shared=2, branches=(2, 2)),
        SampleSpan(row=0, start=9, image=0, shared=0, branches=(4,)),
        SampleSpan(row=1, start=0, image=3, shared=0, branches=(2,)),
    )
    segments = [
        (c.row, c.start, c.num_queries, c.prefix_start, c.num_prefix_keys, c.is_image)
        for c in attention_segments(spans)
    ]
    assert segments == [
        *((0, 0, 3, 0, 0, True), (0, 3, 2, 0, 3, False), (0, 5, 2, 0, 5, False), (0, 7, 2, 0, 5, False)),
        *((0, 9, 4, 9, 0, False), (1, 0, 3, 0, 0, True), (1, 3, 2, 0, 3, False)),
    ]
    assert [span.length for span in spans] == [9, 4, 5]


@pytest.mark.parametrize(
    ("sample", "branch", "in_image"),
    [
        ([0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]),
        ([0, 0, 0, 0], [1, 2, 1, 2], [0, 0, 0, 0]),
        ([0, 0, 0, 0], [1, 0, 0, 1], [0, 1, 1, 0]),
        ([0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]),
    ],
    ids=["shared text between", "branches mixed", "image not first", "samples mixed"],
)
def test_tokens_in_another_order_are_rejected(sample, branch, in_image):
    with pytest.raises(ValueError, match=r"sample 0 in row 0"):
        sample_spans(torch.tensor([sample]), torch.tensor([branch]), torch.tensor([in_image]).bool())


@pytest.mark.parametrize(("device", "dtype", "expected"), [
    ("cpu", torch.float32, "segments"),
    ("cpu", torch.bfloat16, "segments"),
    ("cuda", torch.bfloat16, "varlen"),
    ("cuda", torch.float32, "flex"),
])  # fmt: skip
def test_auto_is_chosen_by_device_and_precision(device, dtype, expected):
    assert resolve_attention("auto", torch.device(device), dtype) == expected
    assert resolve_attention("dense", torch.device(device), dtype) == "dense"


def _rows(number, *branches, image=66, shared=0):
    """Return the spans of rows of one sample each, and (rows, tokens of the longest)."""
    spans = tuple(SampleSpan(row=row, start=0, image=image, shared=shared, branches=branches) for row in range(number))
    return spans, (number, image + shared + sum(branches))


@pytest.mark.parametrize(("rows", "expected"), [
    (_rows(1), "dense"),
    (_rows(1, image=1202, shared=130), "segments"),
    (_rows(8, *[16] * 32), "turns"),
    (_rows(8, *[16] * 32, 600), "segments"),
    (((), (1, 5)), "dense"),
], ids=["image alone", "large image", "many questions", "one long answer", "nothing"])  # fmt: skip
def test_auto_takes_what_has_fewest_scores_on_a_cpu(rows, expected):
    assert fastest_on_cpu(*rows) == expected


@pytest.mark.parametrize("sample", [
    {"image": 6, "shared": 2, "branches": (3, 1, 4)}, {"image": 0, "shared": 0, "branches": (3, 4)},
    {"image": 5, "shared": 3, "branches": ()}, {"image": 0, "shared": 2, "branches": (2,)},
])  # fmt: skip
def test_turns_mix_what_segments_mix_whatever_a_sample_lacks(sample):
    spans = (SampleSpan(row=0, start=0, **sample), SampleSpan(row=1, start=0, image=0, shared=0, branches=(2,)))
    q, k, v = (torch.randn(2, 20, heads, 8).transpose(1, 2).requires_grad_() for heads in (4, 2, 2))
    weights, found = torch.randn(2, 4, 20, 8), []
    for backend in (SegmentAttention(spans, dtype=q.dtype), TurnAttention(spans, shape=(2, 20), dtype=q.dtype)):
        mixed = backend(0, q, k, v)
        found.append((mixed, *torch.autograd.grad((mixed * weights).sum(), (q, k, v))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num", [0, 1, 7, 256, 600])
def test_chunked_losses_and_gradients_are_those_of_all_logits(num):
    head = TextHead(24, 91)
    states = torch.randn(num, 24, requires_grad=True)
    targets, weights = torch.randint(91, (num,)), torch.rand(num)
    expected = text_losses(head(states), targets)
    slow = torch.autograd.grad((expected * weights).sum(), (states, head.weight))
    found = head(states, targets)
    fast = torch.autograd.grad((found * weights).sum(), (states, head.weight))
    torch.testing.assert_close(found, expected, **TOLERANCE)
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_chunked_losses_never_hold_more_logits_than_a_chunk():
    head, states = TextHead(8, 1000), torch.randn(700, 8, requires_grad=True)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (result if isinstance(result, tuple) else (result,)) if torch.is_tensor(t))
            return result

    with Watch():
        head(states, torch.randint(1000, (700,))).sum().backward()
    assert max(sizes) == 256 * 1000


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_folded_logits_are_queries_dotted_with_features(make_config, stride):
    torch.manual_seed(0)
    head = MaskHead(make_config(mask_stride=stride))
    head.init_weights()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() == 1 else None
    states, segs = torch.randn(2, 3, 5, 32, requires_grad=True), torch.randn(4, 32, requires_grad=True)
    features, queries, _ = head([states], segs)
    pixel_embed, same_queries, mask_embed = head([states], segs, mode="folded")
    rows, columns = 3 * 8 // stride, 5 * 8 // stride
    expected = torch.stack([mask_logits(queries, own) for own in features.view(2, rows, columns, -1)])
    found = torch.stack([folded_logits(mask_embed, own) for own in pixel_embed.view(2, rows, columns, -1)])
    assert torch.equal(queries, same_queries)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    weights = torch.randn_like(expected)
    inputs = (states, segs, *head.parameters())
    slow, fast = (torch.autograd.grad((logits * weights).sum(), inputs) for logits in (expected, found))
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * max(1.0, float(other.abs().max())))


def test_points_read_before_the_dot_product_are_those_read_after_it_also_beyond_the_border():
    mask_embed, pixel_embed = torch.randn(3, 9), torch.randn(4, 6, 8)
    points = torch.rand(3, 200, 2)
    points[:, :5] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.02, 0.5], [0.5, 0.999], [1.0, 0.3]])
    maps = folded_logits(mask_embed, pixel_embed)
    found = PointLogits(mask_embed_NE=mask_embed, pixel_embed_YXC=pixel_embed).at(points)
    torch.testing.assert_close(found, sample_map(maps, points), rtol=1e-4, atol=1e-5)
    # At a corner one cell in four exists: the bias counts a quarter, too.
    corner = (maps[0, 0, 0] / 4).item()
    assert found[0, 0].item() == pytest.approx(corner, rel=1e-4)


def test_the_same_points_are_chosen_from_maps_and_from_features():
    sampling = PointSampling(num_points=40)
    mask_embed, pixel_embed, masks = torch.randn(3, 9), torch.randn(4, 6, 8), torch.rand(3, 20, 30) < 0.4
    maps, reader = (
        folded_logits(mask_embed, pixel_embed),
        PointLogits(mask_embed_NE=mask_embed, pixel_embed_YXC=pixel_embed),
    )
    chosen = [sample_points(logits, sampling, torch.Generator().manual_seed(2)) for logits in (maps, reader)]
    assert torch.equal(*chosen)
    sums = [point_losses(logits, masks, sampling, torch.Generator().manual_seed(2)) for logits in (maps, reader)]
    assert sums[1].bce.item() == pytest.approx(sums[0].bce.item(), rel=1e-5)
    assert sums[1].dice.item() == pytest.approx(sums[0].dice.item(), rel=1e-5)
    assert sums[0].count == sums[1].count == 3


def test_a_swiglu_keeps_two_wide_maps_instead_of_four(make_config):
    layer, states, kept = SwiGLU(make_config()), torch.randn(2, 7, 32, requires_grad=True), {}
    for layer.recompute in (False, True):
        places = set()

        def keep(tensor, places=places):
            if tensor.numel() == 2 * 7 * 48:
                places.add(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = layer(states)
        kept[layer.recompute] = len(places)
        result.sum().backward()
    assert kept == {False: 4, True: 2}


class HostReads(TorchDispatchMode):
    """Records every operation for whose result the host would wait on a GPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "bincount")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        by_mask = name.startswith("index") and any(
            torch.is_tensor(index) and index.dtype == torch.bool
            for entry in args[1:]
            if isinstance(entry, (list, tuple))
            for index in entry
        )
        if any(name.startswith(word) for word in self.WAITING) or by_mask:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mask_head", ["folded", "points"])
def test_forward_losses_and_backward_ask_the_device_for_nothing(tiny_model, batch, mask_head):
    model = tiny_model().train()
    model.use(replace(FAST, mask_head=mask_head))
    with HostReads() as reads:
        output = model(**batch.training_inputs())
        sums = loss_sums(output, batch, CONFIG)
        (combine(sums, Counts(tokens=9, masks=9, samples=9), CONFIG) + output.zero_loss).backward()
    assert reads.found == []
    with HostReads() as reads:
        sample_spans(batch.sample_index_BT, batch.branch_ids_BT, batch.in_image_BT)
        batch.input_ids_BT[batch.in_image_BT]
    assert "index" in reads.found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", ["none", "feed_forward", "layers"])
@pytest.mark.parametrize("kernels", [
    Kernels(attention="varlen"), Kernels(attention="dense", mask_head="points"), REFERENCE,
], ids=["fast", "points", "reference"])  # fmt: skip
def test_a_step_runs_on_any_single_device(tiny_model, batch, kernels, checkpointing, dtype):
    others = ({"visual_prompts": "pooled"}, {"tie_word_embeddings": False}, {"hidden_size": 1152})
    for changes in ({}, *(others if checkpointing == "none" else ())):
        with torch.device("meta"):
            model = tiny_model(**changes)
        model.use(kernels, checkpointing)
        assert step_on_one_device(model, batch, dtype, CONFIG) == [], changes


def test_values_read_from_the_host_are_recorded():
    found = []
    on_device = torch.empty(4, device="meta")
    with MixedDevices(found), TensorsOfNumbers(found):
        to_device(torch.tensor([1.0]), on_device.device) + on_device.new_zeros(4)
        on_device[torch.tensor([1])]
        on_device.new_tensor([1.0, 2.0])
    assert found == ["aten::index.Tensor", "new_tensor"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: torch's own check knows no other device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_on_a_gpu_does_not_wait_and_equals_the_reference(tiny_model, batch, dtype):
    model = tiny_model(num_attention_heads=2).train().cuda().to(dtype)
    moved = batch.to("cuda")
    expected, _, _ = losses_and_gradients(model, moved, REFERENCE)
    losses_and_gradients(model, moved, Kernels())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, _, _ = losses_and_gradients(model, moved, Kernels())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(found, expected, **tolerance)


def test_a_compiled_layer_is_two_graphs_for_all_layers_and_lengths(tiny_model, monkeypatch):
    """With a backend that only captures: code generation is torch's responsibility."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    captured = cache(lambda part: torch.compile(part, dynamic=True, backend="aot_eager"))
    monkeypatch.setattr(decoder, "through_compile", captured)
    model = tiny_model(num_hidden_layers=3)
    plain, compiled = [], []
    for length in (9, 14, 30):
        states = torch.randn(1, length, 32, requires_grad=True)
        places = torch.arange(length).expand(2, 1, -1)
        mask = MaskedAttention(mask_B1TS=torch.ones(1, 1, length, length, dtype=torch.bool).tril())
        # Not the sum of squares: the last norm makes it a constant, whose gradient is rounding noise.
        weights = torch.randn(1, length, 32)
        for kernels, found in ((Kernels(), plain), (Kernels(compile="layers"), compiled)):
            model.use(kernels)
            result = model.decoder(states, places, mask)
            learned = [states, *model.decoder.parameters()]
            found.append((result.detach(), *torch.autograd.grad((result * weights).sum(), learned)))
    assert min(float(of_states.abs().max()) for _, of_states, *_ in plain) > 0.1
    for (result, of_states, *own), (expected, of_expected, *others) in zip(compiled, plain, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            of_states, of_expected, rtol=1e-3, atol=2e-5 * max(1.0, float(of_expected.abs().max()))
        )
        for one, other in zip(own, others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5 * max(1.0, float(other.abs().max())))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_kernels_are_a_group_of_a_run_and_reject_unknown_choices():
    assert load_config("train", TrainConfig, ["name=x"]).kernels == Kernels()
    chosen = load_config("train", TrainConfig, ["name=x", "kernels.attention=dense", "kernels.mask_head=maps"]).kernels
    assert (chosen.attention, chosen.mask_head, chosen.text_loss) == ("dense", "maps", "chunked")
    with pytest.raises(DataError, match=r"kernels\.attention is 'sparse', expected one of"):
        Kernels(attention="sparse")


def test_cross_entropy_by_hand():
    head = TextHead(1, 3)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0], [1.0], [2.0]]))
    expected = np.log(1 + np.e + np.e**2) - 1.0
    found = head(torch.ones(1, 1), torch.tensor([1]))
    assert found.item() == pytest.approx(expected, rel=1e-6)
    assert F.cross_entropy(head(torch.ones(1, 1)), torch.tensor([1])).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("speed.elementwise=plain", "kernels.recompute_elementwise=false"),
        ("speed.mask_head=maps", "kernels.mask_head=maps"),
    ],
)
def test_the_group_under_its_former_name_is_rejected_with_the_new_one(old, new):
    with pytest.raises(ConfigError, match=f"which was renamed; write {new}"):
        load_config("train", TrainConfig, ["name=x", old])
    assert load_config("train", TrainConfig, ["name=x", new]).kernels != Kernels()


def test_the_group_under_its_former_name_is_read_from_files():
    stored = {"attention": "auto", "text_loss": "chunked", "mask_head": "points", "compile": "off", "experts": "mixed"}
    now = current_config({"speed": stored | {"elementwise": "plain"}})
    assert now == {"kernels": stored | {"recompute_elementwise": False}}
    assert current_config({"speed": {"elementwise": "recomputed"}}) == {"kernels": {"recompute_elementwise": True}}
