"""Connectors that read windows with learned queries, and the configuration that names them. (The mlp ones:
test_model.py.)"""

import pytest
import torch
from torch.nn import functional as F
from transformers import WhisperConfig, WhisperModel

from unimoe_ray.config.model import ConnectorConfig, ModelConfig, QueriesConfig, VideoConfig
from unimoe_ray.config.root import parse
from unimoe_ray.errors import UnimoeError, UsageError
from unimoe_ray.model.connectors import (
    Connector,
    QFormerConnector,
    WhisperDecoderConnector,
    build_connector,
    build_connectors,
    read_connectors,
)
from unimoe_ray.model.features import Features

QUERIES = {"number": 3, "num_layers": 2, "num_heads": 2, "intermediate_size": 6}
KINDS = {"qformer": QFormerConnector, "whisper_decoder": WhisperDecoderConnector}


def connector_of(kind: str, modality: str = "audio", rms: bool = False, video=None, **queries) -> Connector:
    """From 4 features to 6 hidden, with random queries."""
    torch.manual_seed(0)
    settings = ConnectorConfig(type=kind, match_text_rms=rms, queries=QueriesConfig(**QUERIES | queries))
    connector = build_connector(modality, 4, 6, settings, video or VideoConfig())
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return connector.eval()


def windows(*lengths: int, owner: list[int] | None = None) -> Features:
    torch.manual_seed(1)
    values = torch.randn(len(lengths), max(lengths), 4)
    return Features(values, torch.tensor(lengths), torch.tensor(owner or range(len(lengths))))


@pytest.mark.parametrize("kind", KINDS)
def test_each_window_becomes_so_many_soft_tokens(kind):
    connector = connector_of(kind)
    assert isinstance(connector, KINDS[kind])
    out = connector(windows(5, 5, 5, owner=[0, 0, 1]))
    assert out.values.shape == (3, 3, 6)
    assert out.lengths.tolist() == [3, 3, 3] and out.owner.tolist() == [0, 0, 1]
    assert connector.soft_tokens([5, 5]) == 6
    assert connector.projection is connector.projector


@pytest.mark.parametrize("kind", KINDS)
def test_padding_of_a_window_is_never_read(kind):
    connector = connector_of(kind)
    mixed = windows(2, 5, 2, 3)
    mixed.values[torch.arange(5) >= mixed.lengths[:, None]] = torch.nan
    out = connector(mixed).values
    for row, length in enumerate(mixed.lengths.tolist()):
        one = slice(row, row + 1)
        alone = connector(Features(mixed.values[one, :length], mixed.lengths[one], mixed.owner[one])).values
        torch.testing.assert_close(out[one], alone, atol=1e-6, rtol=1e-6)


def test_whisper_queries_see_those_before_them_and_qformer_queries_all():
    features = windows(5)
    for kind, causal in (("whisper_decoder", True), ("qformer", False)):
        connector = connector_of(kind)
        before = connector(features).values
        with torch.no_grad():
            connector.query_tokens[:, -1] += torch.arange(4.0)
        change = (connector(features).values - before).abs().amax(-1)[0] > 1e-6
        assert change.tolist() == ([False, False, True] if causal else [True, True, True])


@pytest.mark.parametrize("kind", KINDS)
def test_queries_start_as_zeros_and_learn_to_differ(kind):
    torch.manual_seed(0)
    settings = ConnectorConfig(type=kind, match_text_rms=False, queries=QueriesConfig(**QUERIES))
    connector = build_connector("speech", 4, 6, settings, VideoConfig())
    assert not connector.query_tokens.any()
    (connector(windows(5)).values * torch.arange(3.0)[:, None]).sum().backward()
    for name, parameter in connector.named_parameters():
        assert parameter.grad is not None, name  # ZeRO needs them all


def test_scaled_to_the_text():
    connector = connector_of("qformer", rms=True)
    connector.scale.fill_(0.02)
    soft = connector(windows(5, 5)).values
    torch.testing.assert_close(soft.pow(2).mean(-1).sqrt(), torch.full((2, 3), 0.02), rtol=1e-2, atol=0)
    assert "scale" in connector.state_dict() and "scale" not in connector_of("qformer").state_dict()


def test_projector_is_linear_gelu_linear():
    connector = connector_of("mlp2x_gelu", "image")
    x = windows(3, 3)
    first, second = connector.projection[0], connector.projection[2]
    y = F.linear(x.values, first.weight, first.bias)
    wanted = F.linear(0.5 * y * (1 + torch.erf(y / 2**0.5)), second.weight, second.bias)
    torch.testing.assert_close(connector(x).values, wanted)
    assert connector.soft_tokens([3, 3]) == 6


@pytest.mark.parametrize(("pooling", "tokens"), [("mean", 4), ("frames", 1)])
def test_projector_of_videos(pooling, tokens):
    connector = connector_of("mlp2x_gelu", "video", video=VideoConfig(frames=2, pooling=pooling))
    frames = windows(4, 4, 4, 4, owner=[0, 0, 1, 1])
    out = connector(frames)
    assert out.values.shape == (2, tokens, 6) and out.owner.tolist() == [0, 1]
    assert connector.soft_tokens([4, 4]) == tokens
    if pooling == "mean":
        each = connector.project(frames.values)
        torch.testing.assert_close(out.values[1], (each[2] + each[3]) / 2)


def test_published_sizes():
    """Parameters as counted in the published files; Whisper's unused table of 51865 tokens is left out."""
    with torch.device("meta"):
        sound = build_connector("audio", 768, 4096, ConnectorConfig(type="qformer"), VideoConfig())
        speech = build_connector("speech", 768, 4096, ConnectorConfig(type="whisper_decoder"), VideoConfig())
        image = build_connector("image", 1024, 4096, ConnectorConfig(type="mlp2x_gelu"), VideoConfig())
    counts = [sum(p.numel() for p in c.parameters()) / 1e6 for c in (sound, speech, image)]
    assert [round(count, 2) for count in counts] == [102.43, round(156.77 - 51865 * 768 / 1e6, 2), 20.98]


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="449 queries are more than the decoder's 448 positions"):
        connector_of("whisper_decoder", number=449)
    with pytest.raises(ValueError, match="Whisper's decoder has that of its encoder"):
        connector_of("whisper_decoder", hidden_size=8)
    assert connector_of("qformer", hidden_size=8)(windows(5)).values.shape == (1, 3, 6)


def test_each_modality_can_have_its_own():
    config = parse({"model": {"connectors": {"audio": {"type": "qformer", "queries": {"number": 7}}}}}).model
    assert config.connector_of("audio").queries.number == 7
    assert config.connector_of("image") == config.connector == ConnectorConfig()
    with pytest.raises(UsageError, match="the connector of videos is a qformer; allowed: mlp, mlp2x_gelu"):
        parse({"model": {"connector": {"type": "qformer"}}})
    with pytest.raises(UsageError, match=r"unknown key 'model\.connectors\.smell'"):
        parse({"model": {"connectors": {"smell": {}}}})


def test_the_configuration_of_older_models_still_reads():
    old = {"connector": {"type": "mlp", "match_text_rms": True}}
    assert ModelConfig.model_validate(old) == ModelConfig()


def test_a_decoder_starts_as_whispers(tmp_path):
    torch.manual_seed(0)
    sizes = {"decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 8, "max_target_positions": 20}
    whisper = WhisperModel(WhisperConfig(vocab_size=9, d_model=4, pad_token_id=0, encoder_attention_heads=2, **sizes))
    whisper.save_pretrained(tmp_path / "whisper")
    queries = {"number": 3, "num_layers": 2, "num_heads": 2, "intermediate_size": 8, "positions": 20}

    def model(**changes) -> ModelConfig:
        speech = {"type": "whisper_decoder", "pretrained": str(tmp_path / "whisper"), "queries": queries | changes}
        return ModelConfig.model_validate({"connectors": {"speech": speech}})

    dims = {"image": 6, "video": 6, "audio": 4, "speech": 4}
    connectors = build_connectors(dims, 6, model())
    read_connectors(connectors, model())
    found = connectors["speech"].decoder["audio_decoder"].state_dict()
    wanted = {k: v for k, v in whisper.decoder.state_dict().items() if not k.startswith("embed_tokens")}
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    key = f"model.connectors.speech.pretrained: {tmp_path}"
    for changes in ({"intermediate_size": 12}, {"num_layers": 3}):
        with pytest.raises(UnimoeError, match=f"{key}/whisper: no Whisper decoder of this connector's size") as error:
            read_connectors(build_connectors(dims, 6, model(**changes)), model(**changes))
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="pretrained is for type whisper_decoder; this connector is mlp"):
        parse({"model": {"connectors": {"image": {"pretrained": "x"}}}})
