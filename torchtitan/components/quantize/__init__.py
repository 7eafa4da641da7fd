"""Training in lower precision: the converters of model.converters that quantise."""
