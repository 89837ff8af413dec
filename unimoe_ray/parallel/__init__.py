"""Experts over many ranks: where they lie, and how tokens get to them."""
