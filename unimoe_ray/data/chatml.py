"""Conversations to token ids and labels in the ChatML template, as SmolLM2 was trained with it::

    <|im_start|>system
    SYSTEM<|im_end|>
    <|im_start|>user
    question<|im_end|>
    <|im_start|>assistant
    answer<|im_end|>

Without media the ids are those of the model's own template in transformers. Media placeholders stay where the text has
them; the text on either side is tokenised on its own. Answers and their ``<|im_end|>`` are labelled.
"""

from __future__ import annotations

from tokenizers import Tokenizer

from unimoe_ray.config.model import IGNORE_INDEX, PLACEHOLDER_IDS
from unimoe_ray.data.prompt import Encoded
from unimoe_ray.data.schema import PLACEHOLDER, Media, Sample
from unimoe_ray.data.tokenizer import CHATML_END, CHATML_START

SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


class ChatMLTemplate:
    """``tokenizer``: one that has ``<|im_start|>`` and ``<|im_end|>``; both written in a text are plain characters."""

    def __init__(self, tokenizer: Tokenizer, system: str):
        self.tokenizer = tokenizer
        self.system = system
        self.start, self.end = tokenizer.token_to_id(CHATML_START), tokenizer.token_to_id(CHATML_END)

    def encode_sample(self, sample: Sample) -> Encoded:
        """All turns, answers labelled."""
        media = iter(sample.media)
        ids = self._system()
        labels = [IGNORE_INDEX] * len(ids)
        for question, answer in sample.turns:
            asked = self._question(question, media)
            reply, labelled = self._answer(answer)
            ids += asked + reply
            labels += [IGNORE_INDEX] * len(asked) + labelled
        return Encoded(ids, labels)

    def encode_prompt(self, sample: Sample) -> list[int]:
        """The conversation up to the place where the last answer begins; that answer is left out."""
        *earlier, (question, _) = sample.turns
        media = iter(sample.media)
        ids = self._system()
        for asked, answer in earlier:
            ids += self._question(asked, media) + self._answer(answer)[0]
        return [*ids, *self._question(question, media), self.start, *self._text("assistant\n")]

    def _system(self) -> list[int]:
        return [self.start, *self._text(f"system\n{self.system}"), self.end, *self._text("\n")]

    def _question(self, question: str, media) -> list[int]:
        text = f"user\n{question}"
        ids, position = [self.start], 0
        for match in PLACEHOLDER.finditer(text):
            item: Media = next(media)
            ids += [*self._text(text[position : match.start()]), PLACEHOLDER_IDS[item.kind]]
            position = match.end()
        return [*ids, *self._text(text[position:]), self.end, *self._text("\n")]

    def _answer(self, answer: str) -> tuple[list[int], list[int]]:
        """Ids and labels of an assistant's turn. A token with a character of the answer in it is the answer's."""
        head = "assistant\n"
        encoding = self.tokenizer.encode(head + answer, add_special_tokens=False)
        learned = [
            token if end > len(head) else IGNORE_INDEX
            for token, (_, end) in zip(encoding.ids, encoding.offsets, strict=True)
        ]
        after = self._text("\n")
        ids = [self.start, *encoding.ids, self.end, *after]
        return ids, [IGNORE_INDEX, *learned, self.end, *[IGNORE_INDEX] * len(after)]

    def _text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids
