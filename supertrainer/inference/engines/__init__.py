"""Engines: each runs a model its own way behind the same protocol."""
