"""One golden case: ``NAME.json`` (configuration, what every tensor means) and ``NAME.safetensors``."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]


class Case:
    """weights by their official names, inputs and outputs by theirs; everything else is in ``spec``."""

    def __init__(self, path: Path):
        self.path = path
        self.spec: dict[str, Any] = json.loads(path.read_text())
        self.config: dict[str, Any] = self.spec.get("config", {})

    @cached_property
    def _tensors(self) -> Tensors:
        return load_file(self.path.with_suffix(".safetensors"))

    def _group(self, name: str) -> Tensors:
        return {k.removeprefix(f"{name}/"): t for k, t in self._tensors.items() if k.startswith(f"{name}/")}

    @property
    def inputs(self) -> Tensors:
        return self._group("inputs")

    @property
    def outputs(self) -> Tensors:
        return self._group("outputs")

    def weights(self, prefix: str = "") -> Tensors:
        """Those whose name begins with ``prefix``, without it."""
        return {k.removeprefix(prefix): t for k, t in self._group("weights").items() if k.startswith(prefix)}

    def check(self, name: str, found: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """Compare with ``outputs/NAME`` (only rows ``where`` it is True) within the case's own tolerance."""
        wanted = self.outputs[name]
        found = found.detach()
        if where is not None:
            found, wanted = found[where], wanted[where]
        assert found.shape == wanted.shape, name
        atol = self._atol(name) if wanted.is_floating_point() else 0
        error = (found.double() - wanted.double()).abs().max().item() if wanted.numel() else 0.0
        print(f"{self.path.stem}: {name}: {error:.1e} of {atol:g}")
        assert error <= atol, f"{name}: {error:.3e} is more than {atol:g}"

    def _atol(self, name: str) -> float:
        """One number for the case, or one for each kind of output (``<sound>.<kind>``)."""
        atol = self.spec["suggested_atol"]
        return atol[name.rpartition(".")[2]] if isinstance(atol, dict) else atol
