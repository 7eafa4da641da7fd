"""Hugging Face folders: reading, writing and checks of their files and tensors."""

MAX_FILE_BYTES = 5 * 10**9  # of the files that are written; Hugging Face's own default
