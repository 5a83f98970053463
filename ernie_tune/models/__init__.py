"""Single-device ERNIE-4.5-VL. Knows nothing of files, tokenizers, losses or distribution; `config`,
`presets`, `inputs` load without paddle.
"""
