"""Ablations: a grid of runs over seeds, side by side, and what they say about the paper's claims."""
