"""The whole model: pixels, sounds and ids to every stage, logits and loss."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import numpy as np
import torch
from transformers import Blip2QFormerConfig, CLIPVisionConfig, CLIPVisionModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tests.golden.case import Case
from tests.golden.connectors import UNUSED
from tests.golden.language import language_config, watch_routers, without_buffers
from tests.golden.splicing import expand_rows, unpadded
from unimoe_ray.config.model import PLACEHOLDER_IDS, ConnectorConfig, ModelConfig, VideoConfig
from unimoe_ray.model.connectors import QFormerConnector, QueryConnector, WhisperDecoderConnector
from unimoe_ray.model.features import Features
from unimoe_ray.model.language import upcycle
from unimoe_ray.model.towers import FrozenTower
from unimoe_ray.model.towers.beats import BeatsTower, load_beats
from unimoe_ray.model.towers.clip import ClipTower
from unimoe_ray.model.towers.whisper import WhisperFullTower
from unimoe_ray.model.unimoe import Batch, UniMoE

ALIGNER = "model.mm_audio_aligner."
# Official names that are not the language model's; each is loaded strictly where it belongs. What is left out: the
# unused Whisper model beside the speech tower, and the unused table of the aligner.
ELSEWHERE = ("model.mm_projector.", "model.vision_tower.", "model.audio_tower.", ALIGNER, "model.query_tokens")


def end_to_end_audio(case: Case) -> None:
    def tower() -> FrozenTower:
        network = load_beats({"cfg": case.config["beats_cfg"], "model": case.weights("model.audio_tower.audio_tower.")})
        return BeatsTower(network, window=case.config["window_samples"])

    def connector() -> QueryConnector:
        qformer = Blip2QFormerConfig(**case.config["qformer"])
        connector = QFormerConnector(qformer, case.config["query_tokens_size"], case.config["hidden_size"])
        connector.load_state_dict(case.weights(ALIGNER))
        return connector

    _compare(case, "audio", tower(), connector(), lambda windows: windows[..., :-1])


def end_to_end_speech(case: Case) -> None:
    whisper = WhisperConfig(**case.config["whisper"])

    def tower() -> FrozenTower:
        encoder = WhisperEncoder(whisper)
        encoder.load_state_dict(case.weights("model.audio_tower.audio_tower."))
        return WhisperFullTower(encoder)

    def connector() -> QueryConnector:
        connector = WhisperDecoderConnector(whisper, case.config["query_tokens_size"], case.config["hidden_size"])
        weights = case.weights(ALIGNER)
        del weights[UNUSED]
        connector.load_state_dict(weights | {"query_tokens": case.weights()["model.query_tokens"]})
        return connector

    _compare(case, "speech", tower(), connector(), lambda windows: windows)


@torch.no_grad()
def _compare(
    case: Case,
    modality: str,
    tower: FrozenTower,
    connector: QueryConnector,
    spectrogram: Callable[[np.ndarray], np.ndarray],
) -> None:
    """``modality``: what ``<audio>`` placeholders are here; ``spectrogram``: the part of a tower's input windows that
    the case stores."""
    model = _model(case, modality, connector)
    features = _image_features(case, model) | {modality: _sounds(case, tower, spectrogram)}
    case.check("audio_tower", features[modality].values)
    case.check("audio_tokens", connector(features[modality]).values)

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


def _model(case: Case, modality: str, connector: QueryConnector) -> UniMoE:
    config = case.config
    settings = ModelConfig(
        language=language_config(case),
        connector=ConnectorConfig(type=config["mm_projector_type"], match_text_rms=False),
        video=VideoConfig(frames=case.inputs["videos"].shape[1], pooling="mean"),
    )
    seen, heard = config["mm_hidden_size"], config["mm_audio_hidden_size"]
    dims = {"image": seen, "video": seen, "audio": heard, "speech": heard}
    model = UniMoE(settings, config["vocab_size"], dims)
    upcycle(
        model.language, case.spec["moe_layers"], config["num_experts"], config["num_experts_per_tok"], model.recorder
    )
    weights = without_buffers(case.weights())
    language = {name: tensor for name, tensor in weights.items() if not name.startswith(ELSEWHERE)}
    model.language.load_state_dict(language)
    for kind in ("image", "video"):
        model.connectors[kind].projection.load_state_dict(case.weights("model.mm_projector."))
    model.connectors[modality] = connector
    return model.eval()


def _image_features(case: Case, model: UniMoE) -> dict[str, Features]:
    config = case.config
    network = CLIPVisionModel(CLIPVisionConfig(**config["clip_vision"]))
    network.load_state_dict(without_buffers(case.weights("model.vision_tower.vision_tower.vision_model.")))
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
