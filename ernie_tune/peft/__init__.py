"""Fine-tuning a part of the model: LoRA, adapters, prompts, freezing, quantised bases. All of it
attached to or swapped into `models` from outside.
"""
