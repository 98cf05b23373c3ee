"""Plain CPU replacements for torch's CUDA-only variable-length attention kernels, with the same contracts:

monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", new_varlen)
"""

from itertools import pairwise

import torch


def by_sequence(queries, keys, values, query_ends, key_ends, is_causal):
    """Return what variable-length kernels promise, one sequence and one head after another, causal from the bottom
    right."""
    mixed, shared = torch.zeros_like(queries), queries.shape[1] // keys.shape[1]
    for (first, last), (start, stop) in zip(pairwise(query_ends.tolist()), pairwise(key_ends.tolist()), strict=True):
        visible = torch.ones(last - first, stop - start, dtype=torch.bool)
        visible = visible.tril(stop - start - last + first) if is_causal else visible
        for head in range(queries.shape[1]):
            scores = queries[first:last, head] @ keys[start:stop, head // shared].T * queries.shape[2] ** -0.5
            weights = scores.masked_fill(~visible, -torch.inf).softmax(1)
            mixed[first:last, head] = weights @ values[start:stop, head // shared]
    return mixed


def old_varlen(q, k, v, query_ends, key_ends, max_q, max_k, is_causal=False):
    """The kernel of torch 2.10, which requires equal numbers of key and query heads."""
    assert q.shape[1] == k.shape[1]
    assert (max_q, max_k) == (query_ends.diff().max(), key_ends.diff().max())
    return by_sequence(q, k, v, query_ends, key_ends, is_causal)


def new_varlen(q, k, v, query_ends, key_ends, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
    """The kernel of later versions."""
    assert enable_gqa or q.shape[1] == k.shape[1]
    assert (max_q, max_k) == (query_ends.diff().max(), key_ends.diff().max())
    return by_sequence(q, k, v, query_ends, key_ends, {(-1, -1): False, (-1, 0): True}[window_size])
