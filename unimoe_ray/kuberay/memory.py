"""How much memory training, encoders and the language model take, term by term, from numbers of parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from unimoe_ray.config import Config

if TYPE_CHECKING:
    from unimoe_ray.parameter_table import Sizes  # It would load torch.

GIB = 2**30
# Of one of our processes with its imports: 0.48 GiB resident without a GPU, measured; CUDA's libraries come on top.
PROCESS_GIB, CUDA_PROCESS_GIB = 0.75, 3.0
CUDA_CONTEXT_GIB = 0.8
# A transformer's activations, bytes per token, layer and hidden unit in 16 bits, without attention scores: 15 for
# attention and norms, 19 for the feed-forward (Korthikanti et al., arXiv 2205.05198, equation 1).
ATTENTION_BYTES, FEED_FORWARD_BYTES = 15, 19
ADAM_BYTES = 12  # the fp32 copy and both moments of a trained parameter
DECODERS = 4  # files that an encoder replica decodes at a time
BYTES_PER_PIXEL = 12  # fp32 RGB
# Alive in a tower: about ten times ViT-L/14-336's 577 x 1024 values per frame; Whisper-small's 50 x 768 a second, the
# feed-forward's four times as many, and a window of 30 s at a time.
BATCH_ITEM_MIB = {"image": 32, "speech": 4, "audio": 4}


@dataclass(frozen=True)
class Term:
    """One summand: what, how it is computed, GiB."""

    what: str
    how: str
    gib: float


@dataclass(frozen=True)
class Need:
    """Memory that one process takes. device: on its GPU, or the same terms in the host's memory without one."""

    of: str
    device: tuple[Term, ...]
    host: tuple[Term, ...]

    @property
    def device_gib(self) -> float:
        return sum(term.gib for term in self.device)

    @property
    def host_gib(self) -> float:
        return sum(term.gib for term in self.host)


def training(config: Config, sizes: Sizes, run: str, ranks: int, on_gpu: bool) -> Need:
    """One rank of a training run (``tune``, ``experts/image``): ZeRO-2, fp32 weights, products in bf16 on GPUs."""
    language, training, moe = config.model.language, config.training, config.model.moe
    is_sparse = run == "tune"
    model, trained = (sizes.language if is_sparse else sizes.dense), sizes.trained[run]
    connectors = sum(sizes.connectors.values())
    sparse = len(moe.sparse_layers(language.num_layers)) if is_sparse else 0
    width = 2 if on_gpu else 4
    tokens, hidden = training.max_tokens_per_micro_batch, language.hidden_size
    per_layer = language.num_layers * (ATTENTION_BYTES + FEED_FORWARD_BYTES)
    per_layer += sparse * FEED_FORWARD_BYTES * (moe.top_k - 1)
    read = _times("weights", model + connectors, 4, "fp32")
    ways = expert_ranks(config, ranks) if is_sparse else 1
    spread = f", experts over {ways} ranks" if ways > 1 else ""
    weights = _times("weights", model + connectors - sizes.experts * (1 - 1 / ways) * is_sparse, 4, "fp32" + spread)
    device = (
        weights,
        Term("gradients", f"{short(trained)} trained x 4 B x (1 + 1/{ranks})", trained * 4 * (1 + 1 / ranks) / GIB),
        Term("optimizer", f"{short(trained)} x {ADAM_BYTES} B / {ranks} ranks", trained * ADAM_BYTES / ranks / GIB),
        Term(
            "activations",
            f"{tokens} tokens x {hidden} x {per_layer} B over all layers{'' if on_gpu else ' x 2 (fp32)'}",
            tokens * hidden * per_layer * width / 2 / GIB,
        ),
        Term(
            "logits",
            f"{tokens} x {language.vocab_size} x {width + 8} B",
            tokens * language.vocab_size * (width + 8) / GIB,
        ),
    )
    device, host = _sides(device, read, on_gpu)
    standby = Term("standby", "a process that waits, its imports", PROCESS_GIB)
    return Need(f"a training rank, {run}", device, (*host, standby) if training.elastic.standby_every else host)


def expert_ranks(config: Config, ranks: int) -> int:
    """How many training ranks share the experts of a mixture. Raises UsageError when they cannot be so many."""
    from unimoe_ray.parallel.groups import expert_parallel_size

    return expert_parallel_size(config.training.expert_parallel.ep_size, ranks, config.model.moe.num_experts)


def language_model(config: Config, sizes: Sizes, on_gpu: bool) -> Need:
    """One replica of the language model's deployment, with its KV cache."""
    language, engine = config.model.language, config.serving.engine
    width = 2 if (on_gpu and engine.precision == "auto") or engine.precision == "bf16" else 4
    tokens = engine.max_running * language.max_positions if engine.kv_tokens == "auto" else engine.kv_tokens
    head = language.hidden_size // language.num_heads
    per_token = 2 * language.num_layers * language.num_kv_heads * head * width
    step = engine.max_step_tokens * (config.model.moe.top_k + 1) * 3 * language.intermediate_size * 4
    device = (
        _times("weights", sizes.language, width, "bf16" if width == 2 else "fp32"),
        Term("KV cache", f"{tokens} tokens x {per_token} B", tokens * per_token / GIB),
        Term(
            "a step",
            f"{engine.max_step_tokens} tokens and {engine.max_running} rows of {language.vocab_size} logits",
            (step + engine.max_running * language.vocab_size * 8) / GIB,
        ),
    )
    return Need("the language model", *_sides(device, _times("read first", sizes.language, 4, "fp32"), on_gpu))


def encoder(config: Config, sizes: Sizes, tower: str, on_gpu: bool) -> Need:
    """One replica of an encoder's deployment: the tower, its connectors, a batch, files being decoded."""
    kinds = ("image", "video") if tower == "image" else (tower,)
    connectors = sum(sizes.connectors[kind] for kind in kinds)
    cost = getattr(config.serving, tower).max_batch_cost
    weights = _times("weights", sizes.towers.get(tower, 0) + connectors, 4, "fp32")
    pixels = config.serving.limits.max_pixels if tower == "image" else 0
    each, unit = BATCH_ITEM_MIB[tower], "frames" if tower == "image" else "seconds"
    device = (weights, Term("a batch", f"{cost} {unit} x {each} MiB", cost * each / 1024))
    device, host = _sides(device, weights, on_gpu)
    files = f"{DECODERS} x {short(pixels)} pixels x {BYTES_PER_PIXEL} B"
    decoding = Term("decoding", files, DECODERS * pixels * BYTES_PER_PIXEL / GIB)
    return Need(f"the {tower} encoder", device, (*host, decoding) if pixels else host)


def driver(config: Config, sizes: Sizes, reads_model: bool) -> Need:
    """The driver of a job, on the head: preparing reads all towers, evaluation the model."""
    terms = [Term("process", "imports", PROCESS_GIB), _times("towers", sum(sizes.towers.values()), 4, "fp32")]
    if reads_model:
        terms.append(_times("the model", sizes.language + sum(sizes.connectors.values()), 4, "fp32"))
    return Need("a job's driver", (), tuple(terms))


def checkpoint_bytes(sizes: Sizes) -> float:
    """Of the largest run: all weights in fp32, and both moments of what is trained."""
    trained = max(sizes.trained.values(), default=0)
    return (sizes.language + sum(sizes.connectors.values())) * 4 + trained * 8


def experts_over_gpus(config: Config, sizes: Sizes, need: Need, bytes_per_weight: int, gpu_gib: float) -> int | None:
    """The fewest GPUs over which the experts must be spread for ``need`` to fit; None if the rest alone is too much."""
    experts = sizes.experts * bytes_per_weight / GIB
    rest, count = need.device_gib - experts, config.model.moe.num_experts
    for gpus in range(1, count + 1):
        if rest + experts * -(-count // gpus) / count <= gpu_gib:
            return gpus
    return None


def short(count: float) -> str:
    for unit, name in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= unit:
            return f"{count / unit:.1f}{name}"
    return f"{count:g}"


def _times(what: str, parameters: float, width: int, kind: str) -> Term:
    return Term(what, f"{short(parameters)} parameters x {width} B ({kind})", parameters * width / GIB)


def _sides(device: tuple[Term, ...], read: Term, on_gpu: bool) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    """What is on the GPU, and what in the host's memory: without a GPU everything."""
    if not on_gpu:
        return (), (Term("process", "imports", PROCESS_GIB), *device)
    process = Term("process", "imports and CUDA's libraries", CUDA_PROCESS_GIB)
    context = Term("CUDA context", "constant", CUDA_CONTEXT_GIB)
    return (*device, context), (process, Term("read first", read.how, read.gib))
