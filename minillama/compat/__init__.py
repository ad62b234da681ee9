"""Command lines and files of other systems, as keys and flags of minillama.

Only the scripts import this folder. Without it they have only minillama's own flags.
"""
