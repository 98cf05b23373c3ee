"""From annotation files to batches.

`sources/` read annotation files into `Sample` and `Expression`; `masks` turns every segmentation format into boolean
masks; `conversation` words the questions. Example: one entry of `refs(unc).p` with three sentences becomes up to three
turns of one `Sample` in training and exactly three `Expression` in evaluation.
"""
