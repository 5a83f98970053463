"""What a run will need before it starts: legal layouts, memory a card, seconds a step. Arithmetic
only; refuses to know paddle and devices.
"""
