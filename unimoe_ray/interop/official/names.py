"""What a tensor is called in the official code, and what here.

Ours begin with ``language.`` and ``connectors.<modality>.``; after that they are the official ones wherever there is
one (``model.connectors``, ``model.language``).
"""

from __future__ import annotations

import re

PROJECTOR = "model.mm_projector."
ALIGNER = "model.mm_audio_aligner."
QUERIES = "model.query_tokens"  # of speech; a Q-Former's are inside the aligner
VISION_TOWER = "model.vision_tower.vision_tower.vision_model."
AUDIO_TOWER = "model.audio_tower.audio_tower."
IMAGE, VIDEO = "connectors.image.projection.", "connectors.video.projection."
UNUSED_TABLE = f"{ALIGNER}decoder.audio_decoder.embed_tokens.weight"
LANGUAGE = ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")
# How the official code tells its two kinds of aligner apart, and what they listen to.
ALIGNER_OF = {f"{ALIGNER}qformer.": "audio", f"{ALIGNER}decoder.": "speech"}

_IGNORED = (
    (re.compile(r"rotary_emb\.inv_freq$"), "a constant of the rotary embedding, computed here"),
    (re.compile(r"embeddings\.position_ids$"), "the numbers 0, 1, 2, ..."),
    (re.compile(re.escape(UNUSED_TABLE)), "the decoder's token table, which the official code never uses"),
    (re.compile(r"^model\.audio_tower\.(encoder|decoder)\."), "a random Whisper beside the real one, never used"),
    (re.compile(r"^model\.vision_tower\."), "of the CLIP tower, which stays a model of its own"),
    (re.compile(r"^model\.audio_tower\."), "of the sound or speech tower, which stays a model of its own"),
)


def why_ignored(name: str) -> str | None:
    """Why the model does without this official tensor; None if it does not."""
    return next((reason for pattern, reason in _IGNORED if pattern.search(name)), None)


def aligner_modality(names) -> str | None:
    """Whether tensors of one checkpoint hold the aligner of ``audio`` or ``speech``, or none."""
    return next((kind for name in names for prefix, kind in ALIGNER_OF.items() if name.startswith(prefix)), None)


def ours(name: str, modality: str | None) -> list[str]:
    """Our names of an official tensor: the image projector is also that of videos, so it has two. ``modality``: whose
    the aligner is. Empty for a name that is not known."""
    if name.startswith(PROJECTOR):
        part = name.removeprefix(PROJECTOR)
        return [IMAGE + part, VIDEO + part]
    if name == QUERIES:
        return ["connectors.speech.query_tokens"]
    if name.startswith(ALIGNER) and modality is not None:
        return [f"connectors.{modality}.{name.removeprefix(ALIGNER)}"]
    if name.startswith(LANGUAGE):
        return [f"language.{name}"]
    return []


def official(name: str) -> str:
    """The official name of one of our tensors."""
    if name.startswith("language."):
        return name.removeprefix("language.")
    _, modality, part = name.split(".", 2)
    if modality in ("image", "video"):
        return PROJECTOR + part.removeprefix("projection.")
    return QUERIES if (modality, part) == ("speech", "query_tokens") else ALIGNER + part


def strip_wrappers(name: str) -> str:
    """Without what peft and the official trainer put before a name: ``base_model.model.model.`` is ``model.``."""
    name = name.removeprefix("base_model.").replace(".base_layer.", ".")
    return name.removeprefix("model.") if name.startswith(("model.model.", "model.lm_head.")) else name
