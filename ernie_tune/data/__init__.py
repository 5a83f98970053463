"""Everything between a user's files and the model's arrays: tokenizer, chat template, images,
video. numpy only, never paddle.
"""
