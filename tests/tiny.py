"""A tiny run on random features: real prepared files and checkpoints, no towers, no downloads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from unimoe_ray.config import Config, parse
from unimoe_ray.config.data import SPLITS
from unimoe_ray.config.model import MODALITIES, PLACEHOLDER_IDS
from unimoe_ray.data import prepare
from unimoe_ray.data.features import TOWER_OF
from unimoe_ray.data.samples import PreparedSample, write_samples
from unimoe_ray.data.store import StoredFeatures, partition_dir, write_block
from unimoe_ray.data.tokenizer import load_tokenizer, train_tokenizer
from unimoe_ray.model.unimoe import UniMoE
from unimoe_ray.pipeline import open_run
from unimoe_ray.towers import load_towers
from unimoe_ray.training.checkpoint import ModelInfo, checkpoint_dir, save_model
from unimoe_ray.training.trainer import recipe

DIMS = {"image": 6, "video": 6, "audio": 10, "speech": 8}
TASKS = {
    "see": ("image",),
    "watch": ("video",),
    "hear": ("audio",),
    "listen": ("speech",),
    "ask": ("image", "speech"),
    "read": (),
}
VOCAB = 300


@dataclass
class TinyRun:
    config: Config
    info: ModelInfo
    tokenizer: Path


def tiny_config(root: Path, **changes) -> Config:
    run = {"steps": 3, "batch_size": 8, "tasks": {"see": 2, "watch": 1, "hear": 1, "listen": 1, "ask": 1, "read": 1}}
    shared = changes.get("model", {}).get("connectors", {}).get("video") == "image"
    connectors = {f"connector.{m}": 2e-2 for m in MODALITIES if not (shared and m == "video")}
    lora = {"r": 4, "alpha": 8}
    tree = {
        "name": "tiny",
        "runs_dir": str(root / "runs"),
        "data": {"dir": str(root / "data"), "steps_per_block": 2},
        "model": {
            "language": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_layers": 2,
                "num_heads": 2,
                "num_kv_heads": 1,
                "max_positions": 64,
            },
            "moe": {"slots": ["base", "image", "speech", "audio"], "top_k": 2},
            "video": {"frames": 2, "spatial_merge": 2, "temporal_merge": 2},
        },
        "stages": {
            "base": {"base": run | {"train": {"language": 1e-2}, "tasks": {"read": 1}, "weight_decay": 0.1}},
            "align": {"align": run | {"train": connectors}},
            "experts": {
                name: run
                | {"train": {"lora": 1e-2, f"connector.{name}": 1e-2}, "lora": lora | {"targets": ["feed_forward"]}}
                for name in ("image", "speech", "audio")
            },
            "tune": {
                "tune": run
                | {
                    "train": {"lora": 1e-2, "router": 1e-2} | {f"{c}.projection": 1e-2 for c in connectors},
                    "lora": lora,
                }
            },
        },
        "training": {"workers": 2, "elastic": {"standby_every": None}},
        "evaluation": {"max_new_tokens": 4},
    }
    return parse(_merge(tree, changes))


def make_tiny_run(root: Path, **changes) -> TinyRun:
    config = tiny_config(root, **changes)
    rng = np.random.default_rng(0)
    partitions = {}
    for kind, dim in DIMS.items():
        folder = partition_dir(root / "features", kind, "random")
        partitions[kind] = str(folder)
        features = [_random_features(kind, dim, rng) for _ in range(12)]
        write_block(folder, [f"{i:064d}" for i in range(12)], features)
    tokenizer = train_tokenizer(["one two three four five"], VOCAB)
    prepare.data_dir(config).mkdir(parents=True)
    tokenizer.save(str(prepare.tokenizer_path(config)))
    video = 4 if config.model.video.pooling == "mean" else 1
    samples = [_sample(task, kinds, i, rng, partitions, video) for task, kinds in TASKS.items() for i in range(15)]
    for split in (*SPLITS, prepare.VALIDATION):
        write_samples(prepare.data_dir(config) / f"{split}.arrow", samples)
    (prepare.data_dir(config) / "prepared.json").write_text(json.dumps({"stamp": "", "partitions": partitions}))
    vocab = tokenizer.get_vocab_size()
    info = ModelInfo(config.model.model_dump(mode="json"), vocab, DIMS, False, {}, True)
    run = TinyRun(config, info, prepare.tokenizer_path(config))
    torch.manual_seed(1)
    model = info.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    save_start(run, model, "base", "base")
    model.match_text_rms()
    save_start(run, model, "align", "align")
    for name in ("image", "speech", "audio"):
        expert = info.build()
        expert.load_state_dict(model.state_dict())
        with torch.no_grad():
            for key, parameter in expert.language.named_parameters():
                if ".mlp." in key:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        save_start(run, expert, "experts", name)
    return run


def make_servable_run(root: Path, **changes) -> TinyRun:
    """A run with a finished model of random weights behind towers of the real architectures, also random: it answers
    gibberish about real files, and differently about different ones."""
    config = tiny_config(root, **_merge({"mini": {"random_towers": True}}, changes))
    towers = load_towers(config)
    tokenizer = config.run_dir / "tokenizer.json"
    with open_run(config):
        train_tokenizer(["what is this? a red circle"] * 3, VOCAB).save(str(tokenizer))
    info = ModelInfo(
        config.model.model_dump(mode="json"),
        load_tokenizer(tokenizer).get_vocab_size(),
        {m: towers[TOWER_OF[m]].feature_dim for m in MODALITIES},
        sparse=True,
        towers={m: towers[TOWER_OF[m]].fingerprint() for m in MODALITIES},
        random_towers=True,
    )
    run = TinyRun(config, info, tokenizer)
    torch.manual_seed(0)
    model = info.build()
    with torch.no_grad():
        for parameter in model.language.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5)
    model.match_text_rms()
    save_start(run, model, "tune", "tune")
    return run


def save_start(run: TinyRun, model: UniMoE, stage: str, name: str) -> None:
    """A checkpoint as training would have left it; experts and what follows fit no recipe, for tests to train."""
    made_by = "start"
    if stage in ("base", "align"):
        made_by = recipe(run.config, stage, name, run.info, prepare.source(run.config, "train"))
    save_model(checkpoint_dir(run.config.run_dir, stage, name), model, run.info, run.tokenizer, made_by)


def _random_features(kind: str, dim: int, rng: np.random.Generator) -> StoredFeatures:
    windows = {"video": 2}.get(kind, 1)
    n = 4 if kind in ("image", "video") else int(rng.integers(2, 6))
    return StoredFeatures(rng.normal(size=(windows, n, dim)).astype(np.float16), [n] * windows)


def _sample(
    task: str, kinds: tuple[str, ...], index: int, rng: np.random.Generator, partitions: dict[str, str], video: int
) -> PreparedSample:
    """``video``: soft tokens of a video."""
    from unimoe_ray.data.store import FeatureStore

    media, counts, ids = [], [], [1]
    for kind in kinds:
        key = f"{rng.integers(12):064d}"
        lengths = FeatureStore(Path(partitions[kind])).lengths(key)
        media.append(f"{kind}/{key}")
        counts.append(video if kind == "video" else sum(lengths))
        ids.append(PLACEHOLDER_IDS[kind])
    question = rng.integers(4, 250, size=rng.integers(2, 6)).tolist()
    answer = [*rng.integers(4, 250, size=rng.integers(1, 4)).tolist(), 2]
    ids += [*question, 3, *answer]
    labels = [-100] * (len(ids) - len(answer)) + answer
    return PreparedSample(f"{task}-{index}", task, "+".join(sorted(set(kinds))) or "text", ids, labels, media, counts)


def _merge(tree: dict, changes: dict) -> dict:
    merged = dict(tree)
    for key, value in changes.items():
        merged[key] = _merge(merged[key], value) if isinstance(value, dict) and key in merged else value
    return merged
