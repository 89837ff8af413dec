"""The report of a run: one HTML page that works from disk."""

from unimoe_ray.report.write import write_report

__all__ = ["write_report"]
