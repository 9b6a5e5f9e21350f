"""Scores as pure functions: labels, generated text, loss baselines."""
