"""Parts of the training run in ``scripts/train.py``: configuration, text, model, steps, checkpoints and progress."""
