"""Conversations to token ids and labels in the Vicuna v1.1 template of LLaVA-1.5 and Uni-MoE::

    <s> SYSTEM USER: question ASSISTANT: answer</s>USER: question ASSISTANT: answer</s>

Media placeholders stay where the text has them. The text between two of them, or before the first, is tokenised on its
own, so that LLaMA's tokenizer puts a space before it. Answers and their ``</s>`` are labelled.
"""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import Tokenizer

from unimoe_ray.config.model import IGNORE_INDEX, PLACEHOLDER_IDS
from unimoe_ray.data.prompt import Encoded
from unimoe_ray.data.schema import PLACEHOLDER, Media, Sample
from unimoe_ray.data.tokenizer import BOS, EOS

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class VicunaTemplate:
    """``tokenizer``: LLaMA's, which puts a space before every text that it encodes.

    ``legacy``: the flag of the checkpoint's ``tokenizer_config.json``. With it, text after a ``</s>`` gets such a space
    too; without it, it does not.
    """

    def __init__(self, tokenizer: Tokenizer, legacy: bool = True):
        self.tokenizer = tokenizer
        self.legacy = legacy
        self.bos, self.eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)

    def encode_sample(self, sample: Sample) -> Encoded:
        """All turns, answers labelled."""
        ids, labels = [self.bos], [IGNORE_INDEX]
        media = iter(sample.media)
        for number, (question, answer) in enumerate(sample.turns):
            done, last, continued = self._instruction(number, question, media)
            instruction = self._text(last, continued)
            # The answer is tokenised with the text before it: "ASSISTANT:" is where the labels begin.
            reply = [*self._text(f"{last} {answer}", continued)[len(instruction) :], self.eos]
            ids += done + instruction + reply
            labels += [IGNORE_INDEX] * (len(done) + len(instruction)) + reply
        return Encoded(ids, labels)

    def encode_prompt(self, sample: Sample) -> list[int]:
        """The conversation up to the place where the last answer begins (``ASSISTANT:``); that answer is left out."""
        *earlier, (question, _) = sample.turns
        used = sum(len(PLACEHOLDER.findall(asked)) for asked, _ in earlier)
        before = self.encode_sample(Sample(sample.id, sample.task, tuple(earlier), sample.media[:used], {})).ids
        done, last, continued = self._instruction(len(earlier), question, iter(sample.media[used:]))
        return before + done + self._text(last, continued)

    def _instruction(self, number: int, question: str, media: Iterator[Media]) -> tuple[list[int], str, bool]:
        """The ids up to and with the last placeholder, the text after it up to ``ASSISTANT:``, and whether that text
        continues an earlier turn."""
        text = f"{'' if number else f'{SYSTEM} '}USER: {question} ASSISTANT:"
        ids: list[int] = []
        position, continued = 0, number > 0
        for match in PLACEHOLDER.finditer(text):
            ids += self._text(text[position : match.start()], continued)
            ids.append(PLACEHOLDER_IDS[next(media).kind])
            position, continued = match.end(), False
        return ids, text[position:], continued

    def _text(self, text: str, continued: bool) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if continued and not self.legacy:
            # As the slow tokenizer of transformers does it: the space is cut off the first piece.
            first = self.tokenizer.id_to_token(ids[0]).removeprefix("▁")
            ids = [self.tokenizer.token_to_id(first)] * bool(first) + ids[1:]
        return ids
