"""Gradients of connectors, the mixture and the splice against finite differences, in fp64 on tiny sizes."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.func import functional_call

from unimoe_ray.config.model import PLACEHOLDER_IDS, ConnectorConfig, QueriesConfig, VideoConfig
from unimoe_ray.model.connectors import build_connector
from unimoe_ray.model.features import Features
from unimoe_ray.model.moe import MoELayer
from unimoe_ray.model.splice import splice

QUERIES = QueriesConfig(number=2, num_layers=2, num_heads=2, intermediate_size=4)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def check(module: torch.nn.Module, run, *inputs: torch.Tensor) -> None:
    """Of ``run(module, *inputs)`` with respect to the inputs and every parameter."""
    names = [name for name, _ in module.named_parameters()]

    class Call(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, *values):
            return run(self.inner, *values)

    call = Call()

    def function(*tensors: torch.Tensor):
        values, parameters = tensors[: len(inputs)], tensors[len(inputs) :]
        state = {f"inner.{name}": tensor for name, tensor in zip(names, parameters, strict=True)}
        return functional_call(call, state, values)

    parameters = [p.detach().clone().requires_grad_() for _, p in module.named_parameters()]
    assert gradcheck(function, (*inputs, *parameters), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("match_text_rms", [False, True])
@pytest.mark.parametrize(
    ("kind", "modality", "pooling"),
    [
        ("mlp", "image", "mean"),
        ("mlp", "video", "frames"),
        ("mlp2x_gelu", "image", "mean"),
        ("mlp2x_gelu", "video", "mean"),
        ("qformer", "audio", "mean"),
        ("whisper_decoder", "speech", "mean"),
    ],
)
def test_connectors(kind, modality, pooling, match_text_rms):
    torch.manual_seed(0)
    video = VideoConfig(frames=2, pooling=pooling, spatial_merge=2, temporal_merge=2)
    settings = ConnectorConfig(type=kind, match_text_rms=match_text_rms, queries=QUERIES)
    connector = build_connector(modality, 4, 2, settings, video).double().eval()
    if kind == "whisper_decoder":  # 448 positions, of which the queries read the first
        positions = connector.decoder["audio_decoder"].embed_positions
        positions.weight = torch.nn.Parameter(positions.weight[: QUERIES.number].detach().clone())
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    full = modality == "video"
    lengths, owner = torch.tensor([4, 4] if full else [4, 2]), torch.tensor([0, 0])
    check(connector, lambda c, values: c(Features(values, lengths, owner)).values, random(2, 4, 4))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_mixture(top_k):
    """Output and balance loss; of one chosen expert the weight is 1 and the router learns from the loss alone."""
    torch.manual_seed(0)
    layer = MoELayer(4, 3, 3, top_k).double()
    torch.nn.init.normal_(layer.gate.weight, std=1.0)

    def run(layer: MoELayer, x: torch.Tensor):
        y, stats = layer(x)
        return y, stats.balance_loss

    x = random(2, 3, 4)
    top = torch.nn.functional.linear(x, layer.gate.weight).sort(-1).values
    assert (top[..., 1:] - top[..., :-1]).min() > 1e-4, "too near to another choice for finite differences"
    check(layer, run, x)


def test_splice():
    torch.manual_seed(0)
    ids = torch.tensor([[5, -300, -300, 6, -300], [-200, 7, -300, 0, 0]])
    audio_lengths, image_lengths = torch.tensor([2, 1, 1]), torch.tensor([1])

    def run(embeddings: torch.Tensor, audio: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        soft = {
            "audio": Features(audio, audio_lengths, torch.arange(3)),
            "image": Features(image, image_lengths, torch.arange(1)),
        }
        return splice(embeddings, ids, soft)

    assert PLACEHOLDER_IDS["audio"] == -300 and PLACEHOLDER_IDS["image"] == -200
    assert gradcheck(run, (random(2, 5, 3), random(3, 2, 3), random(1, 2, 3)))
