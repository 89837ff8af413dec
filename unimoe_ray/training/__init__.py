"""Training: Ray Train workers around the DeepSpeed engine, stage by stage."""
