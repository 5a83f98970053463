"""What an answer is worth: scores, verifiers, evidence in the picture, rubrics. Numbers and
strings; nothing here needs paddle.
"""
