"""What weights of fewer bits cost in accuracy and gain in speed on CPUs: ``serving.engine.precision``.

    python benchmarks/precision.py            SmolLM2-135M-Instruct, upcycled: half of its layers are mixtures
    python benchmarks/precision.py --small    random weights, hidden 256, 4 layers: does it run

Each precision answers the same questions greedily; *same* are answers equal to those in fp32 to the last token, *agree*
the part of the tokens of the fp32 answers for which it would choose the same one after the same words (teacher
forcing), *error* the median of |logits - fp32's| / |fp32's| there, *KL* the mean divergence in nats. CPU time, one
thread, medians over the questions, which the precisions answer in turn.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from serving import SIZES, make_model, make_prompts, make_tokenizer
from tokenizers import Tokenizer

from unimoe_ray import config as settings_of
from unimoe_ray.config.serving import EngineConfig
from unimoe_ray.inference.engine import Engine
from unimoe_ray.inference.forward import Span
from unimoe_ray.inference.request import GenerationRequest, SamplingParams
from unimoe_ray.model.unimoe import UniMoE

NEW = 48
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Name three animals that live in the sea.",
    "Write one sentence about a red bicycle.",
    "How do I boil an egg?",
    "What is seven times eight?",
    "Translate 'good morning' to Spanish.",
    "What does a baker do?",
    "List the colours of the rainbow.",
    "Explain what a computer program is.",
    "Who wrote Romeo and Juliet?",
    "What is the opposite of cold?",
)


def smollm2() -> tuple[UniMoE, Tokenizer, list[list[int]]]:
    from transformers import AutoTokenizer

    from unimoe_ray.llama import checkpoint_of

    folder = checkpoint_of("smollm2-135m")
    settings = settings_of.load("smollm2").model
    language = settings.language.model_copy(update={"pretrained": folder, "max_positions": 512})
    torch.manual_seed(0)
    dims = dict.fromkeys(("image", "video", "audio", "speech"), 8)
    model = UniMoE(settings.model_copy(update={"language": language}), settings.language.vocab_size, dims)
    model.make_sparse()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    ids = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    return model.eval(), tokenizer.backend_tokenizer, ids


def answer(engine: Engine, ids: list[int]) -> tuple[list[int], float]:
    """Its tokens, and CPU seconds per token that is not the first."""
    engine.add(engine.start(GenerationRequest("0", ids, [], SamplingParams(NEW))))
    tokens = [token for output in engine.step() for token in output.token_ids]
    begun, known = time.process_time(), len(tokens)
    while engine.has_work:
        tokens += [token for output in engine.step() for token in output.token_ids]
    return tokens, (time.process_time() - begun) / max(1, len(tokens) - known)


def forced(engine: Engine, prompts: list[list[int]], tokens: list[list[int]]) -> torch.Tensor:
    """Logits [N, V] at each token of the given answers."""
    table, found = engine.model.language.get_input_embeddings().weight.detach(), []
    for ids, answer in zip(prompts, tokens, strict=True):
        fed = torch.tensor([*ids, *answer[:-1]])
        logits, _ = engine.decoder(table[fed], [Span(0, 0, len(fed))], list(range(len(ids) - 1, len(fed))))
        found.append(logits.clone())
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.small:
        with tempfile.TemporaryDirectory() as folder:
            model, tokenizer, prompts = make_model(SIZES["h256"], Path(folder)), make_tokenizer(), make_prompts(4)
    else:
        model, tokenizer, prompts = smollm2()
    weights = sum(parameter.numel() for parameter in model.language.parameters())
    print(f"{weights / 1e6:.0f} M parameters, {len(prompts)} questions, {NEW} new tokens at most, 1 thread")
    print(f"{'':>5} {'same':>8} {'agree':>7} {'error':>8} {'KL':>9} {'CPU ms/token':>13} {'faster':>7}")
    engines = {}
    for precision in ("fp32", "bf16", "int8"):
        run = copy.deepcopy(model).to(torch.bfloat16 if precision == "bf16" else torch.float32)
        config = EngineConfig(max_running=1, kv_tokens=4096, precision=precision)
        engines[precision] = Engine(run, tokenizer, config, keep_weights=False)
    tokens: dict[str, list[list[int]]] = {name: [] for name in engines}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for ids in prompts:
        for name, engine in engines.items():
            found, took = answer(engine, ids)
            tokens[name].append(found)
            seconds[name].append(took)
    wanted, figures = tokens["fp32"], {}
    exact = forced(engines["fp32"], prompts, wanted)
    log = exact.log_softmax(-1)
    for name, engine in engines.items():
        logits = forced(engine, prompts, wanted)
        same = sum(a == b for a, b in zip(tokens[name], wanted, strict=True))
        agree = (logits.argmax(-1) == exact.argmax(-1)).float().mean().item()
        error = ((logits - exact).norm(dim=-1) / exact.norm(dim=-1)).median().item()
        kl = (log.exp() * (log - logits.log_softmax(-1))).sum(-1).mean().item()
        took = 1e3 * statistics.median(seconds[name])
        faster = statistics.median(a / b for a, b in zip(seconds["fp32"], seconds[name], strict=True))
        print(
            f"{name:>5} {same:>5}/{len(prompts):<2} {agree:>7.2%} {error:>8.2e} {kl:>9.2e} {took:>13.2f} {faster:>7.2f}"
        )
        figures[name] = {"same": same, "agree": agree, "error": error, "kl": kl, "cpu_ms": took, "faster": faster}
    print(json.dumps({"benchmark": "precision", "small": args.small, "figures": figures}))


if __name__ == "__main__":
    main()
