"""Pure functions on per-token log-probabilities; `logprobs` is the one place that turns hidden
states into them.
"""
