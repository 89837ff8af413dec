"""What ``config.json`` holds."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from unimoe_ray.config.model import ModelConfig
from unimoe_ray.interop.huggingface.towers import describe_tower
from unimoe_ray.interop.language import with_sizes
from unimoe_ray.model.towers import FrozenTower
from unimoe_ray.model.unimoe import UniMoE


class UniMoEConfig(PreTrainedConfig):
    """Everything that decides the architecture, so that loading reads no other folder.

    model: a ``ModelConfig`` whose language model has its sizes written out
    feature_dims: feature dim D of each modality's tower
    sparse: whether the language model's layers are mixtures already
    towers: by modality, what ``build_tower`` takes
    """

    model_type = "unimoe"

    model: dict[str, Any] | None = None
    vocab_size: int = 0
    feature_dims: dict[str, int] | None = None
    sparse: bool = False
    towers: dict[str, dict[str, Any]] | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @classmethod
    def of(cls, model: UniMoE, towers: dict[str, FrozenTower], sparse: bool) -> UniMoEConfig:
        """Of an existing model. Raises UnimoeError when its language model has settings that ours can't write."""
        llama = model.language.config
        settings = with_sizes(model)
        return cls(
            model=settings.model_dump(mode="json"),
            vocab_size=llama.vocab_size,
            feature_dims=feature_dims(towers),
            sparse=sparse,
            towers={modality: describe_tower(tower) for modality, tower in towers.items()},
            tie_word_embeddings=llama.tie_word_embeddings,
            bos_token_id=llama.bos_token_id,
            eos_token_id=llama.eos_token_id,
            pad_token_id=llama.pad_token_id,
        )

    @property
    def settings(self) -> ModelConfig:
        return ModelConfig.model_validate(self.model)


def feature_dims(towers: dict[str, FrozenTower]) -> dict[str, int]:
    """Videos go to the image tower, frame by frame."""
    dims = {modality: tower.feature_dim for modality, tower in towers.items()}
    return dims | {"video": dims["image"]}
