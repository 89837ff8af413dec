"""Ray job entry points. Each runs alone (``python -m jobs.align``) and under ``ray job submit``."""
