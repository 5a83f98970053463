"""One bijective table between canonical parameter names and every on-disk scheme; reading and
writing safetensors folders.
"""
