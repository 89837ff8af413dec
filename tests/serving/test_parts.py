"""The parts of the serving application that need neither Ray nor HTTP."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.cache import MAX_ENTRIES, EmbeddingCache
from serve.calls import MediaFile, Task
from serve.suspects import REMEMBERED_S, Gate, Suspects
from unimoe_ray.inference.request import SamplingParams

ROOT = Path(__file__).parents[2]


# Embedding cache


def test_the_least_recently_used_goes_first():
    cache: EmbeddingCache[str] = EmbeddingCache(100)
    for name in "abc":
        cache.put(name, name.upper())
        cache.measured(name, 40)
        assert cache.get("a") == "A"
    assert (cache.get("b"), cache.get("c"), cache.nbytes) == (None, "C", 80)


def test_what_is_larger_than_the_whole_cache_is_not_kept():
    cache: EmbeddingCache[str] = EmbeddingCache(100)
    cache.put("a", "A")
    cache.measured("a", 101)
    assert cache.get("a") is None and cache.nbytes == 0


def test_an_entry_under_way_is_shared_and_their_number_is_bounded():
    cache: EmbeddingCache[int] = EmbeddingCache(100)
    for number in range(MAX_ENTRIES + 5):
        cache.put(str(number), number)
    assert len(cache) == MAX_ENTRIES and cache.get("4") is None and cache.get("5") == 5


def test_a_lost_value_is_dropped_but_not_its_successor():
    cache: EmbeddingCache[object] = EmbeddingCache(100)
    lost, successor = object(), object()
    cache.put("a", successor)
    cache.drop("a", lost)
    assert cache.get("a") is successor
    cache.drop("a", successor)
    assert cache.get("a") is None


def test_an_array_is_kept_as_long_as_its_entry():
    cache: EmbeddingCache[object] = EmbeddingCache(100)
    lost, successor, array = object(), object(), np.zeros(3)
    cache.put("a", successor)
    cache.keep("a", lost, np.ones(3))
    assert cache.value("a") is None and cache.value("b") is None
    cache.keep("a", successor, array)
    assert cache.value("a") is array
    cache.put("a", lost)
    assert cache.value("a") is None, "what is encoded again is another array"


def test_what_is_put_or_dropped_twice_counts_once():
    cache: EmbeddingCache[str] = EmbeddingCache(100)
    for size in (40, 60, 20):
        cache.put("a", "A")
        cache.measured("a", size)
        assert cache.nbytes == size
    for _ in range(2):
        cache.drop("a", "A")
    assert cache.nbytes == 0


def test_a_cache_of_no_bytes_keeps_nothing():
    cache: EmbeddingCache[str] = EmbeddingCache(0)
    cache.put("a", "A")
    assert cache.get("a") is None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 60)), max_size=60))
def test_the_bound_in_bytes_holds(uses):
    cache: EmbeddingCache[str] = EmbeddingCache(100)
    for key, size in uses:
        if cache.get(key) is None:
            cache.put(key, key)
            cache.measured(key, size)
        assert cache.nbytes <= 100


# Suspects


def test_a_crash_makes_a_suspect_and_two_crashes_alone_a_culprit():
    suspects = Suspects()
    assert not suspects.is_suspect("x")
    suspects.crashed("x", alone=False)
    assert suspects.is_suspect("x") and not suspects.is_refused("x")
    suspects.crashed("x", alone=False)
    assert not suspects.is_refused("x"), "in company again: still no proof"
    suspects.crashed("x", alone=True)
    assert not suspects.is_refused("x"), "the replica may have been killed"
    suspects.crashed("x", alone=False)
    suspects.crashed("x", alone=True)
    assert suspects.is_refused("x")
    suspects.crashed("x", alone=False)
    assert suspects.is_refused("x")


def test_who_ran_to_the_end_is_cleared():
    suspects = Suspects()
    suspects.crashed("x", alone=False)
    suspects.crashed("x", alone=True)
    suspects.clear("x")
    assert not suspects.is_suspect("x")
    suspects.crashed("x", alone=True)
    assert not suspects.is_refused("x"), "one death since it was cleared"


def test_crashes_are_forgotten_after_an_hour():
    now = [0.0]
    suspects = Suspects(lambda: now[0])
    suspects.crashed("x", alone=True)
    suspects.crashed("x", alone=True)
    now[0] = REMEMBERED_S - 1
    assert suspects.is_refused("x")
    now[0] = REMEMBERED_S + 1
    assert not suspects.is_suspect("x")


def test_one_alone_waits_for_the_others_and_keeps_new_ones_out():
    async def main() -> list[str]:
        gate, order, leave = Gate(), [], asyncio.Event()

        async def enter(name: str, alone: bool, until: asyncio.Event) -> None:
            async with gate.enter(alone):
                order.append(f"{name} in")
                await until.wait()
                order.append(f"{name} out")

        at_once = asyncio.Event()
        at_once.set()
        tasks = [asyncio.create_task(enter(name, False, leave)) for name in ("first", "second")]
        await asyncio.sleep(0.01)
        tasks.append(asyncio.create_task(enter("alone", True, at_once)))
        await asyncio.sleep(0.01)
        tasks.append(asyncio.create_task(enter("late", False, at_once)))
        await asyncio.sleep(0.01)
        assert order == ["first in", "second in"]
        leave.set()
        await asyncio.gather(*tasks)
        return order

    order = asyncio.run(main())
    assert order.index("alone in") > max(order.index("first out"), order.index("second out"))
    assert order.index("late in") > order.index("alone out")


def test_a_guest_who_is_cancelled_leaves_the_gate():
    async def main() -> None:
        gate = Gate()

        async def stay() -> None:
            async with gate.enter(alone=False):
                await asyncio.Event().wait()

        guest = asyncio.create_task(stay())
        await asyncio.sleep(0.01)
        guest.cancel()
        async with asyncio.timeout(60), gate.enter(alone=True):
            pass

    asyncio.run(main())


# Keys


def test_the_key_of_a_request_is_its_content():
    def key(question: str = "what?", seed: int | None = None, media: tuple[str, ...] = ()) -> str:
        return Task("id", ((question, ""),), (), SamplingParams(seed=seed)).key(list(media))

    assert key() == key(seed=3)
    assert len({key(), key("who?"), key(media=("image/1",)), key("\ud800")}) == 4


def test_the_key_of_a_file_is_kind_and_content():
    keys = {MediaFile(kind, data, "here").key for kind in ("image", "video") for data in (b"a", b"b")}
    assert len(keys) == 4 and MediaFile("image", b"a", "there").key in keys


# What the files promise


def test_the_ingress_imports_neither_torch_nor_transformers():
    """It starts in seconds, and many of them fit on a small machine."""
    code = "import sys, serve.ingress; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not {"torch", "transformers", "peft", "deepspeed", "av", "PIL"} & set(modules.split())


def test_the_dashboard_shows_metrics_that_exist():
    dashboard = json.loads((ROOT / "k8s" / "grafana" / "serving.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"ray_(unimoe_\w+)", " ".join(queries))}
    exported = set(metric_names())
    assert len(queries) >= 10 and shown <= exported
    assert exported - shown <= {"unimoe_steps_total", "unimoe_finished_total", "unimoe_cancelled_total"} | {
        "unimoe_engine_step_tokens",
        "unimoe_encoder_batch_seconds",
        "unimoe_encoder_batch_cost",
        "unimoe_embedding_cache_bytes",
        "unimoe_encoder_fallbacks_total",
    }


def metric_names() -> list[str]:
    """Names of all metrics that the deployments make."""
    code = (
        "import serve.metrics as m; names = []\n"
        "for kind in ('Counter', 'Gauge', 'Histogram'):\n"
        "    setattr(m, kind, lambda name, *rest, **more: names.append(name))\n"
        "m.IngressMetrics(); m.EncoderMetrics(); m.LanguageMetrics(()); print(*names)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.split()


def test_the_serve_config_of_the_run_is_yaml_that_kuberay_takes(tmp_path):
    """One string of YAML without anchors or tags (KubeRay's serveConfigV2)."""
    from serve.app import serve_config
    from tests.tiny import tiny_config

    text = yaml.safe_dump(serve_config(tiny_config(tmp_path)), sort_keys=False)
    assert "&" not in text and "!!" not in text and yaml.safe_load(text)["applications"][0]["route_prefix"] == "/"
