"""The checkpoints of the official Uni-MoE code (v1), read and written.

``names``: what a tensor is called there and here; ``files``: which files there are, in load order; ``sizes``: the
configuration that they imply; ``plan``: where every tensor of the model comes from, strictly; ``read`` and ``write``.
"""
