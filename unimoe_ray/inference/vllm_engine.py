"""vLLM behind the interface of our engine: a process in an environment of its own, which ``serve/vllm_env.sh`` makes.

Prompts are checked, spliced and embedded here, tokens become text here; there, ``vllm_plugin`` runs vLLM's own
scheduler, cache and kernels on the model's weights. Greedy answers are those of our engine but for rounding. What is
drawn with a seed is another answer than there, a stream that goes on elsewhere draws anew, a request on ``trial`` has
company, and experts are counted for all requests together only (``stats``).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import queue
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from tokenizers import Tokenizer

from unimoe_ray.config.serving import EngineConfig
from unimoe_ray.data.tokenizer import end_token
from unimoe_ray.errors import UnimoeError
from unimoe_ray.inference.request import (
    KINDS,
    Admitted,
    EngineBusy,
    EngineStopped,
    GenerationRequest,
    Output,
    TokenLogprob,
)
from unimoe_ray.inference.sequence import Sequence, embed_next
from unimoe_ray.inference.text import token_bytes
from unimoe_ray.inference.vllm_plugin.frames import read_frame, write_frame
from unimoe_ray.model.language import SparseFeedForward, mixtures
from unimoe_ray.model.unimoe import UniMoE

logger = logging.getLogger(__name__)
PLUGIN = Path(__file__).with_name("vllm_plugin")
BLOCK = 32  # tokens whose keys and values are shared as a whole; vLLM's default on CPUs is 128
STOPPED = "vLLM's process has stopped"


class VllmEngine:
    """A ``Backend``. Made anywhere, called in one event loop.

    The model's language part is of no use afterwards. Raises UnimoeError when vLLM does not start, with its last words.
    """

    def __init__(self, model: UniMoE, tokenizer: Tokenizer, config: EngineConfig, threads: int = 1):
        language = model.language.config
        self.tokenizer, self.config, self.max_positions = tokenizer, config, model.max_positions
        self._sizes = (language.hidden_size, language.vocab_size, self.max_positions)
        self._table = model.language.get_input_embeddings().weight.detach().float().cpu().clone()
        self._end = end_token(tokenizer)
        sparse = mixtures(model)
        self.routed = np.zeros((len(sparse), sparse[0].num_experts if sparse else 0), np.int64)
        self.expert_load = np.zeros((len(KINDS), 0, 0), np.int64)  # nobody tells whose tokens they were
        counted = ("steps", "prompt_tokens", "reused_tokens", "generated_tokens", "finished", "cancelled")
        self.counters = dict.fromkeys(counted, 0)
        self.queue_seconds: deque[float] = deque(maxlen=4096)
        self.step_tokens: deque[int] = deque(maxlen=4096)
        self.kv_tokens = config.max_running * self.max_positions if config.kv_tokens == "auto" else config.kv_tokens
        self._streams: dict[str, asyncio.Queue[dict[str, Any] | EngineStopped]] = {}
        self._running: dict[str, Sequence] = {}
        self._wishes: queue.Queue[tuple[dict[str, Any], list[np.ndarray]] | None] = queue.Queue()
        self._folder = tempfile.TemporaryDirectory(prefix="unimoe-vllm-")
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  open as long as the process
        self._loop: asyncio.AbstractEventLoop | None = None
        arguments = self._arguments(model)
        write_model(model, Path(self._folder.name))
        for parameter in model.language.parameters():
            parameter.data = parameter.data.new_empty(0)
        self._process = self._start(arguments, threads)
        for work in (self._write, self._read):
            threading.Thread(target=work, name="vllm", daemon=True).start()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Admitted | Output]:
        self.check()
        self._loop = asyncio.get_running_loop()
        if request.id in self._streams:
            raise ValueError(f"request id {request.id} is in use")
        if len(self._streams) >= self.config.max_running + self.config.max_waiting:
            raise EngineBusy(f"{len(self._streams)} requests are being answered or waiting already; try again later")
        sequence = Sequence.start(request, self.tokenizer, *self._sizes)
        embeddings = embed_next([(sequence, sequence.left)], self._table)
        answers = self._streams[request.id] = asyncio.Queue()
        self._running[request.id] = sequence
        self._wishes.put(({"wish": "answer", "id": request.id, "params": self._params(sequence)}, [embeddings.numpy()]))
        self.counters["prompt_tokens"] += sequence.prompt_tokens
        finished = False
        try:
            yield Admitted(sequence.prompt_tokens, sequence.max_new_tokens)
            while not finished:
                answer = await answers.get()
                if isinstance(answer, EngineStopped):
                    raise answer
                output = self._output(sequence, answer)
                finished = output.finish_reason is not None
                yield output
        finally:
            del self._streams[request.id], self._running[request.id]
            self.counters["finished" if finished else "cancelled"] += 1
            self._wishes.put(({"wish": "abort", "id": request.id}, []))  # it may have gone on past a stop string

    def stats(self) -> dict[str, Any]:
        running = min(len(self._running), self.config.max_running)
        return self.counters | {
            "running": running,
            "waiting": len(self._running) - running,
            "kv_tokens": self.kv_tokens,
            "kv_tokens_used": sum(sequence.reserved_tokens for sequence in self._running.values()),
            "routed": self.routed.tolist(),
        }

    def check(self) -> None:
        if self._process.poll() is not None:
            raise EngineStopped(STOPPED)

    def close(self) -> None:
        self._wishes.put(None)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def _arguments(self, model: UniMoE) -> dict[str, Any]:
        """Of ``vllm.LLM``."""
        language, dtype = model.language.config, model.language.get_input_embeddings().weight.dtype
        per_token = 2 * language.num_hidden_layers * language.num_key_value_heads * language.head_dim * dtype.itemsize
        blocks = -(-self.kv_tokens // BLOCK) + self.config.max_running + 1  # the last one of each is partly filled
        return {
            "skip_tokenizer_init": True,
            "dtype": str(dtype).removeprefix("torch."),
            "enforce_eager": True,
            "enable_prompt_embeds": True,
            "enable_prefix_caching": True,
            "block_size": BLOCK,
            "kv_cache_memory_bytes": blocks * BLOCK * per_token,
            "max_model_len": self.max_positions,
            "max_num_seqs": self.config.max_running,
            "max_num_batched_tokens": max(self.config.max_step_tokens, self.config.max_running),
            "max_logprobs": 20,
        }

    def _start(self, arguments: dict[str, Any], threads: int) -> subprocess.Popen:
        environment = os.environ | {
            "PYTHONPATH": self._folder.name,
            "OMP_NUM_THREADS": str(threads),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = [self.config.vllm_python, "-m", "unimoe_vllm.worker", self._folder.name, json.dumps(arguments)]
        try:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
            )
        except OSError as error:
            raise UnimoeError(f"serving.engine.vllm_python: {self.config.vllm_python} can't be run: {error}") from None
        try:
            ready = read_frame(process.stdout)
        except ValueError:
            ready = None
        if ready is None:
            process.kill()
            process.wait()
            self._folder.cleanup()
            raise UnimoeError(f"vLLM did not start ({self.config.vllm_python}): {self._last_words()}")
        return process

    def _params(self, sequence: Sequence) -> dict[str, Any]:
        params = sequence.request.params
        return {
            "max_tokens": sequence.max_new_tokens - len(sequence.generated),
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "seed": sequence.seed if params.temperature else None,
            "logprobs": params.logprobs,
            "frequency_penalty": params.frequency_penalty,
            "presence_penalty": params.presence_penalty,
            "stop_token_ids": [self._end],
            "ignore_eos": True,
            "detokenize": False,
        }

    def _output(self, sequence: Sequence, answer: dict[str, Any]) -> Output:
        """Text of new tokens, up to a stop string."""
        name, text, taken, reason = sequence.request.id, "", [], None
        if "error" in answer:
            return Output(name, finish_reason="error", error=answer["error"])
        for token in answer["tokens"]:
            taken.append(token)
            sequence.generated.append(token)
            text += "" if token == self._end else sequence.text.push(token)
            if sequence.text.stopped or token == self._end:
                reason = "stop"
                break
        if reason is None and len(sequence.generated) >= sequence.max_new_tokens:
            reason = "length"
        if reason is None and answer["finish"] is not None:
            return Output(name, text, tuple(taken), (), "error", error=f"vLLM ended the request: {answer['finish']}")
        if reason is not None and not sequence.text.stopped:
            text += sequence.text.finish()
        self.counters["generated_tokens"] += len(taken)
        kept = [token for token in taken if token != self._end]
        logprobs = tuple(map(self._describe, (answer["logprobs"] or [])[: len(kept)]))
        return Output(name, text, tuple(taken), logprobs, reason)

    def _describe(self, values: list[tuple[int, float, int]]) -> TokenLogprob:
        """vLLM gives the token's own first, then the likeliest by rank."""
        (token, logprob, _), *_ = values
        asked = sorted((rank, other, value) for other, value, rank in values)
        top = tuple((token_bytes(self.tokenizer, other), value) for _, other, value in asked)
        return TokenLogprob(token_bytes(self.tokenizer, token), logprob, top)

    def _write(self) -> None:
        try:
            while (wish := self._wishes.get()) is not None:
                write_frame(self._process.stdin, *wish)
            self._process.stdin.close()
        except OSError:
            return  # the reader learns of it

    def _read(self) -> None:
        error = None
        try:
            while (frame := read_frame(self._process.stdout)) is not None:
                self._loop.call_soon_threadsafe(self._deliver, *frame)
        except ValueError as reason:
            error = reason
        self._process.kill()
        self._process.wait()
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._fail_all, f"{STOPPED}: {error or self._last_words()}")

    def _deliver(self, header: dict[str, Any], arrays: list[np.ndarray]) -> None:
        if arrays:
            self.routed = arrays[0]
        self.counters["steps"] += 1
        for answer in header["outputs"]:
            if answer["id"] in self._streams:
                self._streams[answer["id"]].put_nowait(answer)

    def _fail_all(self, reason: str) -> None:
        for answers in self._streams.values():
            answers.put_nowait(EngineStopped(reason))

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"


def write_model(model: UniMoE, folder: Path) -> None:
    """The language model as the plugin reads it, and the plugin beside it."""
    language = model.language
    state = {name: value.detach().cpu().contiguous() for name, value in language.state_dict().items()}
    if language.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    layers, sparse = language.get_decoder().layers, mixtures(model)
    tree = language.config.to_dict() | {
        "architectures": ["UniMoELlamaForCausalLM"],
        "moe_layers": [n for n, layer in enumerate(layers) if isinstance(layer.mlp, SparseFeedForward)],
        "num_local_experts": sparse[0].num_experts if sparse else 0,
        "num_experts_per_tok": sparse[0].top_k if sparse else 0,
        "dtype": str(next(iter(state.values())).dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(tree))
    (folder / "unimoe_vllm").symlink_to(PLUGIN, target_is_directory=True)
