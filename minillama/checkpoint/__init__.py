"""Checkpoints: model directories, read and written tensor by tensor, and the state of a run."""
