"""Questions on combinations of media that no training sample of the mini suite has, made of its held-out files.

Known are: an image, a sound, a clip, speech, each alone; an image with a spoken question; a clip with its sound. New:

| task                      | media          | asked                                    |
|---------------------------|----------------|------------------------------------------|
| image_and_sound           | image, sound   | about both at once                       |
| image_beside_sound        | image, sound   | about the image                          |
| sound_beside_image        | image, sound   | about the sound                          |
| speech_beside_sound       | speech, sound  | about the speech                         |
| spoken_question_on_video  | video, speech  | the colour or shape of what moves, aloud |
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unimoe_ray.data.samples import PreparedSample
from unimoe_ray.data.schema import Media, Sample
from unimoe_ray.data.template import Template
from unimoe_ray.mini.speech_tasks import SPOKEN_QUESTIONS

HEAR, SAID, ALOUD, MOVING = "what do you hear", "what was said", "answer the question", "what is moving"
NEEDED = ("spoken_question", "spoken_word", "sound_event", "video_object")


@dataclass(frozen=True)
class Combined:
    """A question; media: (row, kind) of held-out samples whose file of that kind is shown, in this order."""

    task: str
    question: str
    expected: str
    media: tuple[tuple[int, str], ...]

    @property
    def group(self) -> str:
        """As ``schema.Sample.group``."""
        return "+".join(sorted({kind for _, kind in self.media}))


def combine(
    asked: Mapping[int, Mapping[str, Any]], count: int, trained: Collection[str] = (), seed: int = 0
) -> list[tuple[Combined, Combined | None]]:
    """``count`` of each task, of held-out records by row (``prepare.held_out_records``); beside each, where there is
    one, a question on one of its files alone, as in training. trained: modality groups that training had, which are
    left out. Nothing where tasks are missing."""
    rows = {task: sorted(row for row, record in asked.items() if record["task"] == task) for task in NEEDED}
    if not all(rows.values()):
        return []
    chooser = random.Random(seed)

    def drawn(task: str) -> list[int]:
        return [row for _ in range(-(-count // len(rows[task]))) for row in chooser.sample(rows[task], len(rows[task]))]

    found: list[tuple[Combined, Combined | None]] = []
    for aloud, word, sound, clip in list(zip(*map(drawn, NEEDED), strict=False))[:count]:
        question, answer = _spoken(asked[aloud]), asked[aloud]["answer"]
        event, phrase = asked[sound]["answer"], asked[word]["answer"]
        colour, shape = asked[clip]["answer"].rsplit(" ", 1)
        image, heard, speech = (aloud, "image"), (sound, "audio"), (word, "speech")
        alone = {
            "image": Combined("image_vqa", question, answer, (image,)),
            "sound": Combined("sound_event", HEAR, event, (heard,)),
            "speech": Combined("spoken_word", SAID, phrase, (speech,)),
            "clip": Combined("video_object", MOVING, asked[clip]["answer"], ((clip, "video"),)),
        }
        both, part = (image, heard), shape if "shape is" in question else colour
        found += [
            (Combined("image_and_sound", f"{question} and {HEAR}", f"{answer} {event}", both), None),
            (Combined("image_beside_sound", question, answer, both), alone["image"]),
            (Combined("sound_beside_image", HEAR, event, both), alone["sound"]),
            (Combined("speech_beside_sound", SAID, phrase, (speech, heard)), alone["speech"]),
            (
                Combined("spoken_question_on_video", ALOUD, part, ((clip, "video"), (aloud, "speech"))),
                alone["clip"],
            ),
        ]
    return [(item, known) for item, known in found if item.group not in trained]


def as_prompt(item: Combined, samples: Mapping[int, PreparedSample], template: Template) -> PreparedSample:
    """``samples``: the prepared ones of the rows that it names."""
    keys, counts = [], []
    for row, kind in item.media:
        place = next(i for i, key in enumerate(samples[row].media) if key.startswith(f"{kind}/"))
        keys.append(samples[row].media[place])
        counts.append(samples[row].soft_tokens[place])
    kinds = [kind for _, kind in item.media]
    placeholders = "".join(f"<{kind}>\n" for kind in kinds)
    media = tuple(Media(kind, (key,)) for kind, key in zip(kinds, keys, strict=True))
    sample = Sample(item.task, item.task, ((placeholders + item.question, ""),), media, {})
    ids = template.encode_prompt(sample)
    return PreparedSample(item.task, item.task, sample.group, ids, [-100] * len(ids), keys, counts)


def _spoken(record: Mapping[str, Any]) -> str:
    """What is asked aloud in a record of spoken_question: its file is named so."""
    (path,) = (item["path"] for item in record["media"] if item["kind"] == "speech")
    return next(question for question in SPOKEN_QUESTIONS if question.replace(" ", "_") in path)


def media_names(items: Sequence[Combined]) -> dict[str, str]:
    """``image + sound`` of each task, in the order of the questions."""
    return {item.task: " + ".join(kind for _, kind in item.media) for item in items}
