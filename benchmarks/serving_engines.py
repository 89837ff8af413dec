"""The engines that ``serving.py`` compares, each in a process of its own, fed with lines of JSON.

A task is ``{"prompts": [[id, ...], ...], "new": n}``; all its requests arrive at once and are answered greedily, the
end token being one like any other. The reply is ``{"tokens": [[id, ...], ...], "first_s": [...], "wall_s": s,
"cpu_s": s}``. vLLM's process runs in an environment without this package: here are lazy imports only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

Answer = tuple[list[list[int]], list[float]]  # tokens and seconds to the first one, of each request


def ours(folder: Path) -> Callable[[list[list[int]], int], Answer]:
    """The package's engine, detokenizing as it does when it serves."""
    import torch
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    from unimoe_ray.config.model import ModelConfig
    from unimoe_ray.config.serving import EngineConfig
    from unimoe_ray.inference.engine import Engine
    from unimoe_ray.inference.request import GenerationRequest, SamplingParams
    from unimoe_ray.model.unimoe import UniMoE

    settings = json.loads((folder / "ours.json").read_text())
    with torch.device("meta"):
        model = UniMoE(ModelConfig(**settings["model"]), settings["vocab_size"], settings["feature_dims"])
        model.make_sparse()
    model.to_empty(device="cpu")
    # Rotary frequencies are no weights: they come with a model that is made in memory.
    decoder = model.language.model
    decoder.rotary_emb = type(decoder.rotary_emb)(model.language.config)
    model.language.load_state_dict(load_file(folder / "ours.safetensors"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = {"max_running": 64, "max_step_tokens": 2048} | json.loads(os.environ.get("ENGINE_CONFIG", "{}"))
    engine = Engine(model, tokenizer, EngineConfig(**config))

    def run(prompts: list[list[int]], new: int) -> Answer:
        begun = time.perf_counter()
        for index, ids in enumerate(prompts):
            engine.add(engine.start(GenerationRequest(str(index), ids, [], SamplingParams(new))))
        tokens: list[list[int]] = [[] for _ in prompts]
        first = [0.0] * len(prompts)
        while engine.has_work:
            outputs = engine.step()
            now = time.perf_counter() - begun
            for output in outputs:
                index = int(output.request_id)
                first[index] = first[index] or now
                tokens[index] += output.token_ids
        return tokens, first

    return run


def _mixtral(folder: Path, experts: str):
    import logging

    import torch
    from transformers import MixtralForCausalLM

    logging.disable(logging.WARNING)
    model = MixtralForCausalLM.from_pretrained(
        folder / "mixtral", dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    model.set_experts_implementation(experts)
    return model


def hf_generate(folder: Path, experts: str = "grouped_mm") -> Callable[[list[list[int]], int], Answer]:
    """One static batch, padded on the left."""
    import torch
    from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

    model = _mixtral(folder, experts)

    class FirstToken(LogitsProcessor):
        at: float | None = None

        def __call__(self, input_ids, scores):
            self.at = self.at or time.perf_counter()
            return scores

    @torch.no_grad()
    def run(prompts: list[list[int]], new: int) -> Answer:
        begun, longest, watch = time.perf_counter(), max(map(len, prompts)), FirstToken()
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        settings = GenerationConfig(
            max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        out = model.generate(
            ids, attention_mask=mask, generation_config=settings, logits_processor=LogitsProcessorList([watch])
        )
        return out[:, longest:].tolist(), [watch.at - begun] * len(prompts)

    return run


def hf_continuous(folder: Path) -> Callable[[list[list[int]], int], Answer]:
    """Continuous batching of transformers; the settings are the best of those tried at 1 and 16 requests."""
    import torch
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    model = _mixtral(folder, "grouped_mm")
    torch.set_grad_enabled(False)
    managers: dict[int, object] = {}

    def manager(blocks: int):
        if blocks not in managers:
            settings = GenerationConfig(max_new_tokens=64, do_sample=False, pad_token_id=0, eos_token_id=-1)
            batching = ContinuousBatchingConfig(
                num_blocks=blocks, page_size=64, max_batch_tokens=1024, allow_block_sharing=False
            )
            managers[blocks] = model.init_continuous_batching(
                generation_config=settings, continuous_batching_config=batching
            )
            managers[blocks].start()
        return managers[blocks]

    def run(prompts: list[list[int]], new: int) -> Answer:
        engine = manager(64 if len(prompts) <= 16 else 4 * len(prompts))
        begun = time.perf_counter()
        place = {engine.add_request(ids, max_new_tokens=new, streaming=True): n for n, ids in enumerate(prompts)}
        tokens: list[list[int]] = [[] for _ in prompts]
        first = [0.0] * len(prompts)
        left = len(prompts)
        while left:
            result = engine.get_result(timeout=120)
            if result is None or result.error:
                raise RuntimeError(f"continuous batching failed: {result and result.error}")
            index = place[result.request_id]
            if len(result.generated_tokens):
                first[index] = first[index] or time.perf_counter() - begun
            if result.is_finished():
                tokens[index], left = list(result.generated_tokens), left - 1
        return tokens, first

    return run


def vllm(folder: Path) -> Callable[[list[list[int]], int], Answer]:
    """vLLM's engine in this process, eager (faster than compiled here), without detokenization."""
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(folder / "mixtral"),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        enable_prefix_caching=False,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
    ).llm_engine

    def run(prompts: list[list[int]], new: int) -> Answer:
        params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
        stamp, begun = time.time_ns(), time.perf_counter()
        for index, ids in enumerate(prompts):
            engine.add_request(f"{stamp}/{index}", {"prompt_token_ids": ids}, params)
        tokens: list[list[int]] = [[] for _ in prompts]
        first = [0.0] * len(prompts)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter() - begun
            for output in outputs:
                # The engine adds a suffix of its own to the id.
                index = int(output.request_id.split("/")[1].split("-")[0])
                first[index] = first[index] or now
                tokens[index] = list(output.outputs[0].token_ids)
        return tokens, first

    return run


ENGINES = {"ours": ours, "HF generate": hf_generate, "HF continuous": hf_continuous, "vLLM": vllm}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("threads", type=int)
    args = parser.parse_args()
    # Replies go where stdout was; libraries that print must not disturb them.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(args.threads)
    run = ENGINES[args.engine](args.folder)
    print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__}), file=replies, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        cpu, wall = time.process_time(), time.perf_counter()
        tokens, first = run(task["prompts"], task["new"])
        reply = {"tokens": tokens, "first_s": first, "wall_s": time.perf_counter() - wall}
        print(json.dumps(reply | {"cpu_s": time.process_time() - cpu}), file=replies, flush=True)
    os._exit(0)  # the threads of some engines never end


if __name__ == "__main__":
    main()
