"""Conversions between checkpoints: each streams tensor by tensor from directory to directory, and proves what it did."""
