"""Lowest layer: settings that must be decided before paddle loads, and the file format of
configuration. Imports nothing of ernie_tune.
"""
