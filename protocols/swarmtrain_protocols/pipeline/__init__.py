"""Pipelines of stages: drivers, workers, steps, assignment and recovery, sans-I/O (spec 11)."""
