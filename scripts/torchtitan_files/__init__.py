"""Settings files of torchtitan v0.1 to v0.3, and their translation into ours."""
