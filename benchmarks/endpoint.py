"""The endpoint beside a bare uvicorn app around the same engine: tokens per second, time to the first token.

    python benchmarks/endpoint.py               16 streams of 64 tokens, both models of serving.py
    python benchmarks/endpoint.py --throughput  with Serve's throughput mode (HAProxy and gRPC)
    python benchmarks/endpoint.py --published   with encoders of the published model's sizes
    python benchmarks/endpoint.py --small       the small model, 4 streams, two rounds: does it run, are the texts equal

``endpoint`` is ``unimoe serve`` as users start it: proxy, ingress, encoders, language model, each in its process.
``bare`` is the least that could be had: one process with uvicorn, Starlette, ``AsyncEngine`` and the same weights,
that reads a message, encodes it, and writes each output of the engine as an event; it checks nothing, keeps no
embeddings, survives nothing. Both have the same settings of the engine (``messages_per_s`` too) and as many threads.
They stand side by side and are asked in turns, in another order each round, with other questions each round but the
same for both, all streams at once, greedily; texts must be equal. TTFT is the mean over the streams, from sending to
the first event with text. A figure is the median over rounds, a ratio the median of the ratios within each round; CPU
time is that of all rounds.

The tokenizer knows some hundred words and pieces; the vocabulary is filled up to that of serving.py with entries whose
logits are 0, which no answer has, so that a step costs the same.

Media: a file (a JPEG of 640x480, 10 s of speech) is asked about, then once more with another question; the second finds
its soft tokens in the cache. The encoders are the small towers of the preset mini, so a cache gains least here; or
(``--published``) CLIP ViT-L/14 at 336 pixels and Whisper small, with random weights.
The client shares the cores with what it measures.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import numpy as np
import psutil
import torch
from PIL import Image
from serving import SIZES, VOCAB
from transformers import CLIPVisionModel, WhisperModel

from tests.ports import free_port
from tests.serving.conftest import serve_run
from tests.serving.media import wav
from tests.tiny import make_servable_run, save_start
from unimoe_ray import config as configuration
from unimoe_ray.config import Config
from unimoe_ray.data.tokenizer import end_token, load_tokenizer
from unimoe_ray.towers import PUBLISHED_SIZES

ROOT = Path(__file__).resolve().parent.parent
NEW = 64
ENDPOINT, BARE = "endpoint", "bare"
# Deployments that a text goes through.
MEASURED = ("ingress", "language")


@dataclass
class Told:
    """One streamed answer. Seconds from sending."""

    text: str = ""
    tokens: int = 0
    first_s: float = 0.0


@dataclass
class Round:
    tokens_per_s: float
    ttft_s: float


def bare_app(folder: Path):
    """The app of the bare process."""
    from contextlib import asynccontextmanager

    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, StreamingResponse
    from starlette.routing import Route

    from unimoe_ray.data.schema import Sample
    from unimoe_ray.evaluation.evaluate import final_model
    from unimoe_ray.inference.async_engine import AsyncEngine
    from unimoe_ray.inference.engine import Engine
    from unimoe_ray.inference.request import GenerationRequest, Output, SamplingParams
    from unimoe_ray.training.checkpoint import load_model

    run = configuration.load_run(folder)
    torch.set_num_threads(max(1, int(run.serving.language.num_cpus)))
    model, info, tokenizer = load_model(final_model(run))
    template = info.make_template(tokenizer)
    inner = Engine(model, tokenizer, run.serving.engine, keep_weights=False)
    engine: AsyncEngine

    @asynccontextmanager
    async def running(app: Starlette) -> AsyncIterator[None]:
        nonlocal engine
        engine = AsyncEngine(inner)
        yield
        engine.close()

    async def answer(request: Request) -> StreamingResponse:
        body = json.loads(await request.body())
        ids = template.encode_prompt(Sample("", "", ((body["messages"][0]["content"], ""),), (), {}))
        asked = GenerationRequest(os.urandom(8).hex(), ids, [], SamplingParams(body["max_completion_tokens"]))
        return StreamingResponse(events(asked), media_type="text/event-stream")

    async def events(asked: GenerationRequest) -> AsyncIterator[str]:
        tokens = 0
        async for item in engine.generate(asked):
            if isinstance(item, Output):
                tokens += len(item.token_ids)
                event = {"choices": [{"delta": {"content": item.text}, "finish_reason": item.finish_reason}]}
                if item.finish_reason is not None:
                    event["usage"] = {"completion_tokens": tokens}
                yield f"data: {json.dumps(event)}\n\n"
        yield "data: [DONE]\n\n"

    async def health(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    routes = [Route("/v1/chat/completions", answer, methods=["POST"]), Route("/health", health)]
    return Starlette(routes=routes, lifespan=running)


def serve_bare(folder: Path, port: int) -> None:
    import uvicorn

    uvicorn.run(bare_app(folder), host="127.0.0.1", port=port, log_level="warning")


async def listen(client: aiohttp.ClientSession, url: str, content: object) -> Told:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_completion_tokens": NEW,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    told, sent = Told(), time.perf_counter()
    async with client.post(f"{url}/v1/chat/completions", json=body) as reply:
        if reply.status != 200:
            raise SystemExit(f"{url}: {await reply.text()}")
        async for line in reply.content:
            payload = line.decode().strip().removeprefix("data: ")
            if not payload or payload == "[DONE]":
                continue
            event = json.loads(payload)
            if "error" in event:
                raise SystemExit(f"{url}: {event['error']['message']}")
            told.tokens = (event.get("usage") or {}).get("completion_tokens", told.tokens)
            if text := "".join(choice["delta"].get("content", "") for choice in event["choices"]):
                told.first_s = told.first_s or time.perf_counter() - sent
                told.text += text
    return told


async def ask_all(client: aiohttp.ClientSession, url: str, questions: list[str]) -> tuple[Round, list[str]]:
    begun = time.perf_counter()
    answers = await asyncio.gather(*(listen(client, url, question) for question in questions))
    seconds = time.perf_counter() - begun
    speed = sum(told.tokens for told in answers) / seconds
    first = statistics.mean(told.first_s for told in answers if told.text)
    return Round(speed, first), [told.text for told in answers]


def make_questions(streams: int, number: int) -> list[str]:
    rng = random.Random(number)
    words = ["what", "is", "this", "a", "red", "circle"]
    return [" ".join(rng.choices(words, k=rng.randint(10, 30))) for _ in range(streams)]


def jpeg(seed: int) -> bytes:
    """Some 100 KB, as a photograph of this size."""
    coarse = np.random.default_rng(seed).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def media_part(kind: str, seed: int) -> dict:
    if kind == "picture":
        data = base64.b64encode(jpeg(seed)).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
    data = base64.b64encode(wav(seed, 10.0)).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav", "kind": "speech"}}


def cpu_seconds(processes: dict[str, psutil.Process]) -> dict[str, float]:
    """CPU time so far of the deployments of the endpoint, of Serve's proxy, and of the bare app."""
    seconds = {BARE: sum(processes[BARE].cpu_times()[:2])}
    for process in processes[ENDPOINT].children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            title = re.match(r"ray::(?:ServeReplica:[^:]*:)?(\w+)", " ".join(process.cmdline()))
            if title and title[1] in (*MEASURED, "ProxyActor"):
                name = "proxy" if title[1] == "ProxyActor" else title[1]
                seconds[name] = seconds.get(name, 0) + sum(process.cpu_times()[:2])
    return seconds


async def measure(
    urls: dict[str, str], processes: dict[str, psutil.Process], streams: int, rounds: int
) -> tuple[dict[str, list[Round]], dict, dict]:
    """Rounds of both, by kind of media the ratios of a cached file's TTFT to that of a new one, and the CPU seconds of
    a text request by process."""
    found: dict[str, list[Round]] = {name: [] for name in urls}
    before: dict[str, float] = {}
    cached: dict[str, list[float]] = {"picture": [], "speech": []}
    timeout = aiohttp.ClientTimeout(total=120)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as client:
        for number in range(-1, rounds):  # The round before the first warms up.
            if number == 0:
                before = cpu_seconds(processes)
            questions, texts = make_questions(streams, number), {}
            for name in random.Random(number).sample(list(urls), len(urls)):
                result, texts[name] = await ask_all(client, urls[name], questions)
                if number >= 0:
                    found[name].append(result)
            if texts[ENDPOINT] != texts[BARE]:
                raise SystemExit(f"round {number}: the endpoint and the bare app give different texts")
        after = cpu_seconds(processes)
        cpu = {name: (after[name] - before.get(name, 0)) / rounds / streams for name in after}
        for number in range(-1, rounds):
            for kind, ratios in cached.items():
                part = media_part(kind, number + 1)
                first, again = [
                    await listen(client, urls[ENDPOINT], [part, {"type": "text", "text": question}])
                    for question in make_questions(2, 1000 + number)
                ]
                if number >= 0:
                    ratios.append(again.first_s / first.first_s)
    return found, cached, cpu


def wait_for(url: str, process: subprocess.Popen, seconds: float = 120) -> None:
    import requests

    deadline = time.monotonic() + seconds
    while True:
        try:
            requests.get(f"{url}/health", timeout=5).raise_for_status()
            return
        except requests.RequestException as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the bare app did not start: {error}") from None
            time.sleep(0.3)


def published_towers(folder: Path) -> dict:
    """Their settings."""
    clip, whisper = CLIPVisionModel(PUBLISHED_SIZES["clip"]), WhisperModel(PUBLISHED_SIZES["whisper"])
    towers = {"image": {"name": "clip"}, "speech": {"name": "whisper"}}
    for network, tower in zip((clip, whisper), towers.values(), strict=True):
        tower["path"] = str(folder / tower["name"])
        network.save_pretrained(tower["path"])
    return towers


def make_run(folder: Path, size: str, serving: dict, towers: dict | None = None) -> Config:
    language = SIZES[size] | {"num_heads": 8, "num_kv_heads": 8, "max_positions": 2048 if towers else 1024}
    run = make_servable_run(folder, model={"language": language, "towers": towers or {}}, serving=serving)
    run.info = replace(run.info, vocab_size=VOCAB)
    tokenizer = load_tokenizer(run.tokenizer)
    torch.manual_seed(0)
    model = run.info.build()
    with torch.no_grad():
        for parameter in model.language.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.06)
        model.match_text_rms()
        # No answer ends before its time, nor has tokens without a text of their own, as parts of a character are.
        texts = [tokenizer.decode([token]) for token in range(tokenizer.get_vocab_size())]
        has_text = [text.isascii() and bool(text.strip()) for text in texts]
        has_text[end_token(tokenizer)] = False
        spoken = torch.tensor(has_text + [False] * (VOCAB - len(has_text)))
        model.language.get_output_embeddings().weight[~spoken] = 0
    save_start(run, model, "tune", "tune")
    return run.config


def run_both(settings: Config, streams: int, rounds: int) -> tuple[dict[str, list[Round]], dict, dict]:
    port = free_port()
    command = [sys.executable, str(ROOT / "benchmarks/endpoint.py"), "--bare", str(settings.run_dir), str(port)]
    bare = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    serving = serve_run(settings)
    try:
        endpoint = next(serving)
        urls = {ENDPOINT: endpoint.url, BARE: f"http://127.0.0.1:{port}"}
        wait_for(urls[BARE], bare)
        processes = {ENDPOINT: psutil.Process(endpoint.process.pid), BARE: psutil.Process(bare.pid)}
        return asyncio.run(measure(urls, processes, streams, rounds))
    finally:
        serving.close()
        bare.terminate()
        bare.wait(20)


def report(size: str, found: dict[str, list[Round]], cached: dict[str, list[float]], cpu: dict[str, float]) -> dict:
    print(f"\n{size:10}{'tokens/s':>10}{'TTFT ms':>10}")
    figures: dict = {}
    for name, results in found.items():
        tokens = statistics.median(result.tokens_per_s for result in results)
        first = statistics.median(result.ttft_s for result in results) * 1e3
        print(f"{name:10}{tokens:>10.0f}{first:>10.0f}")
        figures[name] = {"tokens_per_s": round(tokens, 1), "ttft_ms": round(first, 1)}
    pairs = list(zip(found[ENDPOINT], found[BARE], strict=True))
    speed = statistics.median(ours.tokens_per_s / bare.tokens_per_s for ours, bare in pairs)
    ttft = statistics.median(ours.ttft_s / bare.ttft_s for ours, bare in pairs)
    figures["endpoint_over_bare"] = {"tokens_per_s": round(speed, 3), "ttft": round(ttft, 3)}
    figures["cached_over_new_ttft"] = {kind: round(statistics.median(values), 3) for kind, values in cached.items()}
    figures["cpu_ms_per_request"] = {name: round(1e3 * seconds, 1) for name, seconds in cpu.items()}
    print(f"CPU ms of a request: {figures['cpu_ms_per_request']}")
    print(f"endpoint over bare: tokens/s {speed:.2f}, TTFT {ttft:.2f}")
    print(f"TTFT of a cached file over that of a new one: {figures['cached_over_new_ttft']}", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--throughput", action="store_true")
    parser.add_argument(
        "--messages-per-s", type=float, help="of a stream, for both; the default of the engine if not given"
    )
    parser.add_argument("--published", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--bare", nargs=2, metavar=("RUN", "PORT"), help="be the bare app, instead")
    args = parser.parse_args()
    if args.bare:
        serve_bare(Path(args.bare[0]), int(args.bare[1]))
        return
    if args.small:
        args.sizes, args.streams, args.rounds = ["h256"], 4, 2
    serving: dict = {"throughput_mode": args.throughput}
    serving |= {name: {"max_replicas": 1} for name in ("ingress", "image", "speech", "audio")}
    if args.messages_per_s:
        serving["engine"] = {"messages_per_s": args.messages_per_s}
    record: dict = {"benchmark": "endpoint", "streams": args.streams, "rounds": args.rounds}
    record |= {
        "throughput_mode": args.throughput,
        "published_towers": args.published,
        "load": os.getloadavg()[0],
        "sizes": {},
    }
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            towers = published_towers(Path(folder)) if args.published else None
            settings = make_run(Path(folder), size, serving, towers)
            found, cached, cpu = run_both(settings, args.streams, args.rounds)
        record["messages_per_s"] = settings.serving.engine.messages_per_s
        record["sizes"][size] = report(size, found, cached, cpu)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
