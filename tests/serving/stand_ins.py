"""An application for ``test_stand_ins.py``: in a process of its own, because Serve reads its mode from the environment
when it is imported.

    python -m tests.serving.stand_ins RUN_FOLDER PORT

The ingress, the language model and all that is between them are the real ones, but that a question can stop the
model's engine. The encoder is a stand-in: its arrays have the sizes of the 7B model's in fp16 (CLIP with its projector:
576 x 4096, a sound of 20 windows: 1000 x 4096), some bytes crash it, and some hold it up. A line ``redeploy`` on
standard input replaces the application by one with other settings.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import ray
from ray import serve
from ray.serve.config import HTTPOptions

from serve.app import deployment_options
from serve.calls import MediaFile, Task, Told
from serve.ingress import Ingress
from serve.language import LanguageModel
from unimoe_ray import config
from unimoe_ray.config import Config
from unimoe_ray.evaluation.evaluate import final_model

SHAPES = {"image": (576, 4096), "video": (576, 4096), "audio": (1000, 4096), "speech": (1000, 4096)}
DEADLY = b"kills the encoder"
HELD = b"waits until there is the file: "  # its path, and after a NUL what makes it another image
STOP_ENGINE = "stops the engine unless this file exists: "


class StandIn:
    """The same array for the same bytes."""

    async def encode(self, file: MediaFile) -> np.ndarray:
        if file.data.startswith(HELD):
            path = Path(os.fsdecode(file.data.removeprefix(HELD).split(b"\0")[0]))
            while not path.exists():
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.2)  # others come in meanwhile, and go down with it
        if file.data.startswith(DEADLY):
            os._exit(1)
        rng = np.random.default_rng(int.from_bytes(file.data[:4]))
        return (0.1 * rng.standard_normal(SHAPES[file.kind], dtype=np.float32)).astype(np.float16)


class StoppingModel(LanguageModel):
    """The real one, with an engine that fails when a question says so."""

    async def generate(self, task: Task, *soft_tokens: np.ndarray) -> AsyncIterator[Told]:
        _, told, path = task.turns[-1][0].partition(STOP_ENGINE)
        if told and not Path(path).exists():
            Path(path).touch()
            self._engine.step = None
        async for item in super().generate(task, *soft_tokens):
            yield item


def deploy(settings: Config) -> None:
    tree, folder = settings.model_dump(mode="json"), str(final_model(settings))
    encoder = serve.deployment(**deployment_options("encoder", settings.serving.image))(StandIn).bind()
    language = serve.deployment(**deployment_options("language", settings.serving.language))(StoppingModel)
    ingress = serve.deployment(**deployment_options("ingress", settings.serving.ingress))(Ingress)
    handles = dict.fromkeys(SHAPES, encoder)
    serve.run(
        ingress.bind(tree["serving"], settings.name, "speech", "any", handles, language.bind(tree, folder)),
        name=settings.name,
    )
    print("ready", flush=True)


def main(run: Path, port: int) -> None:
    settings = config.load_run(run)
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, object_store_memory=400 * 2**20)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    deploy(settings)
    for _ in sys.stdin:
        settings.serving.engine.max_running += 1
        deploy(settings)
    serve.delete(settings.name)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
