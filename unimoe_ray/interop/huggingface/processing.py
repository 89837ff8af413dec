"""Text and decoded media to what the model takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from unimoe_ray.config.model import PLACEHOLDER_IDS, ModelConfig
from unimoe_ray.data.batch import expand
from unimoe_ray.data.schema import PLACEHOLDER, Media, Sample
from unimoe_ray.data.template import make_template
from unimoe_ray.data.tokenizer import ASSISTANT, CHATML_START
from unimoe_ray.interop.huggingface.configuration import UniMoEConfig
from unimoe_ray.interop.huggingface.towers import towers_without_weights
from unimoe_ray.model.connectors import Connector, build_connector
from unimoe_ray.model.towers import FrozenTower

Conversation = str | Sequence[tuple[str, str]]
"""A question, or (question, answer) turns, of which the last answer is empty."""
Video = list[Image.Image]


class UniMoEProcessor(ProcessorMixin):
    """Its towers and connectors have no weights: they preprocess media and count soft tokens.

    spec: of the model, ``UniMoEConfig``'s model, feature_dims and towers
    template: by the names of ``data.template``
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        spec: dict[str, Any],
        template: str = "compact",
        chat_template: str | None = None,
    ):
        super().__init__(tokenizer, chat_template=chat_template)
        self.spec = spec
        self.template = template

    @classmethod
    def of(cls, config: UniMoEConfig, tokenizer: PreTrainedTokenizerBase) -> UniMoEProcessor:
        """With the template that the tokenizer has the tokens for."""
        spec = {name: getattr(config, name) for name in ("model", "feature_dims", "towers")}
        vocab = tokenizer.get_vocab()
        names = [name for token, name in ((ASSISTANT, "compact"), (CHATML_START, "smollm2")) if token in vocab]
        return cls(tokenizer, spec, *names or ["vicuna_v1"])

    def __call__(
        self,
        text: Conversation | list[Conversation],
        images: Image.Image | list[Image.Image] = (),
        videos: Video | list[Video] = (),
        audio: np.ndarray | list[np.ndarray] = (),
        speech: np.ndarray | list[np.ndarray] = (),
    ) -> BatchFeature:
        """Prompts, one or a batch, whose ``<image> <video> <audio> <speech>`` stand for the files of that kind, in
        order over the batch: RGB pictures, the frames of a video (as many as the model takes), waveforms [samples] at
        16 kHz.

        Returns ``input_ids`` and ``attention_mask`` [B, S] int64, padded on the left, with one placeholder id per soft
        token, and ``<kind>_values``: of each file its tower's input windows [W, ...]. Raises ValueError where
        placeholders and files don't match, or a prompt is longer than the model can take.
        """
        conversations = text if _is_batch(text) else [text]
        files = {
            "image": [images] if isinstance(images, Image.Image) else list(images),
            "video": [videos] if videos and isinstance(videos[0], Image.Image) else list(videos),
            "audio": [audio] if isinstance(audio, np.ndarray) else list(audio),
            "speech": [speech] if isinstance(speech, np.ndarray) else list(speech),
        }
        for video in files["video"]:
            if len(video) != self._settings.video.frames:
                raise ValueError(f"a video of {len(video)} frames; this model takes {self._settings.video.frames}")
        counts = {kind: iter([self._soft_tokens(kind, item) for item in items]) for kind, items in files.items()}
        rows = [self._encode(conversation, counts) for conversation in conversations]
        for kind, left in counts.items():
            if rest := len(list(left)):
                raise ValueError(f"{kind}: {len(files[kind])} files for {len(files[kind]) - rest} placeholders")
        width = max(len(row) for row in rows)
        ids, mask = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(2))
        for index, row in enumerate(rows):
            ids[index, width - len(row) :] = torch.tensor(row)
            mask[index, width - len(row) :] = 1
        values = {
            f"{kind}_values": [torch.from_numpy(self._tower(kind).preprocess(item)) for item in items]
            for kind, items in files.items()
            if items
        }
        return BatchFeature({"input_ids": ids, "attention_mask": mask} | values)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", *(f"{kind}_values" for kind in PLACEHOLDER_IDS)]

    def _encode(self, conversation: Conversation, counts: dict[str, Iterable[int]]) -> list[int]:
        """Ids of one prompt, soft tokens included; takes its files' counts."""
        turns = ((conversation, ""),) if isinstance(conversation, str) else tuple(map(tuple, conversation))
        kinds = [kind for question, _ in turns for kind in PLACEHOLDER.findall(question)]
        soft_tokens = [next(counts[kind], None) for kind in kinds]
        if None in soft_tokens:
            raise ValueError(f"more <{kinds[soft_tokens.index(None)]}> placeholders than files")
        sample = Sample("prompt", "prompt", turns, tuple(Media(kind, ()) for kind in kinds), {})
        ids = make_template(self.template, self._tokenizer).encode_prompt(sample)
        spliced, _ = expand(ids, None, soft_tokens)
        limit = self._settings.language.max_positions
        if len(spliced) >= limit:
            raise ValueError(f"a prompt has {len(spliced)} tokens, soft ones included; at most {limit - 1} fit")
        return spliced

    def _soft_tokens(self, kind: str, item: Any) -> int:
        return self._connectors[kind].soft_tokens(self._tower(kind).tokens_for(item))

    def _tower(self, kind: str) -> FrozenTower:
        return self._towers["image" if kind == "video" else kind]

    @cached_property
    def _settings(self) -> ModelConfig:
        return ModelConfig.model_validate(self.spec["model"])

    @cached_property
    def _towers(self) -> dict[str, FrozenTower]:
        return towers_without_weights(self.spec["towers"])

    @cached_property
    def _connectors(self) -> dict[str, Connector]:
        settings, hidden = self._settings, self._settings.language.hidden_size
        with torch.device("meta"):
            return {
                kind: build_connector(kind, dim, hidden, settings.connector_of(kind), settings.video)
                for kind, dim in self.spec["feature_dims"].items()
            }

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        """Special tokens written in a text are plain characters, never control."""
        tokenizer = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        tokenizer.encode_special_tokens = True
        return tokenizer


def _is_batch(text: Conversation | list[Conversation]) -> bool:
    """A conversation is a text, or turns that are pairs of texts."""
    if isinstance(text, str):
        return False
    return isinstance(text[0], str) or not isinstance(text[0][0], str)
