"""Every case in the folder named by UNIMOE_GOLDEN (default ../shared/golden, beside the repository): outputs of the
official code on small random configurations. Nothing here knows a case's sizes; they are in its own JSON."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.golden import connectors, end_to_end, language, official_8e, splicing, text, towers
from tests.golden.case import Case

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / os.environ.get("UNIMOE_GOLDEN", "../shared/golden")

CHECKS: dict[str, Callable[[Case], None]] = {
    "beats_fbank": towers.beats_fbank,
    "beats_encoder": towers.beats_encoder,
    "audio_aligner_qformer": connectors.audio_aligner_qformer,
    "speech_aligner_whisper_decoder": connectors.speech_aligner_whisper_decoder,
    "mm_projector_mlp2x_gelu": connectors.mm_projector_mlp2x_gelu,
    "video_pooling": connectors.video_pooling,
    "moe_layer_4e_top2": language.moe_layer_4e_top2,
    "llama_moe_interleaved": language.llama_moe,
    "llama_moe_all": language.llama_moe,
    "multimodal_splice": splicing.multimodal_splice,
    "end_to_end_audio": end_to_end.end_to_end_audio,
    "end_to_end_speech": end_to_end.end_to_end_speech,
    "gate_8e_top2_aux": official_8e.gate_8e_top2_aux,
    "moe_layer_8e_lora": official_8e.moe_layer_8e_lora,
    "losses_8e": official_8e.losses_8e,
    "tokenise_and_label": text.tokenise_and_label,
}
# Cases that nothing here checks yet, with the reason.
NOT_YET: dict[str, str] = {}


def found() -> list:
    paths = sorted(FOLDER.glob("*.json"))
    if not paths:
        reason = f"no golden cases in {FOLDER} (UNIMOE_GOLDEN names another folder)"
        return [pytest.param(None, id="no-cases", marks=pytest.mark.skip(reason=reason))]
    return [pytest.param(path, id=path.stem) for path in paths]


def kind_of(path: Path) -> str | None:
    """The longest known name that a case's name is or begins with: there may be several cases of one kind."""
    known = [name for name in (*CHECKS, *NOT_YET) if path.stem == name or path.stem.startswith(f"{name}_")]
    return max(known, key=len, default=None)


@pytest.mark.parametrize("path", found())
def test_case(path: Path) -> None:
    kind = kind_of(path)
    if kind is None:
        pytest.fail(f"{path.stem}: no check is known for this case")
    if kind in NOT_YET:
        pytest.skip(NOT_YET[kind])
    CHECKS[kind](Case(path))
