"""Interfaces between the trainer and the models, without behaviour of their own."""
