"""Helpers that any layer may use: errors, files and locks, signals, launcher, profiling."""
