"""Talking to a model: the in-process engine that the terminal chat and the server use."""
