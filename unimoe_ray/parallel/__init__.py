"""Experts over ranks: how tokens travel to them, how they are placed, and the DeepSpeed engine around them."""
