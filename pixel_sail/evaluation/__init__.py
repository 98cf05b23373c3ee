"""Evaluation of a checkpoint on benchmarks.

Items of a `Task` --predictor, engine--> JSON lines --scorer of the task--> one results row. Example of the scores of
referring segmentation: {"ciou": 0.79, "giou": 0.80, "p50": 0.91, "count": 10834, "missing": 3, ...}.
"""
