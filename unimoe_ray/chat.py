"""Talking to a trained run: files through the frozen towers, a conversation, greedy answers."""

from __future__ import annotations

from pathlib import Path

from unimoe_ray.config import Config
from unimoe_ray.data.features import TOWER_OF, decode_media, encode_files
from unimoe_ray.data.media import BadMedia
from unimoe_ray.data.prompt import encode_prompt, plain_text
from unimoe_ray.data.samples import PreparedSample
from unimoe_ray.data.schema import Media, Sample
from unimoe_ray.data.store import StoredFeatures
from unimoe_ray.errors import UnimoeError, UsageError
from unimoe_ray.evaluation.answer import answer
from unimoe_ray.towers import load_towers
from unimoe_ray.training.checkpoint import check_tower, load_model


class Conversation:
    """Keeps the turns and the features of all media so far; every file is encoded once."""

    def __init__(self, config: Config, model_dir: Path):
        self._config = config
        self._model, info, self._tokenizer = load_model(model_dir)
        self._towers = load_towers(config)
        for modality in info.towers:
            check_tower(model_dir, info, modality, self._towers[TOWER_OF[modality]])
        self._turns: list[tuple[str, str]] = []
        self._media: list[Media] = []
        self._features: dict[str, StoredFeatures] = {}

    def ask(self, text: str, media: list[Media]) -> str:
        """One question about the conversation so far and these files. Raises UnimoeError for a file that can't be read,
        UsageError when the conversation is longer than the model can take."""
        if not text.strip() and not media:
            raise UsageError("nothing to answer: give a question or a file")
        encoded = {f"{item.kind}/{len(self._media) + i}": self._encode(item) for i, item in enumerate(media)}
        question = "\n".join([*(f"<{item.kind}>" for item in media), plain_text(text)])
        turns = (*self._turns, (question, ""))
        sample = Sample("chat", "chat", turns, (*self._media, *media), {})
        features = self._features | encoded
        names = [f"{item.kind}/{i}" for i, item in enumerate(sample.media)]
        counts = [self._soft_tokens(name, features[name]) for name in names]
        prompt = PreparedSample("chat", "chat", sample.group, encode_prompt(sample, self._tokenizer), [], names, counts)
        limit, new = self._config.model.language.max_positions, self._config.evaluation.max_new_tokens
        if prompt.length + new > limit:
            raise UsageError(f"the conversation has {prompt.length} tokens; at most {limit - new} fit, start a new one")
        reply = answer(self._model, self._tokenizer, [prompt], features.__getitem__, batch_size=1, max_new_tokens=new)[
            0
        ]
        self._turns.append((question, reply))
        self._media += media
        self._features = features
        return reply

    def _encode(self, item: Media) -> StoredFeatures:
        try:
            decoded = decode_media(item, self._config.model.video.frames, self._config.data)
        except BadMedia as error:
            raise UnimoeError(str(error)) from None
        return encode_files(self._towers[TOWER_OF[item.kind]], [decoded])[0]

    def _soft_tokens(self, name: str, features: StoredFeatures) -> int:
        return self._model.connectors[name.split("/")[0]].soft_tokens(features.lengths)
