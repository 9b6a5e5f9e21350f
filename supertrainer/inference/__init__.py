"""Answers from a trained model: one small protocol, and an engine for each way to run a model."""
