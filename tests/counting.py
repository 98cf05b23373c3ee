"""Counts the FLOPs of matrix products, including the CPU's fused attention and depthwise convolutions."""

import math

import torch
from torch.utils.flop_counter import FlopCounterMode


def attention(queries, keys, *rest, **named):
    """Two products of every query with every key, whatever a mask hides."""
    *calls_and_heads, num_queries, width = queries
    return 4 * math.prod(calls_and_heads) * num_queries * keys[-2] * width


def attention_backward(upstream, queries, keys, *rest, **named):
    """Gradients of both products; the kernel's recomputation of the scores is not counted."""
    return 2 * attention(queries, keys)


def convolution_backward(grad_out, image, weight, *rest, **named):
    """Each gradient costs as much as the forward pass; torch's formula treats depthwise weights as dense."""
    _, _, _, _, is_transposed, _, _, output_mask = rest
    cells = image[2] * image[3] if is_transposed else grad_out[2] * grad_out[3]
    return sum(output_mask[:2]) * 2 * image[0] * cells * torch.Size(weight).numel()


def counted_operations():
    """Return a context whose `get_total_flops()` returns the FLOPs computed inside."""
    formulas = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
        torch.ops.aten.convolution_backward: convolution_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)
