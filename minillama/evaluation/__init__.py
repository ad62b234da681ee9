"""Benchmarks by likelihood: how well a model answers questions, and predicts a text."""
