"""Conversion of checkpoints: other layouts into ours, ours into the release's.

`tools/convert_checkpoint.py` calls `convert`; reading is in `sources` and `zero_shards`, names are in `layouts`, what
becomes of every tensor in `plan`, the new folder in `writer`.
"""
