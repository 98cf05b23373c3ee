"""Losses: functions of (output, target) that return a sum and a count. `total` combines them with their weights."""
