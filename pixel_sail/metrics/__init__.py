"""Metrics as sums and counts that are divided at the end.

Predicted and target masks -> sums (added over batches and ranks) -> ratios. Example: the pairs (I=2, U=4) and (I=0,
U=4) give intersection 2, union 8, cIoU 0.25 and mean IoU 0.25.
"""
