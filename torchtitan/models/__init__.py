"""Model families, one folder each. A family is found by its folder's name."""
