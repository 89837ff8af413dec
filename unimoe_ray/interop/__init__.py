"""Between this model and others: the official Uni-MoE code and checkpoints, Hugging Face."""
