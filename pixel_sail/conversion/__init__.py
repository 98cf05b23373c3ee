"""Conversion of checkpoints from other layouts to ours, and from ours to the release's.

`tools/convert_checkpoint.py` calls `convert`. `sources` and `zero_shards` read, `layouts` maps names, `plan` decides
what happens to every tensor, `writer` writes the new folder.
"""
