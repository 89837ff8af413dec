"""Talking to a trained run: files through the frozen towers, a conversation, greedy answers."""

from __future__ import annotations

from pathlib import Path

from unimoe_ray.config import Config
from unimoe_ray.data.features import TOWER_OF, decode_media, encode_files
from unimoe_ray.data.media import BadMedia
from unimoe_ray.data.prompt import plain_text
from unimoe_ray.data.samples import PreparedSample
from unimoe_ray.data.schema import Media, Sample
from unimoe_ray.data.shorten import shorten
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
        self._template = info.make_template(self._tokenizer)
        self._towers = load_towers(config)
        for modality in info.towers:
            check_tower(model_dir, info, modality, self._towers[TOWER_OF[modality]])
        self._turns: list[tuple[str, str]] = []
        self._media: list[Media] = []
        self._features: dict[str, StoredFeatures] = {}
        self.note = ""

    def ask(self, text: str, media: list[Media]) -> str:
        """One question about the conversation so far and these files; ``note`` then says what of it was left out, if
        anything. Raises UnimoeError for a file that can't be read, UsageError when the conversation is longer than the
        model can take."""
        if not text.strip() and not media:
            raise UsageError("nothing to answer: give a question or a file")
        encoded = {f"{item.kind}/{len(self._media) + i}": self._encode(item) for i, item in enumerate(media)}
        question = "\n".join([*(f"<{item.kind}>" for item in media), plain_text(text)])
        turns = (*self._turns, (question, ""))
        sample = Sample("chat", "chat", turns, (*self._media, *media), {})
        features = self._features | encoded
        new = self._config.evaluation.max_new_tokens
        prompt = self._prompt(sample, features, self._model.max_positions - new)
        reply = answer(self._model, self._tokenizer, [prompt], features.__getitem__, batch_size=1, max_new_tokens=new)[
            0
        ]
        self._turns.append((question, reply))
        self._media += media
        self._features = features
        return reply

    def _prompt(self, sample: Sample, features: dict[str, StoredFeatures], room: int) -> PreparedSample:
        names = [f"{item.kind}/{i}" for i, item in enumerate(sample.media)]
        counts = [self._soft_tokens(name, features[name]) for name in names]

        def tokenise(part: Sample) -> PreparedSample:
            ids, gone = self._template.encode_prompt(part), len(names) - len(part.media)
            return PreparedSample("chat", "chat", part.group, ids, [], names[gone:], counts[gone:])

        prompt, self.note = tokenise(sample), ""
        if prompt.length > room:
            shorter = None
            if self._config.data.too_long == "shorten":
                shorter = shorten(sample, lambda part: tokenise(part).length <= room, keep_turns=False)
            if shorter is None:
                raise UsageError(f"the conversation has {prompt.length} tokens; at most {room} fit, start a new one")
            prompt, self.note = tokenise(shorter.sample), shorter.note
        return prompt

    def _encode(self, item: Media) -> StoredFeatures:
        try:
            decoded = decode_media(item, self._config.model.video.frames, self._config.data)
        except BadMedia as error:
            raise UnimoeError(str(error)) from None
        return encode_files(self._towers[TOWER_OF[item.kind]], [decoded])[0]

    def _soft_tokens(self, name: str, features: StoredFeatures) -> int:
        return self._model.connectors[name.split("/")[0]].soft_tokens(features.lengths)
