"""What a model makes of held-out rows, and what a run measures before, during and after it."""
