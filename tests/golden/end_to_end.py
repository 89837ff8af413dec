"""The whole model: pixels, sounds and ids to every stage, logits and loss."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tests.golden.case import Case
from tests.golden.language import watch_routers, without_buffers
from tests.golden.splicing import expand_rows, unpadded
from unimoe_ray.config.model import PLACEHOLDER_IDS, VideoConfig
from unimoe_ray.convert import import_official
from unimoe_ray.data.tokenizer import train_tokenizer
from unimoe_ray.interop.official import names
from unimoe_ray.model.features import Features
from unimoe_ray.model.language import SparseFeedForward
from unimoe_ray.model.towers import FrozenTower
from unimoe_ray.model.towers.beats import BeatsTower, load_beats
from unimoe_ray.model.towers.clip import ClipTower
from unimoe_ray.model.towers.whisper import WhisperFullTower
from unimoe_ray.model.unimoe import Batch, UniMoE
from unimoe_ray.training.checkpoint import load_model


def end_to_end_audio(case: Case) -> None:
    network = load_beats({"cfg": case.config["beats_cfg"], "model": case.weights(names.AUDIO_TOWER)})
    tower = BeatsTower(network, window=case.config["window_samples"])
    _compare(case, "audio", tower, lambda windows: windows[..., :-1])


def end_to_end_speech(case: Case) -> None:
    encoder = WhisperEncoder(WhisperConfig(**case.config["whisper"]))
    encoder.load_state_dict(case.weights(names.AUDIO_TOWER))
    _compare(case, "speech", WhisperFullTower(encoder), lambda windows: windows)


@torch.no_grad()
def _compare(
    case: Case,
    modality: str,
    tower: FrozenTower,
    spectrogram: Callable[[np.ndarray], np.ndarray],
) -> None:
    """``modality``: what ``<audio>`` placeholders are here; ``spectrogram``: the part of a tower's input windows that
    the case stores."""
    model = _imported(case)
    features = _image_features(case, model) | {modality: _sounds(case, tower, spectrogram)}
    case.check("audio_tower", features[modality].values)
    case.check("audio_tokens", model.connectors[modality](features[modality]).values)

    batch = _batch(case, modality, model, features)
    case.check("spliced_attention_mask", batch.mask)
    case.check("spliced_labels", batch.labels)
    embeddings = model.embed(batch)
    case.check("inputs_embeds", embeddings, where=batch.mask)
    loss = model(batch)
    case.check("loss", (loss.token_loss / loss.answer_tokens)[None])

    routers = watch_routers(model.language, case.spec["moe_layers"])
    model.recorder.start(None)
    logits = model.language(inputs_embeds=embeddings, attention_mask=batch.mask.long()).logits
    case.check("logits", logits, where=batch.mask)
    for name, found in routers.items():
        case.check(name, found, where=batch.mask.flatten())
    first = embeddings[:1, batch.mask[0]]
    case.check("logits_row0_inference", model.language(inputs_embeds=first).logits)


def _imported(case: Case) -> UniMoE:
    """The whole state dict as an official checkpoint on disk, imported as a user would."""
    with tempfile.TemporaryDirectory() as root:
        source, model_dir = Path(root, "official"), Path(root, "model")
        source.mkdir()
        save_file(case.weights(), source / "model.safetensors")
        (source / "config.json").write_text(json.dumps(case.config))
        train_tokenizer(["any"], 264).save(str(source / "tokenizer.json"))
        report = import_official([source], model_dir, lambda done, total: None)
        assert sum(report["used"].values()) + len(report["ignored"]) == len(case.weights())
        model, _, _ = load_model(model_dir)
    sparse = [i for i, layer in enumerate(model.language.model.layers) if isinstance(layer.mlp, SparseFeedForward)]
    assert sparse == case.spec["moe_layers"]
    # The number of frames is in no official configuration: it is 8, but a case may have another.
    model.connectors["video"].video = VideoConfig(frames=case.inputs["videos"].shape[1], pooling="mean")
    return model


def _image_features(case: Case, model: UniMoE) -> dict[str, Features]:
    config = case.config
    network = CLIPVisionModel(CLIPVisionConfig(**config["clip_vision"]))
    network.load_state_dict(without_buffers(case.weights(names.VISION_TOWER)))
    tower = ClipTower(network, select_layer=config["mm_vision_select_layer"])
    images, videos = case.inputs["images"], case.inputs["videos"]
    image = tower([picture[None].numpy() for picture in images])
    video = tower([frames.numpy() for frames in videos])
    case.check("image_tower", image.values)
    case.check("image_projected", model.connectors["image"](image).values)
    case.check("video_tower", video.values.view(*videos.shape[:2], *video.values.shape[1:]))
    return {"image": image, "video": video}


def _sounds(case: Case, tower: FrozenTower, spectrogram: Callable[[np.ndarray], np.ndarray]) -> Features:
    """Windows that belong to one file are put together again, as the file would come."""
    windows = [(w["row"], w["file_index"], i) for i, w in enumerate(case.spec["windows"])]
    files = []
    for _, members in groupby(windows, key=lambda window: window[:2]):
        parts = [case.inputs["waveforms"][i, : case.spec["windows"][i]["real_samples"]] for *_, i in members]
        files.append(tower.preprocess(torch.cat(parts).numpy()))
    found, wanted = spectrogram(np.concatenate(files)), case.inputs["audio_features"].numpy()
    np.testing.assert_allclose(found, wanted, atol=case.spec["suggested_atol"], rtol=0)
    return tower(files)


def _batch(case: Case, modality: str, model: UniMoE, features: dict[str, Features]) -> Batch:
    kinds = {number: kind for kind, number in PLACEHOLDER_IDS.items()} | {PLACEHOLDER_IDS["audio"]: modality}
    lengths = {
        kind: [found.lengths[found.owner == file].tolist() for file in found.owner.unique().tolist()]
        for kind, found in features.items()
    }
    ids, counts = [], []
    for row in unpadded(case, "input_ids"):
        files = [kinds[token] for token in row if token < 0]
        counts.append([model.connectors[kind].soft_tokens(lengths[kind].pop(0)) for kind in files])
        ids.append([PLACEHOLDER_IDS[kinds[token]] if token < 0 else token for token in row])
    assert not any(lengths.values()), "files without a placeholder"
    width = case.outputs["spliced_labels"].shape[1]
    input_ids, labels, mask = expand_rows(ids, unpadded(case, "labels"), counts, width)
    return Batch(input_ids, mask, labels, features)
