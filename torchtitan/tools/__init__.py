"""Small things that any layer may use."""
