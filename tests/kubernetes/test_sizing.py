"""Sizes: against hand-made sums and real buffers; what does not fit is said, with what would."""

from __future__ import annotations

import re

import pytest
import torch

from unimoe_ray import config
from unimoe_ray.cli import main
from unimoe_ray.errors import UsageError
from unimoe_ray.inference.kv_cache import KVArena
from unimoe_ray.kuberay import memory
from unimoe_ray.kuberay.manifests import size_lines
from unimoe_ray.kuberay.overlays import OVERLAYS, in_cluster
from unimoe_ray.kuberay.render import render
from unimoe_ray.kuberay.sizing import plan
from unimoe_ray.parameter_table import Sizes

GIB = 2**30
# As ``count_parameters`` finds them, rounded.
SMALL = Sizes(
    language=10_754_304,
    active=6_035_712,
    dense=3_672_320,
    experts=9_437_184,
    connectors={"image": 94_944, "video": 297_216, "audio": 330_240, "speech": 165_120},
    towers={"image": 692_688, "speech": 8_208_384, "audio": 3_729_481},
    trained={"base": 3_672_320, "align": 887_520, "tune": 726_016},
)
EIGHT = Sizes(
    language=37_039_116_288,
    active=11_067_985_920,
    dense=6_738_415_616,
    experts=34_628_173_824,
    connectors={"image": 20_979_712, "video": 20_979_712, "audio": 102_427_648, "speech": 116_936_704},
    towers={"image": 290_911_232, "speech": 88_154_112, "audio": 90_311_792},
    trained={"align/speech": 116_936_704, "experts/image": 113_778_688, "tune": 150_495_232},
)


def planned(preset: str, overlay: str, sizes: Sizes, *overrides: str):
    return plan(in_cluster(config.load(preset, list(overrides)), OVERLAYS[overlay]), OVERLAYS[overlay], sizes)


def terms(need: memory.Need, side: str = "device") -> dict[str, float]:
    return {term.what: term.gib for term in getattr(need, side)}


def test_a_training_rank_by_hand():
    settings = config.load("uni-moe-7b-8e")
    found = terms(memory.training(settings, EIGHT, "tune", 16, on_gpu=True))
    weights = EIGHT.language + sum(EIGHT.connectors.values())
    assert found["weights"] == pytest.approx(weights * 4 / GIB)
    assert found["gradients"] == pytest.approx(150_495_232 * 4 * 17 / 16 / GIB)
    assert found["optimizer"] == pytest.approx(150_495_232 * 12 / 16 / GIB)
    # 32 layers, all with two experts for each token: 15 + 2 x 19 bytes.
    assert found["activations"] == pytest.approx(4096 * 4096 * 32 * (15 + 38) / GIB)
    assert found["logits"] == pytest.approx(4096 * 32000 * (2 + 8) / GIB)
    # Before stage 3 there are no mixtures.
    dense = terms(memory.training(settings, EIGHT, "experts/image", 16, on_gpu=True))
    assert dense["weights"] == pytest.approx((EIGHT.dense + sum(EIGHT.connectors.values())) * 4 / GIB)
    assert dense["activations"] == pytest.approx(4096 * 4096 * 32 * 34 / GIB)


def test_experts_that_training_spreads_over_ranks():
    overrides = ["training.expert_parallel.ep_size=4"]
    whole, spread = (
        memory.training(config.load("uni-moe-7b-8e", given), EIGHT, "tune", 16, on_gpu=True)
        for given in ([], overrides)
    )
    assert whole.device_gib - spread.device_gib == pytest.approx(EIGHT.experts * 4 * 3 / 4 / GIB)
    assert whole.host_gib == spread.host_gib
    auto = config.load("uni-moe-7b-8e", ["training.expert_parallel.ep_size=auto"])
    assert [memory.expert_ranks(auto, ranks) for ranks in (1, 3, 4, 16)] == [1, 3, 4, 8]
    sized = planned("uni-moe-7b-8e", "gpu", EIGHT, *overrides)
    assert sized.placement[0].startswith("training: 8 experts over 4 ranks") and "71.4 GiB of 79" in sized.placement[0]
    assert not any("a training rank" in problem for problem in sized.problems)


def test_without_a_gpu_all_of_it_is_in_the_hosts_memory_in_fp32():
    settings = config.load("mini")
    on_cpu, on_gpu = (memory.training(settings, SMALL, "tune", 2, on_gpu=gpu) for gpu in (False, True))
    assert on_cpu.device == () and on_gpu.device_gib > 0
    assert terms(on_cpu, "host")["activations"] == pytest.approx(2 * terms(on_gpu)["activations"])


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_kv_cache_is_as_large_as_the_engines(on_gpu):
    settings = config.load("mini", ["serving.engine.kv_tokens=512"])
    language = settings.model.language
    arena = KVArena(
        language.num_layers,
        512,
        language.num_kv_heads,
        language.hidden_size // language.num_heads,
        torch.bfloat16 if on_gpu else torch.float32,
    )
    real = sum(tensor.nbytes for tensor in (*arena.keys, *arena.values))
    found = terms(memory.language_model(settings, SMALL, on_gpu), "device" if on_gpu else "host")
    assert found["KV cache"] * GIB == pytest.approx(real)


@pytest.mark.parametrize(("preset", "overlay", "sizes"), [("mini", "cpu-mini", SMALL), ("uni-moe-7b-8e", "gpu", EIGHT)])
def test_the_arithmetic_that_is_shown_gives_what_is_asked_for(preset, overlay, sizes):
    for pod in planned(preset, overlay, sizes).pods.values():
        shown, total = re.fullmatch(r"(.*) = ([\d.]+) GiB", pod.arithmetic).groups()
        summed = 0.0
        # ``8 x [a 1.0 (why) + b 2.0 (why)] + c 3.0 (why)``, the reasons taken out, innermost first.
        while "(" in shown:
            shown = re.sub(r"\([^()]*\)", "", shown)
        for count, inside, alone in re.findall(r"(\d+) x \[([^]]*)\]|([^+\[\]]+)", shown.replace("] +", "]")):
            numbers = [float(part.split()[-1]) for part in (inside or alone).split("+") if part.strip()]
            summed += int(count or 1) * sum(numbers)
        assert float(total) == pod.memory_gib
        assert summed <= pod.memory_gib + 0.05 and pod.memory_gib - summed < 0.25 + 0.05, pod.arithmetic


def test_what_does_not_fit_is_named_with_the_key_that_would_change_it():
    sized = planned("uni-moe-7b-8e", "gpu", EIGHT)
    assert any(
        line.startswith("train: a training rank, tune needs 168.2 GiB on its GPU, but kubernetes.nodes.large_gpu")
        for line in sized.problems
    )
    with pytest.raises(UsageError, match="memory_gib is 58.*unimoe k8s size --config uni-moe-7b-8e"):
        render(config.load("uni-moe-7b-8e"), OVERLAYS["gpu"], EIGHT, "uni-moe-7b-8e")
    larger = ("kubernetes.nodes.large_gpu.gpu_memory_gib=192", "kubernetes.nodes.cpu.memory_gib=256")
    assert planned("uni-moe-7b-8e", "gpu", EIGHT, *larger).problems == []


def test_experts_go_over_as_few_gpus_as_hold_them_and_none_is_forgotten():
    for line in planned("uni-moe-7b-8e", "gpu", EIGHT).placement:
        placed = [int(expert) for expert in re.findall(r"(\d+) \(", line)]
        assert sorted(placed) == list(range(8)), line
    settings = config.load("uni-moe-7b-8e")
    need = memory.language_model(settings, EIGHT, on_gpu=True)
    counts = [memory.experts_over_gpus(settings, EIGHT, need, 2, gib) for gib in (20, 50, 79, 141)]
    assert counts[0] is None and counts[2:] == [2, 1]
    for gib, gpus in zip((50, 79), counts[1:3], strict=True):
        experts = EIGHT.experts * 2 / GIB
        rest = need.device_gib - experts
        assert rest + experts * -(-8 // gpus) / 8 <= gib < rest + experts * -(-8 // (gpus - 1)) / 8


def test_the_size_of_the_default_on_the_command_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["k8s", "size", "--config", "mini"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert re.search(r"^train +0 to 1 +4 +[\d.]+ GiB +cpu \(15 CPUs, 58 GiB\)$", out, flags=re.MULTILINE)
    assert "does not fit" not in out and "weights" in out


def test_what_does_not_fit_ends_the_table():
    lines = list(size_lines(config.load("uni-moe-7b-8e"), OVERLAYS["gpu"], planned("uni-moe-7b-8e", "gpu", EIGHT)))
    assert lines[-1].startswith("does not fit: ")
    assert any(line.startswith("experts, endpoint: 102.0 GiB do not fit a GPU of 79") for line in lines)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("kubernetes.namespace=Mine", "kubernetes.namespace"),
        ("kubernetes.nodes.cpu.gpus=1", "gpu_memory_gib is 0"),
        ("kubernetes.nodes.cpu.memory=5", "did you mean 'kubernetes.nodes.cpu.memory_gib'"),
        ("kubernetes.train_nodes=0", "kubernetes.train_nodes is 0"),
    ],
)
def test_mistakes_in_the_settings_of_the_cluster(override, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        config.load("mini", [override])
