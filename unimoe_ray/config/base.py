"""The strict base of every configuration model."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Strict(BaseModel):
    """Unknown keys are errors; values are validated on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    @model_validator(mode="before")
    @classmethod
    def _keep_other_defaults(cls, tree: Any) -> Any:
        """A key below a section leaves the section's other defaults, which may be its own, as they are."""
        if not isinstance(tree, dict):
            return tree
        filled = dict(tree)
        for name, field in cls.model_fields.items():
            if isinstance(tree.get(name), dict) and isinstance(field.default, BaseModel):
                filled[name] = field.default.model_dump(exclude_unset=True) | tree[name]
        return filled
