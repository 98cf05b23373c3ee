"""Prediction files and their scores.

Place in the flow: `Expression` --predictor--> `Prediction` --JSON lines--> sums --> one results row. Example of a row:
{"ciou": 0.79, "giou": 0.80, "p50": 0.91, "count": 10834, "missing": 3, ...}.
"""
