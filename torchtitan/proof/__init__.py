"""Prove a layout before paying for it: the user's TOML, shrunk, against one process on the CPU."""
