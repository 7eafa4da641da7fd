"""Hugging Face folders: reading, writing and checks of their files and tensors."""
