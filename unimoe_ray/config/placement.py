"""Where experts lie when ranks share them, and when they move."""

from __future__ import annotations

from pydantic import Field

from unimoe_ray.config.base import Strict


class PlacementConfig(Strict):
    """None of these changes what is learned: experts only change places. Speeds are what decides between balance,
    traffic and moving; the defaults are those of GPU nodes with NVLink and a 200 Gbit/s network card per GPU."""

    interval: int = Field(0, ge=0, description="optimizer steps between plans while training; 0: experts stay")
    min_gain: float = Field(0.05, ge=0, lt=1, description="part of the expert layers' time that moving must save")
    slack: float | None = Field(
        None, ge=0, description="how far the slowest rank may be above the mean to save traffic; little if not given"
    )
    slots: int | None = Field(
        None, ge=1, description="experts of a layer that fit on a rank; one more than an even part if not given"
    )
    inter_node_gb_s: float = Field(25.0, gt=0, description="GB/s of a rank to other nodes")
    intra_node_gb_s: float = Field(200.0, gt=0, description="GB/s of a rank to others on its node")
    tflops: float = Field(200.0, gt=0, description="what a rank reaches in the products of its experts")

    def slots_per_rank(self, experts: int, ranks: int) -> int:
        return self.slots if self.slots is not None else min(experts, -(-experts // ranks) + (ranks > 1))

    def link_costs(self) -> dict[str, float]:
        """Seconds per byte, as ``parallel.topology.Topology`` takes them."""
        return {"inter_cost": 1 / (self.inter_node_gb_s * 1e9), "intra_cost": 1 / (self.intra_node_gb_s * 1e9)}
