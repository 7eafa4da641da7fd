"""Interfaces between the trainer and the models."""
