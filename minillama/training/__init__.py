"""How a model is trained: settings become a run, and the loop takes its steps."""
