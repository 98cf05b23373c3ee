"""Pixel-SAIL: pixel-grounded understanding with one decoder-only transformer (arXiv 2504.10465).

Subpackages, in the order data flows through them: `types` (the nouns), `data` (files to batches), `model` (batches to
text and mask logits), `losses`, `training`, `evaluation` and `metrics`.
"""

__version__ = "0.1.0"
