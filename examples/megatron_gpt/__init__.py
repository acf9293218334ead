"""A GPT trained on Megatron-Core with MoBA attention: ``train.py`` is the program; the other files are its parts."""
