"""Rows in, tensors out: data files and built-in sets, checked row by row, split, and made ready for each family."""
