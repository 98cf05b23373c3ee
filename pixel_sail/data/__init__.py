"""Turns annotation files into training batches and expressions to score.

`sources/` reads annotation files into `Sample` and `Expression`, `masks` converts every segmentation format to boolean
masks, and `templates/` phrases the questions. Example: one entry of `refs(unc).p` with three sentences becomes up to
three turns of one `Sample` in training and exactly three `Expression`s in evaluation.
"""
