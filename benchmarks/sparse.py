"""What a mixture of experts costs beside dense models: speed of training and decoding, FLOPs and memory.

    python benchmarks/sparse.py           hidden 512, 6 layers, minutes
    python benchmarks/sparse.py --small   hidden 128, 2 layers, seconds

The mixture has 4 experts in every layer; a token takes 2. "equal active": the dense model whose feed-forward
layers have as many parameters as those that one token passes; "equal total": as many as all experts together. All else
is alike, in fp32 with random weights. Training is forward, backward and AdamW of one batch; decoding is the package's
engine, greedy. Rounds are interleaved in one process, in another order each; a figure is the median over rounds of CPU
time (one thread), a ratio the median of the ratios within each round.

FLOPs are those of the matrix products and attention of a training step, counted as they run
(``torch.utils.flop_counter``). Memory: weights (training has
four times as much, with gradients and AdamW's moments), and what a step keeps for backward.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch.utils.flop_counter import FlopCounterMode

from unimoe_ray.config.model import ModelConfig
from unimoe_ray.config.serving import EngineConfig
from unimoe_ray.data.tokenizer import train_tokenizer
from unimoe_ray.inference.engine import Engine
from unimoe_ray.inference.request import GenerationRequest, SamplingParams
from unimoe_ray.model.sizes import active_per_token, total
from unimoe_ray.model.unimoe import UniMoE
from unimoe_ray.training.allocator import keep_freed_memory

EXPERTS, TOP_K, END = 4, 2, 2
FEATURE_DIMS = {"image": 8, "video": 8, "audio": 8, "speech": 8}  # of connectors that nothing uses
MIXTURE, ACTIVE, TOTAL = "mixture, 2 of 4", "dense, equal active", "dense, equal total"


@dataclass(frozen=True)
class Sizes:
    """sequences x length: of a training batch; requests generate ``new`` tokens each."""

    hidden: int
    inner: int
    layers: int
    sequences: int
    length: int
    requests: tuple[int, ...]
    new: int
    rounds: int


class Entrant:
    def __init__(self, inner: int, sparse: bool, sizes: Sizes, tokenizer: Tokenizer):
        torch.manual_seed(0)
        language = {"hidden_size": sizes.hidden, "intermediate_size": inner, "num_layers": sizes.layers}
        language |= {"num_heads": 8, "num_kv_heads": 8, "max_positions": 512}
        moe = {"slots": ["base"] * EXPERTS, "top_k": TOP_K}
        self.model = UniMoE(ModelConfig(language=language, moe=moe), tokenizer.get_vocab_size(), FEATURE_DIMS)
        if sparse:
            self.model.make_sparse()
        self.language = self.model.language
        with torch.no_grad():
            for parameter in self.language.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.06)
        self.optimizer = torch.optim.AdamW(self.language.parameters(), lr=0.0)
        self._tokenizer = tokenizer
        self._sizes = sizes

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        self.model.recorder.start(None)
        logits = self.language(ids[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def train(self, ids: torch.Tensor) -> float:
        """Tokens per CPU second."""
        begun = time.process_time()
        self.loss(ids).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return ids[:, 1:].numel() / (time.process_time() - begun)

    def make_engine(self) -> None:
        """The engine reads the weights as they are now."""
        self.model.eval()
        with torch.no_grad():  # The end token's logit is 0: never the largest.
            self.language.lm_head.weight[END] = 0
        self._engine = Engine(self.model, self._tokenizer, EngineConfig(max_running=max(self._sizes.requests)))

    def decode(self, prompts: list[list[int]]) -> float:
        """Tokens per CPU second, prompts included."""
        new, tokens = self._sizes.new, 0
        begun = time.process_time()
        for number, ids in enumerate(prompts):
            self._engine.add(self._engine.start(GenerationRequest(str(number), ids, [], SamplingParams(new))))
        while self._engine.has_work:
            tokens += sum(len(output.token_ids) for output in self._engine.step())
        return tokens / (time.process_time() - begun)

    def counted(self, ids: torch.Tensor) -> dict[str, float]:
        """FLOPs of a step per token, parameters, and bytes."""
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        own = {parameter.untyped_storage().data_ptr() for parameter in self.language.parameters()}
        with FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = self.loss(ids)
            loss.backward()
        self.optimizer.zero_grad()
        weights = sum(parameter.nbytes for parameter in self.language.parameters())
        return {
            "FLOPs": counter.get_total_flops() / ids[:, 1:].numel(),
            "parameters": total(self.language),
            "active": active_per_token(self.language),
            "weights MB": weights / 1e6,
            "kept for backward MB": sum(size for pointer, size in kept.items() if pointer not in own) / 1e6,
        }


def measure(sizes: Sizes) -> dict[str, dict]:
    """Per entrant its figures; speeds are lists, a value per round."""
    tokenizer = train_tokenizer(["one two three four five"], 300)
    vocab = tokenizer.get_vocab_size()
    inner = sizes.inner
    shapes = {MIXTURE: (inner, True), ACTIVE: (TOP_K * inner, False), TOTAL: (EXPERTS * inner, False)}
    entrants = {name: Entrant(*shape, sizes, tokenizer) for name, shape in shapes.items()}
    rng, found = random.Random(0), {}
    ids = torch.randint(3, vocab, (sizes.sequences, sizes.length + 1), generator=torch.Generator().manual_seed(0))
    for name, entrant in entrants.items():
        found[name] = entrant.counted(ids) | {"training tokens/s": []}
    for number in range(-1, sizes.rounds):  # The round before the first warms up.
        for name in rng.sample(list(entrants), len(entrants)):
            speed = entrants[name].train(ids)
            if number >= 0:
                found[name]["training tokens/s"].append(speed)
    for entrant in entrants.values():
        entrant.make_engine()
    for count in sizes.requests:
        key = f"decode tokens/s, {count} at once"
        for number in range(-1, sizes.rounds):
            prompts = [[rng.randrange(3, vocab) for _ in range(20)] for _ in range(count)]
            for name in rng.sample(list(entrants), len(entrants)):
                speed = entrants[name].decode(prompts)
                if number >= 0:
                    found[name].setdefault(key, []).append(speed)
    return found


def over(found: dict[str, dict], peer: str) -> dict[str, float]:
    """Each figure of the mixture over the peer's."""
    result = {}
    for key, ours in found[MIXTURE].items():
        theirs = found[peer][key]
        many = isinstance(ours, list)
        result[key] = statistics.median(a / b for a, b in zip(ours, theirs, strict=True)) if many else ours / theirs
    return {key: round(value, 4) for key, value in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    sizes = Sizes(512, 1376, 6, 4, 256, (1, 16), 32, args.rounds)
    if args.small:
        sizes = Sizes(128, 344, 2, 2, 128, (1, 4), 16, 3)
    found = measure(sizes)
    ratios = {peer: over(found, peer) for peer in (ACTIVE, TOTAL)}
    print(f"{'':30}" + "".join(f"{name:>22}" for name in found) + "".join(f"{'over ' + peer:>26}" for peer in ratios))
    for key in found[MIXTURE]:
        values = [statistics.median(row[key]) if isinstance(row[key], list) else row[key] for row in found.values()]
        line = f"{key:30}" + "".join(f"{value:>22,.1f}" for value in values)
        print(line + "".join(f"{row[key]:>26.3f}" for row in ratios.values()))
    medians = {
        name: {key: statistics.median(v) if isinstance(v, list) else v for key, v in row.items()}
        for name, row in found.items()
    }
    print(json.dumps({"benchmark": "sparse", "sizes": vars(sizes), "medians": medians, "mixture_over": ratios}))


if __name__ == "__main__":
    main()
