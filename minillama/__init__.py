"""minillama: the whole LLaMA workflow, from scratch, in plain PyTorch.

Read the files in the order of the README. Importing the package imports nothing: no torch, no side effects.
"""

__version__ = "0.1.0"
