"""Does MoBA learn? A plain PyTorch GPT trained on long documents with full, MoBA and sliding-window attention."""
