"""Distillation from frozen teachers: preprocessing, loading and feature caches.

`data/packing.py` calls `choice` in the data workers to select the samples of each teacher; `training/step.py` gets the
target feature maps from `teachers`. A teacher is never part of the student.
"""
