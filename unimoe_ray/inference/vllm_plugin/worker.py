"""vLLM's engine in this process, asked over standard input and answering over standard output; see ``vllm_engine.py``.

python -m unimoe_vllm.worker FOLDER '{"max_model_len": ..., other arguments of vllm.LLM}'
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from typing import Any, BinaryIO

import numpy as np
import torch
from unimoe_vllm.frames import read_frame, write_frame
from vllm import LLM, ModelRegistry, SamplingParams
from vllm.sampling_params import RequestOutputKind


def main() -> None:
    # Replies go where stdout was; libraries that print must not disturb them.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    ModelRegistry.register_model("UniMoELlamaForCausalLM", "unimoe_vllm.model:UniMoELlamaForCausalLM")
    llm = LLM(sys.argv[1], **json.loads(sys.argv[2]))
    (mixtures,) = llm.apply_model(_mixtures)
    for mixture in mixtures:
        mixture.routed.zero_()  # what vLLM tried when it started
    write_frame(replies, {"ready": True})
    wishes: queue.Queue = queue.Queue()
    threading.Thread(target=_read, args=(sys.stdin.buffer, wishes), daemon=True).start()
    _serve(llm.llm_engine, wishes, replies, mixtures)
    os._exit(0)  # some of its threads never end


def _mixtures(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if type(module).__name__ == "Mixture"]


def _read(stream: BinaryIO, wishes: queue.Queue) -> None:
    while (frame := read_frame(stream)) is not None:
        wishes.put(frame)
    wishes.put(None)


def _serve(engine: Any, wishes: queue.Queue, replies: BinaryIO, mixtures: list[torch.nn.Module]) -> None:
    """Until the other side closes the pipe."""
    while True:
        while not wishes.empty() or not engine.has_unfinished_requests():
            frame = wishes.get()
            if frame is None:
                return
            header, arrays = frame
            if header["wish"] == "abort":
                engine.abort_request([header["id"]], internal=False)
                continue
            params = SamplingParams(output_kind=RequestOutputKind.DELTA, **header["params"])
            prompt = {"prompt_embeds": torch.from_numpy(arrays[0]).to(engine.model_config.dtype)}
            try:
                engine.add_request(header["id"], prompt, params)
            except ValueError as error:
                write_frame(replies, {"outputs": [{"id": header["id"], "tokens": [], "error": str(error)}]})
        outputs = [_output(output) for output in engine.step()]
        if outputs:
            routed = [mixture.routed.cpu().numpy() for mixture in mixtures]
            write_frame(replies, {"outputs": outputs}, [np.stack(routed)] if routed else [])


def _output(output: Any) -> dict[str, Any]:
    (answer,) = output.outputs
    described = None
    if answer.logprobs is not None:
        # Of each token: its own first, as vLLM has it, then the others by rank.
        described = [
            [[token, value.logprob, value.rank] for token, value in values.items()] for values in answer.logprobs
        ]
    return {
        "id": output.request_id,
        "tokens": list(answer.token_ids),
        "logprobs": described,
        "finish": answer.finish_reason,
        "cached": output.num_cached_tokens,
    }


if __name__ == "__main__":
    main()
