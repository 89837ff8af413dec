"""Scores, which model is evaluated, and the files of an evaluation."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import make_tiny_run, save_start
from unimoe_ray.errors import UnimoeError, UsageError
from unimoe_ray.evaluation.evaluate import Evaluation, _choose, final_model, write_evaluation
from unimoe_ray.evaluation.metrics import exact_match, task_score


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("red", "red", True),
        (" red\n", "red", True),
        ("Red", "red", False),
        ("red circle", "red", False),
        ("", "red", False),
        ("a  b", "a b", False),
    ],
)
def test_exact_match(answer, expected, right):
    assert exact_match(answer, expected) is right


def test_score():
    expected = ["a", "a", "b", "c"]
    assert task_score(["a", "x", "b", ""], expected) == {"accuracy": 0.5, "majority": 0.5, "n": 4}
    assert task_score(expected, expected) == {"accuracy": 1.0, "majority": 0.5, "n": 4}
    assert task_score(["a"] * 3, ["a", "b", "c"]) == {"accuracy": 0.3333, "majority": 0.3333, "n": 3}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1, max_size=30))
def test_always_answering_the_majority_scores_the_majority(pairs):
    answers, expected = zip(*pairs, strict=True)
    score = task_score(list(answers), list(expected))
    best = max("abc", key=expected.count)
    assert task_score([best] * len(expected), list(expected))["accuracy"] == score["majority"]
    assert score["accuracy"] == round(sum(a == e for a, e in pairs) / len(pairs), 4)


def test_scores_need_answers_to_all_questions():
    with pytest.raises(ValueError, match="no answers"):
        task_score([], [])
    with pytest.raises(ValueError, match="zip"):
        task_score(["a"], ["a", "b"])


def test_the_last_finished_stage_is_evaluated(tmp_path):
    run = make_tiny_run(tmp_path)
    folder = run.config.run_dir / "checkpoints"
    assert final_model(run.config) == folder / "align"
    save_start(run, run.info.build(), "tune", "tune")
    assert final_model(run.config) == folder / "tune"
    assert final_model(run.config, "base") == folder / "base"
    (folder / "tune" / "model.safetensors").write_bytes(b"")
    assert final_model(run.config) == folder / "align"
    with pytest.raises(UnimoeError, match="no finished model"):
        final_model(run.config, "tune")
    shutil.rmtree(folder)
    with pytest.raises(UnimoeError, match="run 'unimoe train all' first"):
        final_model(run.config)


def test_which_tasks_are_evaluated(tmp_path):
    config = make_tiny_run(tmp_path).config
    known = {task: np.arange(5) for task in ("see", "hear", "fashion")}
    assert set(_choose(config, known, None)) == {"see", "hear", "fashion"}
    config.evaluation.tasks = ["hear"]
    assert list(_choose(config, known, None)) == ["hear", "fashion"]
    assert list(_choose(config, known, ["see"])) == ["see"]
    config.evaluation.limit = 2
    assert _choose(config, known, ["see"])["see"].tolist() == [0, 1]
    with pytest.raises(UsageError, match="task 'smell' has no held-out samples; allowed: fashion, hear, see"):
        _choose(config, known, ["smell"])


def test_files_of_an_evaluation(tmp_path):
    result = Evaluation({"a": {"accuracy": 1.0, "majority": 0.5, "n": 2}}, [{"id": "1"}, {"id": "2"}], {"layers": 1})
    write_evaluation(tmp_path, result, {"seed": 3})
    assert json.loads((tmp_path / "eval.json").read_text()) == {"tasks": result.tasks, "seed": 3}
    lines = (tmp_path / "eval_samples.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.samples
    assert json.loads((tmp_path / "routing.json").read_text()) == result.routing
    write_evaluation(tmp_path / ".", Evaluation(result.tasks, [], None), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["eval.json", "eval_samples.jsonl", "routing.json"]
