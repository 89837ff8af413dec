"""What ``serving.engine.lookup_tokens`` gains and costs: tokens per CPU second with 8 guesses over those without.

    python benchmarks/lookup.py            hidden 512, 12 layers, 4 experts; one request, and four
    python benchmarks/lookup.py --small    hidden 256, 4 layers: does it run

Weights are random, fp32, but for the head, which says what token follows which, while the layers hardly have a say.
*Repeats*: answers go round in 40 tokens, as tables and quotes do. *Partly*: 12 tokens, then one that no rule tells.
*Never*: prompts hold pairs of words that the answers have too, but with another continuation: every guess is wrong.
Tokens must be equal. One thread; rounds are interleaved; ratios are medians of those within each round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from serving import END, SIZES, VOCAB, make_model, make_tokenizer

from unimoe_ray.config.serving import EngineConfig
from unimoe_ray.inference.engine import Engine
from unimoe_ray.inference.request import GenerationRequest, SamplingParams
from unimoe_ray.model.unimoe import UniMoE

NEW, GUESSES, PROMPT = 96, 8, 60


def follow(model: UniMoE, after: torch.Tensor) -> None:
    """Token ``after[t]`` follows t."""
    language = model.language
    with torch.no_grad():
        embedding, head = language.get_input_embeddings().weight, language.get_output_embeddings().weight
        head.zero_().index_add_(0, after, embedding)


def texts(kind: str, requests: int) -> tuple[torch.Tensor, list[list[int]]]:
    """What follows each token, and the prompts."""
    generator = torch.Generator().manual_seed(len(kind))
    after = torch.arange(VOCAB).roll(-1)  # an answer counts up
    prompts = []
    for number in range(requests):
        begin = 1000 * (number + 1)
        if kind == "repeats":
            after[begin + 39] = begin
            prompts.append([begin + place % 40 for place in range(PROMPT)])
        elif kind == "partly":
            prompt = list(range(begin, begin + 12)) + torch.randint(20000, 30000, (1,), generator=generator).tolist()
            chain = [begin + place for place in range(12)]
            for place in range(NEW // 13 + 1):
                jump = 20000 + 100 * number + place
                after[chain[-1]] = jump
                chain = [begin + 100 * (place + 1) + step for step in range(12)]
                after[jump] = chain[0]
                prompt += chain
            prompts.append([*prompt, begin])
        else:
            pairs = [[begin + place, begin + place + 1, 15000 + place] for place in range(1, NEW + 2)]
            prompts.append([token for pair in pairs for token in pair] + [begin])
    return after, prompts


def answer(engine: Engine, prompts: list[list[int]], number: int) -> tuple[list[list[int]], float]:
    """Tokens of each, and CPU seconds from the first token of the last one on."""
    for index, ids in enumerate(prompts):
        # Another beginning each time, so that no prompt is in the cache.
        request = GenerationRequest(str(index), [30000 + number, *ids], [], SamplingParams(NEW))
        engine.add(engine.start(request))
    tokens: list[list[int]] = [[] for _ in prompts]
    begun = 0.0
    while engine.has_work:
        for output in engine.step():
            tokens[int(output.request_id)] += output.token_ids
        begun = begun or (time.process_time() if all(tokens) else 0.0)
    return tokens, time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    size, rounds = ("h256", 1) if args.small else ("h512", args.rounds)
    torch.set_num_threads(1)
    tokenizer, figures = make_tokenizer(), {}
    print(f"{size}, fp32, 1 thread, {NEW} new tokens, {GUESSES} guesses, {rounds} rounds")
    print(f"{'text':>8} {'requests':>8} {'tokens/s without':>17} {'with':>7} {'ratio':>6} {'tokens per step':>15}")
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(SIZES[size], Path(folder))
    with torch.no_grad():
        for name, parameter in model.language.model.layers.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.mul_(0.01)
    for kind in ("repeats", "partly", "never"):
        for requests in (1, 4):
            after, prompts = texts(kind, requests)
            after[after == END] = END + 1
            follow(model, after)
            config = {"max_running": requests, "max_step_tokens": 2048, "kv_tokens": 8 * 512}
            engines = {
                guesses: Engine(model, tokenizer, EngineConfig(**config, lookup_tokens=guesses))
                for guesses in (0, GUESSES)
            }
            seconds: dict[int, list[float]] = {0: [], GUESSES: []}
            for number in range(rounds + 1):
                found = {}
                for guesses in sorted(engines, reverse=bool(number % 2)):
                    found[guesses], took = answer(engines[guesses], prompts, number)
                    if number:  # the first round is warming up
                        seconds[guesses].append(took)
                assert found[0] == found[GUESSES], "guessing changed an answer"
            tokens = requests * (NEW - 1)
            ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
            without, with_ = (tokens / statistics.median(took) for took in seconds.values())
            stats = engines[GUESSES].stats()
            steps = stats["generated_tokens"] / max(1, stats["generated_tokens"] - stats["accepted_tokens"])
            print(f"{kind:>8} {requests:>8} {without:>17.1f} {with_:>7.1f} {ratio:>6.2f} {steps:>15.2f}")
            figures[f"{kind} {requests}"] = {"without": without, "with": with_, "ratio": ratio}
    print(json.dumps({"benchmark": "lookup", "size": size, "figures": figures}))


if __name__ == "__main__":
    main()
