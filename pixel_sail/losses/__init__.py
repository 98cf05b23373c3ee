"""Losses: functions of (output, target) that return a sum and a count; `total` joins them with their weights."""
