"""The loop and what surrounds it: objectives as the loop sees them, optimizer, metrics, guards.
Trainers assemble; nothing here reads YAML.
"""
