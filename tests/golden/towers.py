"""The frozen encoders against the official ones."""

from __future__ import annotations

import torch

from tests.golden.case import Case
from unimoe_ray.model.towers.beats import load_beats, normalised_fbank, reduce_padding
from unimoe_ray.model.towers.fbank import fbank


def beats_fbank(case: Case) -> None:
    for name, wave in case.inputs.items():
        sound = name.removesuffix(".wave")
        case.check(f"{sound}.fbank_raw", fbank(wave))
        case.check(f"{sound}.fbank_norm", normalised_fbank(wave))


@torch.no_grad()
def beats_encoder(case: Case) -> None:
    network = load_beats({"cfg": case.config, "model": case.weights()}).eval()
    steps: list[torch.Tensor] = []
    for module in (network.layer_norm, *network.encoder.layers):
        module.register_forward_hook(lambda _module, _inputs, output: steps.append(output))

    spectrogram = normalised_fbank(case.inputs["waveform"])
    case.check("fbank_norm", spectrogram)
    case.check("features_no_mask", network(spectrogram))
    embedded, *layers = steps
    case.check("patch_embedding_ln", embedded)
    for number, output in enumerate(layers):
        case.check(f"layer{number}_no_mask", output)

    padding = reduce_padding(case.inputs["padding_mask"], spectrogram.shape[1])
    case.check("patch_padding_mask", network.patch_padding(padding))
    case.check("features_masked", network(spectrogram, padding))
    case.check("features_masked_single", network(spectrogram[1:2], padding[1:2]))
