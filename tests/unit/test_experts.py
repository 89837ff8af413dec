"""The direct way through the experts against the same experts called as modules one after another."""

import resource
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from unimoe_ray.model import experts as direct
from unimoe_ray.model.experts import SwiGLU, run_experts, run_grouped
from unimoe_ray.model.moe import MoELayer

HIDDEN, INNER = 16, 24
COUNTS = [3, 0, 40, 1, 140, 0]  # few rows and many take different products; two experts have none


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(SwiGLU(HIDDEN, INNER) for _ in COUNTS)


def build(lora: dict | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = Experts()
    if lora is not None:
        settings = LoraConfig(r=4, lora_alpha=12, target_modules=r".*\.(gate|up|down)_proj", **lora)
        model = get_peft_model(model, settings)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
    return model


def by_module(experts: nn.ModuleList, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
    return torch.cat([expert(part) for expert, part in zip(experts, rows.split(counts), strict=True)])


def outcome(model: nn.Module, run, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and every gradient, with the same dropout each time."""
    model.zero_grad(set_to_none=True)
    x = rows.clone().requires_grad_()
    torch.manual_seed(1)
    y = run(model.experts, x, COUNTS)
    upstream = torch.linspace(-1, 1, y.numel()).view_as(y)
    y.backward(upstream.to(y.dtype))
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_same(found: dict, wanted: dict, tolerance: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] is not None and found[name].dtype == value.dtype, name
        assert (found[name] - value).norm() <= tolerance * max(value.norm(), 1.0), name


@pytest.fixture
def module_calls(monkeypatch):
    """How often an expert was called as a module."""
    calls = []
    forward = SwiGLU.forward
    monkeypatch.setattr(SwiGLU, "forward", lambda self, x: calls.append(len(x)) or forward(self, x))
    return calls


LORAS = [None, {}, {"lora_dropout": 0.3}]


@pytest.mark.parametrize("lora", LORAS)
def test_the_gradient_of_rows_is_there_before_those_of_the_weights(lora, monkeypatch):
    """So that it can travel meanwhile; everything is as it is without."""
    model, rows, order = build(lora), torch.randn(sum(COUNTS), HIDDEN), []
    wanted, weigh = outcome(model, run_experts, rows), direct._weigh
    monkeypatch.setattr(direct, "_weigh", lambda *given: order.append("weights") or weigh(*given))
    found = outcome(model, lambda *given: run_experts(*given, lambda of_rows: order.append(of_rows.clone())), rows)
    (first, *rest) = order
    assert torch.equal(first, wanted["x"]) and rest == ["weights"] * sum(count > 0 for count in COUNTS)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_nothing_is_told_of_rows_that_need_no_gradient():
    model = build()
    run_experts(model.experts, torch.randn(sum(COUNTS), HIDDEN), COUNTS, pytest.fail).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("lora", LORAS)
def test_equals_the_modules(lora, module_calls):
    model, rows = build(lora), torch.randn(sum(COUNTS), HIDDEN)
    wanted = outcome(model, by_module, rows)
    assert len(module_calls) == len(COUNTS)
    assert_same(outcome(model, run_experts, rows), wanted)
    assert len(module_calls) == len(COUNTS), "took the slow way"
    assert not wanted["x"].isnan().any() and all(v.any() for n, v in wanted.items() if ".4." in n)


@pytest.mark.parametrize("lora", LORAS)
def test_gradcheck_in_fp64(lora):
    model = build(lora).double()
    counts, rows = [2, 0, 7, 0, 0, 0], torch.randn(9, HIDDEN, dtype=torch.float64)[:, :HIDDEN].requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]

    def run(*_):
        torch.manual_seed(1)
        return run_experts(model.experts, rows, counts)

    assert torch.autograd.gradcheck(run, (rows, *trained), fast_mode=True)


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}])
def test_other_adapters(lora):
    model, rows = build(lora), torch.randn(sum(COUNTS), HIDDEN)
    assert_same(outcome(model, run_experts, rows), outcome(model, by_module, rows))


def test_adapters_off_merged_and_gone():
    model, rows = build({"lora_dropout": 0.3}).eval(), torch.randn(sum(COUNTS), HIDDEN)
    with torch.no_grad():
        adapted = run_experts(model.experts, rows, COUNTS)
        with model.disable_adapter():
            plain = run_experts(model.experts, rows, COUNTS)
            assert torch.allclose(plain, by_module(model.experts, rows, COUNTS), atol=1e-6)
        assert not torch.allclose(plain, adapted, atol=1e-2)
        model.merge_adapter()
        assert torch.allclose(run_experts(model.experts, rows, COUNTS), adapted, atol=1e-4)
        merged = model.merge_and_unload()
        assert torch.allclose(run_experts(merged.experts, rows, COUNTS), adapted, atol=1e-4)


def test_frozen_weights_get_no_gradient():
    model, rows = build(), torch.randn(sum(COUNTS), HIDDEN)
    wanted = outcome(model, by_module, rows)
    frozen = [f"experts.{e}.{p}_proj.weight" for e in range(len(COUNTS)) for p in ("gate", "down")]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
        del wanted[name]
    assert_same(outcome(model, run_experts, rows), wanted)
    assert all(model.get_parameter(name).grad is None for name in frozen)


@pytest.mark.parametrize("lora", LORAS[:2])
def test_under_autocast(lora):
    model, rows = build(lora), torch.randn(sum(COUNTS), HIDDEN)

    def autocast(run):
        def call(*arguments):
            with torch.autocast("cpu", torch.bfloat16):
                return run(*arguments)

        return call

    found, wanted = (outcome(model, autocast(run), rows) for run in (run_experts, by_module))
    assert found["y"].dtype is torch.bfloat16
    assert_same(found, wanted, tolerance=2e-2)


def test_hooks_run():
    model, rows = build(), torch.randn(sum(COUNTS), HIDDEN)
    seen = []
    model.experts[2].register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    model.experts[4].down_proj.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    run_experts(model.experts, rows, COUNTS)
    assert seen == [40, 140]


def test_grouped_products():
    model, rows = build(), torch.randn(sum(COUNTS), HIDDEN)

    def grouped(experts, rows, counts):
        return run_grouped([direct._read(expert) for expert in experts], rows, torch.tensor(counts))

    assert_same(outcome(model, grouped, rows), outcome(model, by_module, rows))


def test_without_gradients_and_without_rows():
    model, rows = build(), torch.randn(sum(COUNTS), HIDDEN)
    wanted = by_module(model.experts, rows, COUNTS)
    with torch.inference_mode():
        assert torch.allclose(run_experts(model.experts, rows, COUNTS), wanted, atol=1e-6)
        assert run_experts(model.experts, rows[:0], [0] * len(COUNTS)).shape == (0, HIDDEN)
    lora = build({})
    with torch.no_grad():
        assert run_experts(lora.experts, rows[:0], [0] * len(COUNTS)).shape == (0, HIDDEN)


def test_checkpointing_and_expanded_gradients():
    torch.manual_seed(0)
    layer, x = MoELayer(HIDDEN, INNER, 4, 2), torch.randn(30, HIDDEN)
    gradients = []
    for run in (lambda x: layer(x)[0], lambda x: checkpoint(lambda x: layer(x)[0], x, use_reentrant=False)):
        layer.zero_grad()
        run(x).sum().backward()
        gradients.append([p.grad.clone() for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


ALLOCATE = """
import resource, torch
from unimoe_ray.training.allocator import keep_freed_memory
kept = keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    gradients = [torch.ones(700_000) for _ in range(24)]
    del gradients
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(kept, *(faults() for _ in range(4)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_freed_memory_is_kept():
    output = subprocess.run([sys.executable, "-c", ALLOCATE], capture_output=True, text=True, check=True).stdout
    kept, first, *_, last = output.split()
    pages = 24 * 700_000 * 4 // resource.getpagesize()
    assert kept == "True"
    assert int(first) > 0.9 * pages and int(last) < 0.1 * pages
