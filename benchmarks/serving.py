"""The engine beside Hugging Face's and vLLM's: tokens per second and time to the first token.

    python benchmarks/serving.py                        both models, at 1, 4, 16 and 64 requests
    python benchmarks/serving.py --vllm FOLDER          with vLLM, whose environment serve/vllm_env.sh makes
    python benchmarks/serving.py --small                the small model at 1 and 4 requests, one round: does it run

Every engine has the same weights (fp32, mixture in every layer, 4 experts, top-2), the same prompts (20 to 90 tokens)
and as many threads, generates 64 tokens greedily, and lives in a process of its own. Rounds are interleaved: in each,
every engine answers every number of requests once, in another order each time. A figure is the median over rounds; a
ratio is the median of the ratios within each round. TTFT is the mean over the requests of a run.

Outputs are compared with those of ``generate`` for each request alone. Where one differs, the two tokens must have been
level (logits less than ``LEVEL`` apart) in the model's view: then rounding decided. Else the benchmark fails.

The memory-bandwidth limit is measured in the same run: the weights that one step must read (all that is not an expert,
and of the experts as many as so many tokens are expected to choose between them), over the rate at which the same
number of threads reads a buffer of that size, whatever a step computes. Caches count, as they do for the engines.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from unimoe_ray.config.model import ModelConfig
from unimoe_ray.interop.mixtral import write_mixtral
from unimoe_ray.model.unimoe import UniMoE

VOCAB, EXPERTS, TOP_K, NEW, LEVEL = 32000, 4, 2, 64, 1e-3
END = 2
FEATURE_DIMS = {"image": 8, "video": 8, "audio": 8, "speech": 8}  # of connectors that nothing uses
SIZES = {
    "h256": {"hidden_size": 256, "intermediate_size": 688, "num_layers": 4},
    "h512": {"hidden_size": 512, "intermediate_size": 1376, "num_layers": 12},
}
OURS, VLLM = "ours", "vLLM"
ENGINES = (OURS, "HF generate", "HF continuous", VLLM)


@dataclass
class Result:
    tokens_per_s: float
    ttft_s: float
    cpu_s: float


class Worker:
    """An engine in its process."""

    def __init__(self, name: str, python: Path, folder: Path, threads: int):
        root = Path(__file__).resolve().parent.parent
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        if name != VLLM:
            env["PYTHONPATH"] = str(root)
        command = [str(python), str(root / "benchmarks/serving_engines.py"), name, str(folder), str(threads)]
        self.name = name
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  open as long as the process
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.facts = self._reply()

    def ask(self, prompts: list[list[int]], new: int) -> dict:
        self.process.stdin.write(json.dumps({"prompts": prompts, "new": new}) + "\n")
        self.process.stdin.flush()
        return self._reply()

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _reply(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise SystemExit(f"{self.name} ended:\n{self.log.read()[-3000:]}")
        return json.loads(line)


def make_model(size: dict[str, int], folder: Path) -> UniMoE:
    """Random weights, as ours and as a Mixtral; the end token's logit is always 0, so it is never the largest."""
    torch.manual_seed(0)
    language = size | {"num_heads": 8, "num_kv_heads": 8, "vocab_size": VOCAB, "max_positions": 512}
    settings = {"language": language | {"tie_embeddings": False}, "moe": {"slots": ["base"] * EXPERTS, "top_k": TOP_K}}
    model = UniMoE(ModelConfig(**settings), VOCAB, FEATURE_DIMS)
    model.make_sparse()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.06)
        model.language.lm_head.weight[END] = 0
    save_file(model.language.state_dict(), folder / "ours.safetensors")
    (folder / "ours.json").write_text(
        json.dumps({"model": settings, "vocab_size": VOCAB, "feature_dims": FEATURE_DIMS})
    )
    (folder / "mixtral").mkdir()
    write_mixtral(model.language, folder / "mixtral")
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return model.eval()


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE of ``VOCAB`` entries, made rather than trained: pairs of bytes after the single ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>"]
    pairs = [(a, b) for a in alphabet for b in alphabet][: VOCAB - len(special) - len(alphabet)]
    entries = [*special, *alphabet, *(a + b for a, b in pairs)]
    tokenizer = Tokenizer(models.BPE({entry: n for n, entry in enumerate(entries)}, pairs))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return tokenizer


def make_prompts(count: int, number: int = 0) -> list[list[int]]:
    """Others for each ``number``, as an engine may remember those that it has seen."""
    rng = random.Random(1000 * number + count)
    lengths = [50] if count == 1 else [20 + 70 * n // (count - 1) for n in range(count)]
    rng.shuffle(lengths)
    return [[rng.randrange(3, VOCAB) for _ in range(length)] for length in lengths]


def read_rate(nbytes: float, threads: int) -> float:
    """Bytes per second that a sum reads of a buffer of this size again and again, best of some."""
    torch.set_num_threads(threads)
    buffer = torch.ones(int(nbytes) // 4)
    best = 0.0
    for _ in range(8):
        begun = time.perf_counter()
        buffer.sum()
        best = max(best, buffer.nbytes / (time.perf_counter() - begun))
    return best


def bytes_per_step(model: UniMoE, requests: int) -> float:
    """Of weights that one step of so many single tokens reads; the table of embeddings is not."""
    language = model.language
    experts = sum(p.nbytes for name, p in language.named_parameters() if ".experts." in name)
    others = sum(p.nbytes for p in language.parameters()) - experts - language.get_input_embeddings().weight.nbytes
    return others + experts * (1 - (1 - TOP_K / EXPERTS) ** requests)


def compare(model: UniMoE, prompt: list[int], expected: list[int], got: list[int]) -> float:
    """0 when equal; else by how much the model prefers one of the two tokens at the first place they differ."""
    if got == expected:
        return 0.0
    if len(got) != len(expected):
        return float("inf")
    place = next(n for n, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b)
    model.recorder.start(None)
    with torch.no_grad():
        logits = model.language(torch.tensor([prompt + expected[:place]]), logits_to_keep=1).logits[0, -1]
    return abs(float(logits[expected[place]] - logits[got[place]]))


def check(model: UniMoE, workers: list[Worker], counts: list[int]) -> dict[str, str]:
    """Also warms every engine up at every number of requests."""
    found = {}
    prompts = {count: make_prompts(count) for count in counts}
    generate = next(worker for worker in workers if worker.name == "HF generate")
    alone = {n: [generate.ask([prompt], NEW)["tokens"][0] for prompt in prompts[n]] for n in counts if n <= 16}
    for worker in workers:
        equal = total = 0
        gaps = [0.0]
        for count in counts:
            tokens = worker.ask(prompts[count], NEW)["tokens"]
            assert all(len(got) == NEW for got in tokens), worker.name
            for prompt, expected, got in zip(prompts[count], alone.get(count, []), tokens, strict=False):
                gap = compare(model, prompt, expected, got)
                equal, total = equal + (got == expected), total + 1
                gaps.append(gap)
        if max(gaps) > LEVEL:
            raise SystemExit(f"{worker.name}: other tokens than generate's, which are {max(gaps):.3g} apart in logits")
        found[worker.name] = f"{equal} of {total} equal" + (f", gap {max(gaps):.1e}" if equal < total else "")
    return found


def measure(workers: list[Worker], counts: list[int], rounds: int) -> dict[tuple[str, int], list[Result]]:
    results: dict[tuple[str, int], list[Result]] = {}
    for number in range(rounds):
        for count in counts:
            prompts = make_prompts(count, number + 1)
            for worker in random.Random(number * 100 + count).sample(workers, len(workers)):
                reply = worker.ask(prompts, NEW)
                ttft = statistics.mean(reply["first_s"])
                result = Result(count * NEW / reply["wall_s"], ttft, reply["cpu_s"])
                results.setdefault((worker.name, count), []).append(result)
    return results


def report(size: str, results: dict, limits: dict[int, float], counts: list[int], names: list[str]) -> dict:
    print(f"\n{size}: tokens/s (TTFT ms; CPU ms per token; ours over it)")
    print("".join(f"{text:>34}" for text in ("", *(f"{n} request{'s' * (n > 1)}" for n in counts))))
    record: dict[str, dict] = {}
    for name in names:
        cells = []
        for count in counts:
            runs = results[name, count]
            speed = statistics.median(run.tokens_per_s for run in runs)
            ttft = statistics.median(run.ttft_s for run in runs) * 1e3
            cpu = statistics.median(run.cpu_s for run in runs) * 1e3 / (count * NEW)
            pairs = zip(results[OURS, count], runs, strict=True)
            ratio = statistics.median(a.tokens_per_s / b.tokens_per_s for a, b in pairs)
            cells.append(f"{speed:.0f} ({ttft:.0f}; {cpu:.2f}; x{ratio:.2f})")
            record.setdefault(name, {})[count] = {
                "tokens_per_s": round(speed, 1),
                "ttft_ms": round(ttft, 1),
                "cpu_ms_per_token": round(cpu, 3),
                "ours_over_it": round(ratio, 3),
            }
        print(f"{name:>34}" + "".join(f"{cell:>34}" for cell in cells))
    print(f"{'memory-bandwidth limit':>34}" + "".join(f"{limits[count]:>34.0f}" for count in counts))
    return record | {"limit": {count: round(limit, 1) for count, limit in limits.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--vllm", type=Path, help="folder of vLLM's environment")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    if args.small:
        args.sizes, args.requests, args.rounds = ["h256"], [1, 4], 1
    pythons = {name: Path(sys.executable) for name in ENGINES}
    pythons[VLLM] = args.vllm / "bin/python" if args.vllm else None
    names = [name for name in ENGINES if name in {*args.engines, OURS, "HF generate"}]
    if VLLM in names and not (pythons[VLLM] and pythons[VLLM].exists()):
        print(f"vLLM is left out: {args.vllm or 'no environment given'}; serve/vllm_env.sh makes one (--vllm)")
        names.remove(VLLM)
    record = {"benchmark": "serving", "threads": args.threads, "rounds": args.rounds, "load": os.getloadavg()[0]}
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            model = make_model(SIZES[size], Path(folder))
            workers = [Worker(name, pythons[name], Path(folder), args.threads) for name in names]
            try:
                equal = check(model, workers, args.requests)
                print(f"{size}: tokens as generate's, one by one:", "; ".join(f"{n}: {t}" for n, t in equal.items()))
                results = measure(workers, args.requests, args.rounds)
            finally:
                for worker in workers:
                    worker.close()
            limits = {}
            for count in args.requests:
                read = bytes_per_step(model, count)
                limits[count] = count * read_rate(read, args.threads) / read
            record[size] = report(size, results, limits, args.requests, names) | {"equal": equal}
    print(json.dumps(record))


if __name__ == "__main__":
    main()
