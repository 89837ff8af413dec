"""The model: torch and transformers only. No Ray, no DeepSpeed, no files but checkpoints (``pretrained``)."""
