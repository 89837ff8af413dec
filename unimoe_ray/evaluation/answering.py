"""Questions of a benchmark to answers: media through towers and connectors, prompts through the inference engine."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unimoe_ray.config import parse
from unimoe_ray.data.features import TOWER_OF, decode_media, encode_files
from unimoe_ray.data.locations import BadMedia
from unimoe_ray.data.schema import PLACEHOLDER, Media, Sample
from unimoe_ray.data.shorten import shorten
from unimoe_ray.evaluation.benchmarks.base import Decoding, Question
from unimoe_ray.inference.engine import Engine
from unimoe_ray.inference.request import GenerationRequest, RequestRefused, SamplingParams
from unimoe_ray.inference.soft_tokens import soft_tokens
from unimoe_ray.model.features import Tower
from unimoe_ray.towers import load_tower
from unimoe_ray.training.checkpoint import check_tower, load_model

# Files encoded together, and files whose soft tokens are kept: questions about one picture follow each other.
ENCODE_FILES, KEPT_FILES = 16, 128


@dataclass(frozen=True)
class Reply:
    """tokens: generated; cut: whether the answer was longer than allowed; fault: why there is no answer, else ''."""

    answer: str = ""
    tokens: int = 0
    cut: bool = False
    fault: str = ""


class Answerer:
    """The model of a folder, as a Ray actor. ``config`` is the run's; ``serving.engine`` has the engine's settings."""

    def __init__(self, config: dict[str, Any], model_dir: str, decoding: Decoding, on_gpu: bool):
        self._run = parse(config)
        self._folder = Path(model_dir)
        self._decoding = decoding
        if not on_gpu:
            torch.set_num_threads(1)
        self._device = "cuda" if on_gpu else "cpu"
        self._model, self._info, tokenizer = load_model(self._folder)
        settings = self._run.serving.engine
        in_bf16 = settings.precision == "bf16" or (settings.precision == "auto" and on_gpu)
        self._model.to(self._device, torch.bfloat16 if in_bf16 else torch.float32)
        self._engine = Engine(self._model, tokenizer, settings)
        self._template = self._info.make_template(tokenizer)
        self._towers: dict[str, Tower] = {}
        self._kept: OrderedDict[Media, np.ndarray] = OrderedDict()
        self._decoders = ThreadPoolExecutor(4, thread_name_prefix="decode")

    def answer(self, questions: Sequence[Question]) -> list[Reply]:
        """One reply for each, in order."""
        replies: list[Reply | None] = [None] * len(questions)
        soft = self._soft_tokens(list(dict.fromkeys(item for q in questions for item in q.media)))
        for row, question in enumerate(questions):
            broken = [value for item in question.media if isinstance(value := soft[item], str)]
            try:
                if broken:
                    raise RequestRefused(broken[0])
                request = self._request(str(row), question, [soft[item] for item in question.media])
                self._engine.add(self._engine.start(request))
            except RequestRefused as refused:
                replies[row] = Reply(fault=str(refused))
        texts, tokens = [""] * len(questions), [0] * len(questions)
        while self._engine.has_work:
            for output in self._engine.step():
                row = int(output.request_id)
                texts[row] += output.text
                tokens[row] += len(output.token_ids)
                if output.finish_reason == "error":
                    replies[row] = Reply(fault=output.error or "the engine gave up")
                elif output.finish_reason is not None:
                    replies[row] = Reply(texts[row], tokens[row], output.finish_reason == "length")
        return [reply or Reply(fault="the engine gave no answer") for reply in replies]

    def _soft_tokens(self, media: list[Media]) -> dict[Media, np.ndarray | str]:
        """[M, H] of each file, or why it can't be used."""
        found: dict[Media, np.ndarray | str] = {item: self._kept[item] for item in media if item in self._kept}
        new = [item for item in media if item not in found]
        for kind in dict.fromkeys(item.kind for item in new):
            files = [item for item in new if item.kind == kind]
            for first in range(0, len(files), ENCODE_FILES):
                found |= self._encode(kind, files[first : first + ENCODE_FILES])
        for item, values in found.items():
            if not isinstance(values, str):
                self._kept[item] = values
                self._kept.move_to_end(item)
        while len(self._kept) > KEPT_FILES:
            self._kept.popitem(last=False)
        return found

    def _encode(self, kind: str, files: list[Media]) -> dict[Media, np.ndarray | str]:
        decoded = dict(zip(files, self._decoders.map(self._decode, files), strict=True))
        good = [item for item in files if not isinstance(decoded[item], BadMedia)]
        result: dict[Media, np.ndarray | str] = {
            item: str(value) for item, value in decoded.items() if isinstance(value, BadMedia)
        }
        if good:
            features = encode_files(self._tower(kind), [decoded[item] for item in good])
            result |= zip(good, soft_tokens(self._model.connectors[kind], kind, features), strict=True)
        return result

    def _decode(self, item: Media) -> Any:
        try:
            return decode_media(item, self._run.model.video.frames, self._run.data)
        except BadMedia as error:
            return error

    def _tower(self, kind: str) -> Tower:
        name = TOWER_OF[kind]
        if name not in self._towers:
            tower = load_tower(self._run, name).to(self._device)
            check_tower(self._folder, self._info, kind, tower)
            self._towers[name] = tower
        return self._towers[name]

    def _request(self, name: str, question: Question, soft: list[np.ndarray]) -> GenerationRequest:
        """Raises RequestRefused."""
        if len(PLACEHOLDER.findall(question.prompt)) != len(question.media):
            raise RequestRefused(f"the prompt has another number of media placeholders than the {len(soft)} files")
        sample = Sample(question.id, "", ((question.prompt, ""),), question.media, {})
        most = self._engine.max_positions
        taken = sum(map(len, soft)) - len(soft)

        def ids_of(part: Sample) -> list[int]:
            return self._template.encode_prompt(part)

        ids = ids_of(sample)
        if len(ids) + taken >= most and self._run.data.too_long == "shorten":
            keep = most - min(self._decoding.max_new_tokens, self._run.evaluation.max_new_tokens)
            if shorter := shorten(sample, lambda part: len(ids_of(part)) + taken <= keep, keep_turns=True):
                ids = ids_of(shorter.sample)
        new = max(1, min(self._decoding.max_new_tokens, most - len(ids) - taken))
        seed = int.from_bytes(hashlib.blake2b(question.id.encode(), digest_size=7).digest())
        params = SamplingParams(max_new_tokens=new, temperature=self._decoding.temperature, seed=seed)
        return GenerationRequest(name, ids, soft, params)
