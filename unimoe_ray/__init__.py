"""Uni-MoE as a system people can run: train and serve a multimodal mixture of experts on Ray."""

__version__ = "0.1.0"
