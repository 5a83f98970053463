"""What a run tells people: its log and loggers, progress bars, curves, the pages and the model
card. Loads without paddle and knows no trainer.
"""
