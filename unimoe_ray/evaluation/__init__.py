"""Held-out answers: greedy decoding, exact match, routing statistics."""
