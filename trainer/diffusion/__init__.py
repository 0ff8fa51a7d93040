"""Schedules and samplers: pure functions on tensors."""
