"""Parts that a trainer holds: they know settings, not models."""
