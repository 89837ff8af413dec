"""The grid of ablations, its plan, and how verdicts come about."""

import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs import ablate
from tests.tiny import make_tiny_run
from tests.unit.test_report import _Page
from unimoe_ray import config as configuration
from unimoe_ray.config.training import STAGES
from unimoe_ray.data import prepare
from unimoe_ray.errors import UnimoeError, UsageError
from unimoe_ray.experiments.arms import FAMILIES, MINI_GROUPS, arm_config, grid, only, rare, trunk_config
from unimoe_ray.experiments.cache import cached, finished, outcome_recipe, pack, unpack
from unimoe_ray.experiments.claims import claims
from unimoe_ray.experiments.figures import Estimate, estimate, loss_variance, steps_to_90, verdict, worst_drop
from unimoe_ray.experiments.outcomes import Outcome, read_outcome
from unimoe_ray.experiments.plan import evaluation_dir, make_experiment, measured_seconds, plan, table
from unimoe_ray.experiments.readme import updated
from unimoe_ray.experiments.results import collect, markdown, to_json
from unimoe_ray.experiments.run import fork
from unimoe_ray.mini.source import suite_dir
from unimoe_ray.report.ablation import write_ablation_page
from unimoe_ray.training.checkpoint import checkpoint_dir, is_complete, save_model
from unimoe_ray.training.trainer import recipe

MINI = configuration.load("mini")


def test_every_arm_is_a_configuration_of_its_own():
    made = {name: arm_config(MINI, arm, 1, "out") for name, arm in grid().items()}
    tunes = {
        json.dumps([c.stages.tune["tune"].model_dump(), c.model.moe.model_dump()], default=str) for c in made.values()
    }
    assert len(tunes) == len(made) == 20
    for name, config in made.items():
        run = config.stages.tune["tune"]
        is_dense = config.model.moe.layers == "none"
        assert is_dense == (name.startswith(("dense", "specialist")))
        assert is_dense == ("router" not in run.train)
        assert (config.seed, config.suite_seed, config.run_dir) == (1, 0, Path("out") / f"{name}-s1")
        for stage in STAGES[:-1]:
            assert getattr(config.stages, stage) == getattr(MINI.stages, stage)
    assert made["experts-2"].model.moe.num_experts == 2 and made["experts-8"].model.moe.num_experts == 8
    assert made["dense-long"].stages.tune["tune"].steps == 220 + 160 + 110 + 110
    assert set(made["specialist-speech"].stages.tune["tune"].tasks) == {"spoken_word", "spoken_question"}
    assert configuration.load("mini") == MINI


def test_a_rare_modality_has_its_share_and_the_others_their_proportions():
    before = MINI.stages.tune["tune"].tasks
    tree = MINI.model_dump(mode="json")
    rare(("spoken_word", "spoken_question"), 0.05)(tree)
    after = tree["stages"]["tune"]["tune"]["tasks"]
    assert (after["spoken_word"] + after["spoken_question"]) / sum(after.values()) == pytest.approx(0.05)
    assert all(after[task] == before[task] for task in before if not task.startswith("spoken"))
    only(("text",))(tree)
    assert list(tree["stages"]["tune"]["tune"]["tasks"]) == ["text"]


def test_claims_need_arms_that_exist():
    arms = grid()
    for claim in claims(MINI_GROUPS):
        assert set(claim.arms) <= set(arms)
    assert all(set(family) <= set(arms) for family in FAMILIES.values())


def test_the_papers_figures_by_hand():
    paper = {claim.name: claim.paper.difference for claim in claims(MINI_GROUPS)}
    assert paper["stage 2"] == pytest.approx((1.22 + 1.53 + 0.6 + 3.2) / 4, abs=0.006)
    assert paper["second half"] == pytest.approx((2.23 + 1.69 - 0.4 - 5.08 - 8.98) / 5, abs=0.006)  # against the claim
    assert paper["bias"] == pytest.approx((44.0525 - 22.07) - (69.105 - 63.855), abs=0.01)
    assert {name for name, difference in paper.items() if difference is None} == {
        "rare",
        "mixture, all steps",
        "stage 2, all steps",
        "speed",
    }


def test_arms_take_over_the_stages_of_their_trunk(tmp_path):
    """As far as recipes go: what the trunk trained counts as finished in every arm."""
    run = make_tiny_run(tmp_path)
    out = str(tmp_path / "out")
    trunk = trunk_config(run.config, 0, out)
    run.config.run_dir.rename(tmp_path / "moved")
    (tmp_path / "out").mkdir()
    (tmp_path / "moved").rename(trunk.run_dir)
    groups = {"image": ("see",), "speech": ("listen",)}
    for arm in grid(groups).values():
        config = arm_config(run.config, arm, 0, out)
        fork(trunk, config)
        fork(trunk, config)
        source = prepare.source(config, "train")
        for stage, name in (("base", "base"), ("align", "align")):
            made = recipe(trunk, stage, name, run.info, prepare.source(trunk, "train"))
            assert is_complete(checkpoint_dir(config.run_dir, stage, name), made)
            assert recipe(config, stage, name, run.info, source) == made
        weights = checkpoint_dir(config.run_dir, "experts", "image") / "model.safetensors"
        assert weights.stat().st_ino == (checkpoint_dir(trunk.run_dir, "experts", "image") / weights.name).stat().st_ino


def test_a_plan_counts_what_is_left(tmp_path):
    experiment = make_experiment(MINI, MINI_GROUPS, [0, 1], tmp_path, ["dense", "experts"])
    rows = plan(experiment, "dev")
    assert [row.name for row in rows] == ["trunk-s0", "trunk-s1", "dense-s0", "experts-s0", "dense-s1", "experts-s1"]
    assert rows[0].steps == 600 + 220 + 160 + 110 + 110 and rows[2].steps == 220
    assert rows[2].seconds == 220 * 0.45 + 20
    config = experiment.runs()["dense", 0]
    folder = evaluation_dir(config, "dev")
    folder.mkdir(parents=True)
    (folder / "eval.json").write_text("{}")
    times = [10.0, 11.0, 12.0, 14.0]
    lines = [{"run": "tune", "stage": "tune", "step": i + 1, "loss": 1.0, "time": t} for i, t in enumerate(times)]
    (config.run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert measured_seconds(experiment) == {"dense": 1.0}
    rows = plan(experiment, "dev")
    assert rows[2].seconds == 0 and rows[4].seconds == 220 * 1.0 + 20
    assert "finished" in table(rows, 2).splitlines()[2]
    left = sum(row.seconds for row in rows)
    assert table(rows, 2).endswith(
        f"6 runs, {left / 3600:.1f} core hours left, about {left / 120:.0f} min on 2 cores\n"
    )
    with pytest.raises(UsageError, match="--arm sparse: no such arm; allowed: dense, specialist-image"):
        make_experiment(MINI, MINI_GROUPS, [0], tmp_path, ["sparse"])
    with pytest.raises(UsageError, match="--seeds: allowed: from 1"):
        make_experiment(MINI, MINI_GROUPS, [], tmp_path)


def test_a_dry_run_of_the_job(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["ablate", "--dry-run", "--arm", "dense", "--seeds", "1", "stages.tune.tune.steps=7", "seed=4"]
    )
    ablate.main()
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()] == ["trunk-s4", "dense-s4", "2"]
    assert " 7 steps" in shown
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["ablate", "--seeds", "0"])
    with pytest.raises(SystemExit) as stop:
        ablate.main()
    assert (stop.value.code, capsys.readouterr().err) == (2, "unimoe: --seeds: allowed: from 1\n")


def test_intervals_over_seeds_are_students():
    found = estimate([0.80, 0.84, 0.85])
    margin = 4.303 * np.std([0.80, 0.84, 0.85], ddof=1) / math.sqrt(3)
    assert found == Estimate(pytest.approx(0.83), pytest.approx(0.83 - margin), pytest.approx(0.83 + margin), 3)
    assert estimate([0.5, math.nan]).seeds == 1 and math.isnan(estimate([0.5]).low)
    assert estimate([]).seeds == 0


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([0.03, 0.04, 0.05], "seen"),
        ([-0.03, -0.04, -0.05], "not seen"),
        ([-0.01, 0.04, 0.05], "undecided"),
        ([0.5], "undecided"),
    ],
)
def test_verdicts(differences, expected):
    assert verdict(estimate(differences)) == expected


def test_curves_by_hand():
    falling = [4.0] * 1 + [1.0] * 200
    # Smoothed: 1 + 3 * 0.9^(n-1) * 0.1 / (1 - 0.9^n); a tenth of the fall is left where that is below 1.3
    smooth = [1 + 3 * 0.9 ** (n - 1) * 0.1 / (1 - 0.9**n) for n in range(1, 202)]
    assert steps_to_90(falling) == next(n for n, value in enumerate(smooth, 1) if value <= 1.3 + 1e-6)
    assert math.isnan(steps_to_90([1.0, 1.0, 2.0])) and math.isnan(steps_to_90([]))
    assert loss_variance([float(x) for x in range(50, 0, -1)]) == pytest.approx(0)
    bumps = [1.0, -1.0, -1.0, 1.0] * 25
    assert loss_variance([9.0] * 400 + [2 + b for b in bumps]) == pytest.approx(1.0, rel=0.01)


GROUPS = {"image": ("a", "b"), "speech": ("c",)}


def outcome(**tasks) -> Outcome:
    """Shares right of ten questions each."""
    return Outcome({task: [True] * n + [False] * (10 - n) for task, n in tasks.items()}, [1.0] * 10)


def test_drops_behind_specialists_by_hand():
    seed = {
        "specialist-image": outcome(a=9, b=7, c=0),
        "specialist-speech": outcome(a=0, b=0, c=8),
        "dense": outcome(a=8, b=6, c=5),
    }
    assert worst_drop(seed, "dense", GROUPS) == pytest.approx(0.3)
    assert seed["dense"].accuracy() == pytest.approx((0.8 + 0.6 + 0.5) / 3)
    assert seed["dense"].accuracy(("c",)) == 0.5


def finish(config, right: dict[str, int], losses: list[float] = ()) -> None:
    """The files of a finished run: so many right of ten questions of each task."""
    folder = evaluation_dir(config, "dev")
    folder.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(configuration.dump(config))
    lines = [{"task": task, "correct": i < n} for task, n in right.items() for i in range(10)]
    (folder / "eval_samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = [
        {"run": "tune", "stage": "tune", "step": i + 1, "loss": loss, "seconds": 0.5, "time": i}
        for i, loss in enumerate(losses)
    ]
    (config.run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))


def test_results_are_collected_from_the_files(tmp_path):
    experiment = make_experiment(MINI, GROUPS, [0, 1, 2], tmp_path, ["dense", "experts-top1"])
    right = {"dense": (6, 6, 5), "experts-top1": (8, 9, 7)}
    for (arm, seed), config in experiment.runs().items():
        if (arm, seed) == ("dense", 2):
            continue
        finish(config, dict.fromkeys("abc", right[arm][seed]))
    found = collect(experiment, "dev", finished(experiment, "dev", None))
    assert (found["finished"], found["planned"]) == (5, 6)
    assert found["arms"]["experts-top1"]["figures"]["accuracy"]["mean"] == pytest.approx(0.8)
    dense = found["arms"]["dense"]["figures"]
    assert dense["accuracy"]["seeds"] == 2 and dense["worst drop"]["seeds"] == 0
    assert found["arms"]["dense"]["by seed"] == {"0": pytest.approx(0.6), "1": pytest.approx(0.6)}
    (mixture,) = found["claims"]  # the others' arms were not run
    assert mixture["claim"] == "mixture" and mixture["mean"] == pytest.approx(0.25) and mixture["seeds"] == 2
    assert mixture["verdict"] == "undecided"  # two seeds, 0.2 and 0.3
    text = markdown(found)
    assert "5 of 6 runs, split dev" in text and "| experts-top1 | 0.8 (" in text and "| undecided | 2 |" in text


def test_the_report_of_partial_results_is_one_page_without_a_network(tmp_path, capsys, monkeypatch):
    words = ["ablate", "--report", "--out", str(tmp_path), "--arm", "dense", "--arm", "experts"]
    monkeypatch.setattr(sys, "argv", words)
    ablate.main()
    assert "Partial results: 0 of 6 planned runs" in (tmp_path / "results-dev.html").read_text()
    experiment = make_experiment(MINI, MINI_GROUPS, [0, 1, 2], tmp_path, ["dense", "experts", "experts-2"])
    tasks = [task for group in MINI_GROUPS.values() for task in group]
    for seed, (dense, experts) in enumerate([(5, 8), (6, 9)]):
        finish(experiment.runs()["dense", seed], dict.fromkeys(tasks, dense), [2.0, 1.0, 0.5])
        finish(experiment.runs()["experts", seed], dict.fromkeys(tasks, experts), [1.0, 0.5, 0.25])
    finish(experiment.runs()["experts-2", 0], dict.fromkeys(tasks, 7), [1.0] * 200)
    monkeypatch.setattr(sys, "argv", [*words, "--arm", "experts-2"])
    ablate.main()
    assert str(tmp_path / "results-dev.html") in capsys.readouterr().out
    page = (tmp_path / "results-dev.html").read_text(encoding="utf-8")
    links = [
        value for _, attributes in _Page(page).elements for key, value in attributes.items() if key in ("href", "src")
    ]
    assert links and all(link.startswith("#") for link in links) and "http" not in page
    text = re.sub(r"\s+", " ", re.sub(r"<(style|script|svg).*?</\1>|<[^>]+>", " ", page, flags=re.S))
    assert "5 of 9 planned runs are here" in text and "Partial results: 5 of 9 planned runs have finished." in text
    assert "4 planned runs of 9 had not finished" in text
    assert "four experts beat two undecided +10.0 points 1 +0.6 points: table 7, mean of 5" in text
    assert "a mixture of experts beats one dense model of equal active FLOPs no run of experts-top1 +2.8 points" in text
    low, high = (100 * value for value in (estimate([0.5, 0.6]).low, estimate([0.5, 0.6]).high))
    assert f"dense one dense model, mixed data 55.0 ({low:.1f} to {high:.1f})" in text
    assert "80 questions of the development split" in text
    charts = re.findall(r'<figure class="arms">.*?</figure>', page, flags=re.S)
    assert [chart.count('class="mean"') for chart in charts] == [1, 3]  # judged claims, arms
    assert [chart.count('class="seed"') for chart in charts] == [0, 5] and charts[0].count('class="other"') == 1
    assert "dense – – – 3 1.5 s 0.50 s" in text  # no model was saved: its size is not known
    found = json.loads((tmp_path / "results-dev.json").read_text())
    assert found["arms"]["experts-2"]["figures"]["accuracy"]["low"] is None
    assert found["arms"]["experts-2"]["curve"][-1] == [200, 1.0] and len(found["arms"]["experts-2"]["curve"]) == 60


def test_the_report_in_a_browser_without_a_network(tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium", path="/usr/bin")
    if chromium is None:
        pytest.skip("no /usr/bin/chromium")
    experiment = make_experiment(MINI, GROUPS, [0, 1], tmp_path, ["dense", "experts", "experts-top1", "copies"])
    runs = {
        (arm, seed): Outcome({"a": [True] * (5 + seed) + [False] * 4, "c": [True, False]}, [2.0, 1.0, 0.5])
        for arm, seed in experiment.runs()
    }
    path = tmp_path / "page.html"
    write_ablation_page(path, "mini", collect(experiment, "dev", runs))
    with sync_api.sync_playwright() as playwright:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags, timeout=60_000)
        page, errors = browser.new_context(offline=True, viewport={"width": 390, "height": 800}).new_page(), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text))
        page.goto(path.as_uri())
        assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")
        chart = page.locator("figure.lines").first
        chart.locator("svg").focus()
        page.keyboard.press("Home")
        assert chart.locator(".readout").text_content() == "step 1: dense 2, top-1 2, top-2 2, copies 2"
        browser.close()
    assert errors == []


def test_the_size_of_a_model_is_that_of_its_folder(tmp_path):
    run = make_tiny_run(tmp_path)
    finish(run.config, {"see": 1})
    info = replace(run.info, sparse=True)
    model = info.build()
    save_model(checkpoint_dir(run.config.run_dir, "tune", "tune"), model, info, run.tokenizer, "recipe")
    outcome = read_outcome(run.config, "dev")
    assert outcome.parameters == sum(p.numel() for p in model.language.parameters())
    per_expert = 3 * 16 * 24
    assert outcome.parameters - outcome.active == 2 * 2 * per_expert  # two layers, two of four experts idle


def test_outcomes_are_taken_from_the_cache_where_the_recipe_fits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "results"
    words = ["ablate", "--seeds", "1", "--arm", "dense", "--arm", "experts", "--results", str(results), "--out"]
    experiment = make_experiment(MINI, MINI_GROUPS, [0], tmp_path / "runs", ["dense", "experts"])
    finish(experiment.runs()["dense", 0], {"text": 7, "fashion": 4}, [2.0, 1.23456, 0.5])
    monkeypatch.setattr(sys, "argv", [*words, "runs", "--report"])
    ablate.main()
    finish(experiment.runs()["experts", 0], {"text": 8, "fashion": 4}, [2.0, 1.0, 0.5])
    ablate.main()
    first = (results / "ablate.json").read_text()
    # All of it is known: without --report, too, nothing is trained, and elsewhere the figures are the same.
    monkeypatch.setattr(sys, "argv", [*words, "elsewhere"])
    ablate.main()
    assert (results / "ablate.json").read_text() == first == (tmp_path / "elsewhere" / "results-dev.json").read_text()
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*words, "elsewhere", "--dry-run"])
    ablate.main()
    assert capsys.readouterr().out.count("finished") == 3
    monkeypatch.setattr(sys, "argv", [*words, "elsewhere", "--dry-run", "stages.experts.audio.steps=111"])
    ablate.main()
    assert capsys.readouterr().out.count("finished") == 0

    monkeypatch.setattr(sys, "argv", [*words, "runs", "--report", "stages.experts.audio.steps=111"])
    ablate.main()
    assert "0 of 2 runs" in capsys.readouterr().out  # what is in the folder was trained otherwise

    cache = results / "ablate-runs.jsonl"
    assert cached(experiment, "test", cache) == {}
    assert cached(experiment, "dev", cache) == finished(experiment, "dev", None)
    (tmp_path / "data" / "mini-full-0").mkdir(parents=True)
    (tmp_path / "data" / "mini-full-0" / "suite.json").write_text('{"hash": "another"}')
    assert suite_dir(MINI).resolve() == tmp_path / "data" / "mini-full-0"
    assert cached(experiment, "dev", cache) == {}
    cache.write_text(cache.read_text() + '{"arm": "dense"}\n')
    with pytest.raises(UnimoeError, match="ablate-runs.jsonl, line 3: is damaged; take it out"):
        cached(experiment, "dev", cache)


def test_a_recipe_changes_with_what_is_learned_and_asked_only():
    arm = grid()["dense"]
    same = arm_config(MINI, arm, 0, "out")
    assert (
        outcome_recipe(same, "dev")
        == outcome_recipe(arm_config(MINI, arm, 0, "elsewhere"), "dev")
        != outcome_recipe(same, "test")
    )
    others = [arm_config(MINI, arm, 1, "out"), arm_config(MINI, grid()["experts"], 0, "out")]
    for override in ("stages.base.base.steps=7", "evaluation.limit=5", "training.optimizer.clip=3"):
        others.append(arm_config(configuration.load("mini", [override]), arm, 0, "out"))
    assert len({outcome_recipe(config, "dev") for config in [same, *others]}) == 6


@pytest.mark.parametrize("right", [[], [False], [True, False, False, True, True], [False] * 9 + [True]])
def test_packed_answers(right):
    assert unpack(pack(right)) == right


def test_readme_has_the_figures_of_its_source():
    root = Path(ablate.__file__).parents[1]
    text = (root / "README.md").read_text(encoding="utf-8")
    assert updated(text, root) == text, "run make readme"


def test_blocks_of_a_readme_are_made_of_their_source(tmp_path):
    experiment = make_experiment(MINI, GROUPS, [0, 1], tmp_path, ["dense", "experts", "experts-top1"])
    runs = {("dense", 0): outcome(a=5), ("dense", 1): outcome(a=5), ("experts-top1", 0): outcome(a=9)}
    (tmp_path / "r.json").write_text(to_json(collect(experiment, "test", runs)))
    text = "before\n<!-- ablation: r.json -->\nold 1.23\n<!-- /ablation -->\nafter\n"
    new = updated(text, tmp_path)
    assert new.startswith(
        "before\n<!-- ablation: r.json -->\n3 of 6 planned runs (2 seeds), 10 questions of the held-out"
    )
    assert new.endswith("<!-- /ablation -->\nafter\n") and "old" not in new
    assert "| one dense model, mixed data | 50.0 (50.0 to 50.0) | – | – | – | 2 |" in new
    assert "equal active FLOPs | undecided | +40.0 points | 1 | +2.8 |" in new
    assert "| top-2 beats top-1 | not judged | – | 0 | – |" in new
    assert updated(new, tmp_path) == new
    (tmp_path / "r.json").unlink()
    with pytest.raises(UnimoeError, match="r.json"):
        updated(new, tmp_path)
