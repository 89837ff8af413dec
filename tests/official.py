"""Small checkpoints of random weights in the layouts of the official code, and the model that they should become."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from unimoe_ray.config.model import ModelConfig
from unimoe_ray.data.tokenizer import train_tokenizer
from unimoe_ray.model.unimoe import UniMoE

HIDDEN, INNER, LAYERS, WIDTH, VOCAB = 16, 24, 4, 64, 300
TYPES = {"audio": "qformer", "speech": "whisper_decoder"}
SLOTS_8E = ("audiocap", "basev", "base", "base1", "base4", "base7", "base", "base7")
State = dict[str, torch.Tensor]


@dataclass
class Official:
    """folders: base, then tuned. wanted: our state dict, connectors of the other kind of sound left out."""

    folders: list[Path]
    config: dict
    wanted: State
    ignored: list[str] = field(default_factory=list)


def random_model(kind: str, experts: int, layers: str) -> UniMoE:
    queries = {"number": 3, "num_layers": 3, "num_heads": 1, "intermediate_size": 20, "positions": 7}
    plain = {"type": "mlp2x_gelu", "match_text_rms": False}
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_layers": LAYERS, "num_heads": 2, "num_kv_heads": 2}
    config = {
        "language": sizes | {"tie_embeddings": False, "max_positions": 64},
        "connector": plain,
        "connectors": {name: plain | {"type": kind_, "queries": queries} for name, kind_ in TYPES.items()},
        "video": {"frames": 8, "pooling": "mean"},
        "moe": {"slots": [f"expert{i}" for i in range(experts)], "layers": layers},
    }
    dims = {"image": 12, "video": 12, "audio": WIDTH, "speech": WIDTH}
    model = UniMoE(ModelConfig.model_validate(config), VOCAB, dims)
    model.make_sparse()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
        model.connectors["video"].load_state_dict(model.connectors["image"].state_dict())
    return model


def aligner(model: UniMoE, kind: str) -> State:
    """As ``mm_audio_aligner.bin`` has it; speech keeps its queries outside, first."""
    state = model.connectors[kind].state_dict()
    found = {}
    if kind == "speech":
        found["model.query_tokens"] = state.pop("query_tokens")
        found["model.mm_audio_aligner.decoder.audio_decoder.embed_tokens.weight"] = torch.randn(9, WIDTH)
    return found | {f"model.mm_audio_aligner.{name}": tensor for name, tensor in state.items()}


def projector(model: UniMoE, prefix: str) -> State:
    state = model.connectors["image"].projection.state_dict()
    return {f"{prefix}mm_projector.{name}": tensor for name, tensor in state.items()}


def official_config(experts: int, **more) -> dict:
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "moe": True,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "mm_projector_type": "mlp2x_gelu",
    } | more


def save(state: State, folder: Path, stem: str, suffix: str = ".bin") -> None:
    from safetensors.torch import save_file

    if suffix == ".bin":
        torch.save(state, folder / f"{stem}.bin")
    else:
        save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, folder / f"{stem}{suffix}")


def save_shards(state: State, folder: Path, count: int, suffix: str = ".bin") -> None:
    """Tensors are dealt out in turn, so that an expert's are in several shards."""
    stem = "pytorch_model" if suffix == ".bin" else "model"
    where = {}
    for part in range(count):
        shard = dict(list(state.items())[part::count])
        name = f"{stem}-{part + 1:05d}-of-{count:05d}"
        save(shard, folder, name, suffix)
        where |= dict.fromkeys(shard, f"{name}{suffix}")
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": where}))


def start(root: Path, config: dict) -> list[Path]:
    base, tuned = root / "base", root / "tuned"
    for folder in (base, tuned):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
    train_tokenizer(["what is this"], VOCAB).save(str(base / "tokenizer.json"))
    return [base, tuned]


def junk(kind: str) -> State:
    """What state dicts hold that nobody needs."""
    found = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.randn(4) for i in range(LAYERS)}
    found["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)
    found["model.audio_tower.audio_tower.layer_norm.weight"] = torch.randn(4)
    if kind == "speech":
        found |= {f"model.audio_tower.{part}.layer_norm.weight": torch.randn(4) for part in ("encoder", "decoder")}
    return found


def four_experts(root: Path, kind: str, layers: str, suffix: str = ".bin") -> Official:
    """Base shards, projector and aligner; tuned projector, aligner, adapter and routers."""
    torch.manual_seed(0)
    old, new = (random_model(kind, 4, layers) for _ in range(2))
    base, tuned = folders = start(root, official_config(4))
    language = old.language.state_dict()
    save_shards(language | junk(kind), base, 3, suffix)
    save({k: v.bfloat16() for k, v in projector(old, "model.").items()}, base, "mm_projector", suffix)
    save(aligner(old, kind), base, "mm_audio_aligner", suffix)

    save(projector(new, "base_model.model.model."), tuned, "non_lora_trainables", suffix)
    save(aligner(new, kind), tuned, "mm_audio_aligner", suffix)
    gates = {name: tensor for name, tensor in new.language.state_dict().items() if ".mlp.gate." in name}
    save(gates, tuned, "mlp_gates", suffix)
    merged = language | gates
    lora, ignored = {}, []
    for name in [n for n in language if n.endswith("proj.weight") or ".mlp.gate." in n]:
        (out, into), part = language[name].shape, f"base_model.model.{name.removesuffix('.weight')}"
        a, b = torch.randn(8, into), torch.randn(out, 8)
        lora |= {f"{part}.lora_A.weight": a, f"{part}.lora_B.weight": b}
        if ".mlp.gate." in name:
            ignored += [f"{part}.lora_A.weight", f"{part}.lora_B.weight"]
        else:
            merged[name] = language[name] + 2.0 * (b @ a)
    save(lora, tuned, "adapter_model", suffix)
    (tuned / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 16}))
    (tuned / "training_args.bin").write_bytes(b"\x80\x04anything")
    return Official(folders, official_config(4), _wanted(new, merged, kind), ignored)


def eight_experts(root: Path) -> Official:
    """The 4-expert speech base, files of dense experts, and what was tuned: LoRA in the experts, routers, projector."""
    torch.manual_seed(0)
    old, new = random_model("speech", 4, "all"), random_model("speech", 8, "all")
    config = official_config(8, moe_type="dense", ep_size=8, lora_r=8, lora_alpha=16)
    base, tuned = start(root, official_config(4))
    (tuned / "8config.json").write_text(json.dumps(config))
    experts = root / "experts"
    experts.mkdir()
    language = old.language.state_dict()
    save_shards(language, base, 2)
    save(projector(old, ""), base, "mm_projector")
    merged = {name: tensor for name, tensor in language.items() if ".mlp." not in name}
    for name in set(SLOTS_8E):
        dense = {}
        for layer in range(LAYERS):
            for part, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
                weight = torch.randn(shape)
                dense[f"model.layers.{layer}.mlp.{part}_proj.weight"] = weight
                for slot, file in enumerate(SLOTS_8E):
                    if file == name:
                        merged[f"model.layers.{layer}.mlp.experts.{slot}.{part}_proj.weight"] = weight
        save(dense, experts, f"mlp_{name}")
    for slot in range(8):
        lora = {}
        for layer in range(LAYERS):
            for part in ("gate", "up", "down"):
                name = f"model.layers.{layer}.mlp.experts.{slot}.{part}_proj.weight"
                out, into = merged[name].shape
                a, b = torch.randn(8, into), torch.randn(out, 8)
                where = f"model.layers.{layer}.mlp.deepspeed_moe.experts.deepspeed_experts.0.{part}_proj"
                lora |= {f"{where}_lora_A.weight": a, f"{where}_lora_B.weight": b}
                merged[name] = merged[name] + 2.0 * (b @ a)
        save(lora, tuned, f"{slot}_mlp_experts")
    gates = {name: tensor for name, tensor in new.language.state_dict().items() if ".mlp.gate." in name}
    renamed = {name.replace(".mlp.gate.", ".mlp.deepspeed_moe.gate.wg."): tensor for name, tensor in gates.items()}
    save(renamed, tuned, "mlp_gates")
    save(projector(new, "base_model.model.model."), tuned, "non_lora_trainables")
    save(aligner(new, "speech"), tuned, "mm_audio_aligner")
    return Official([base, experts, tuned], config, _wanted(new, merged | gates, "speech"))


def _wanted(model: UniMoE, language: State, kind: str) -> State:
    other = "connectors.audio." if kind == "speech" else "connectors.speech."
    connectors = {f"connectors.{name}": tensor for name, tensor in model.connectors.state_dict().items()}
    found = {name: tensor for name, tensor in connectors.items() if not name.startswith(other)}
    return found | {f"language.{name}": tensor for name, tensor in language.items()}
