"""Hugging Face folders: their files, their tensors, what is checked and written."""
