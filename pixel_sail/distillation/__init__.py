"""Frozen networks whose features the student learns to predict: preprocessing, loading, caching.

`data/packing.py` asks `choice` in the loader's workers what a teacher looks at, `training/step.py` asks `teachers` for
the maps the losses are computed against. No teacher is ever a part of the student.
"""
