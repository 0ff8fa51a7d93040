"""Schedules, parameterisations and samplers: pure functions on tensors."""
