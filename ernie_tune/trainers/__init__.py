"""One trainer class per post-training method: thin, each assembles model, objective, data and the
loop.
"""
