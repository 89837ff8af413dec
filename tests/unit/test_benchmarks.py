"""Benchmarks in their published formats: what is asked, what counts as right, what is written for others to score."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import openpyxl
import pytest

from tests.benchmark_files import CAPTIONS, MAKE, TEN, coco_vqa, write
from tests.tiny import make_servable_run
from unimoe_ray.data.features import decode_media
from unimoe_ray.data.schema import PLACEHOLDER
from unimoe_ray.errors import UsageError
from unimoe_ray.evaluation import benchmarks
from unimoe_ray.evaluation.answering import Answerer
from unimoe_ray.evaluation.benchmark import decoding_of
from unimoe_ray.evaluation.benchmarks import BENCHMARKS, Answered, Decoding, find_benchmark, open_folder
from unimoe_ray.evaluation.evaluate import final_model

SHORT = "Answer the question using a single word or phrase."
# The number of questions, and of the first one: id, prompt, references
FIRST = {
    "a-okvqa": (2, "22jbM6gDxdaMaunuzgrsBB", f"<image>\nWhat is in the motorcyclist's mouth?\n{SHORT}", 10),
    "ok-vqa": (6, "100000", f"<image>\nWhat colour is part 0?\n{SHORT}", 10),
    "vqav2": (6, "100000", f"<image>\nWhat colour is part 0?\n{SHORT}", 10),
    "textvqa": (1, "34602", f"<image>\nWhat is the brand of this camera?\n{SHORT}", 10),
    "pope": (9, "adversarial-1", f"<image>\nIs there a snowboard in the image?\n{SHORT}", 1),
    "mm-vet": (1, "v1_0", "<image>\nWhat is x in the equation?", 1),
    "mmbench": (
        3,
        "241",
        "<image>\nLook at the image and select the correct answer to the following question:\nWhich\nis it?\nOptions:\n"
        f"A.a cat\nB.a dog\n{SHORT}",
        1,
    ),
    "seed": (
        2,
        "101669",
        "<image>\nHow many towels are there?\nA. One\nB. Two\nC. Three\nD. Four\n"
        "Answer with the option's letter from the given choices directly.",
        1,
    ),
    "mmbench-audio": (1, "MMBench-241", f"<image>\n<audio>\nOptions:\nA.a cat\nB.a dog\n{SHORT}", 1),
    "race-audio": (
        4,
        "race_high-h1-0",
        "<audio>\nListen to the article and answer the question: Where is it?\nA. At home\nB. At school\n"
        "C. In the street\nD. In a shop",
        1,
    ),
    "ehsl": (2, "0", "<audio>\nWhat will the woman do?\nA. Go home.\nB. Wait.\nC. Call.", 1),
    "clotho-aqa": (2, "rain 1.wav#1", f"<audio>\nIs it raining?\n{SHORT}", 3),
    "clotho": (2, "Rain.wav", "<audio>\nGenerate audio caption.", 5),
    "activitynet-qa": (2, "v_1QIUV7WYKXg_3", "<video>\nis the athlete wearing trousers", 1),
    "msvd-qa": (1, "30933", "<video>\nwhat is eating a peanut?", 1),
}


def read(name, folder, split=None):
    benchmark, split = find_benchmark(name, split)
    return list(benchmark.read(open_folder(benchmark, folder), split))


def figures(name, questions, answers):
    answered = [Answered(q, a) for q, a in zip(questions, answers, strict=True)]
    return {measure.name: round(measure.figure, 4) for measure in BENCHMARKS[name].score(answered)}


def test_the_documentation_names_every_benchmark():
    text = (Path(benchmarks.__file__).parents[1] / "README.md").read_text()
    rows = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(BENCHMARKS)


def test_all_benchmarks_have_files_here():
    assert set(MAKE) == set(FIRST) == set(BENCHMARKS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_questions_are_as_published(name, tmp_path):
    questions = read(name, MAKE[name](tmp_path / "data"))
    count, first, prompt, references = FIRST[name]
    assert len(questions) == len({q.id for q in questions}) == count
    assert (questions[0].id, questions[0].prompt) == (first, prompt)
    assert len(questions[0].references) == references
    config = make_config(tmp_path)
    for question in questions:
        assert len(PLACEHOLDER.findall(question.prompt)) == len(question.media)
        for item in question.media:
            assert decode_media(item, 2, config.data) is not None


@pytest.mark.parametrize("name", BENCHMARKS)
def test_right_answers_have_the_full_score_and_empty_ones_none(name, tmp_path):
    questions = read(name, MAKE[name](tmp_path / "data"))
    if BENCHMARKS[name].score is None:
        return
    right = figures(name, questions, [q.references[0] for q in questions])
    best = {"VQA accuracy": 1.0, "accuracy": 1.0, "exact match": 1.0, "mean F1": 1.0, "CIDEr": None}
    main = next(iter(right))
    if name == "textvqa":
        assert right == {"accuracy": 0.3, "exact match": 1.0}  # one of ten said so
    elif name == "clotho-aqa":
        assert right == {"exact match": 0.5, "with the majority": 1.0, "with any": 1.0}
    elif name == "clotho":
        assert right["CIDEr"] > 1
    else:
        assert right[main] == best[main]
    empty = figures(name, questions, [""] * len(questions))
    assert empty[main] == (0.8 if name == "pope" else 0.0)  # POPE takes whatever is not no for yes: 2 of 3 are right


def test_vqa_figures(tmp_path):
    questions = read("vqav2", MAKE["vqav2"](tmp_path / "data"))
    found = figures("vqav2", questions, ["Red", "maroon", "dark red", "the red", "blue", "dark-red"])
    # "Red." is a red too: 7, 2 and 1 of ten. 1; 1/10 * 0 + 9/10 * 1/3; 2/10 * 1/3 + 8/10 * 2/3
    scores = [1.0, 0.3, 0.6, 1.0, 0.0, 0.6]
    assert found == {
        "VQA accuracy": round(sum(scores) / 6, 4),
        "exact match": round(5 / 6, 4),
        "type: other": round((1.0 + 0.6 + 0.0) / 3, 4),
        "type: yes/no": round((0.3 + 1.0 + 0.6) / 3, 4),
    }
    assert read("vqav2", MAKE["vqav2"](tmp_path / "data2"))[0].references == tuple(TEN)


def test_direct_answers_of_aokvqa(tmp_path):
    questions = read("a-okvqa", MAKE["a-okvqa"](tmp_path / "data"))
    found = figures("a-okvqa", questions, ["cigar", "x"])
    assert found["direct answer"] == round(1 / 3, 4)  # the other one is marked as hard, and left out
    assert found["exact match"] == 1.0
    assert figures("a-okvqa", questions, ["Cigarette", "x"])["direct answer"] == 0.0  # letter for letter


def test_circular_eval_wants_every_order_right(tmp_path):
    questions = read("mmbench", MAKE["mmbench"](tmp_path / "data"))
    assert [q.group for q in questions] == ["241", "252", "241"]
    assert questions[2].media == questions[0].media
    assert "Hint: It is bright.\nLook" in questions[1].prompt
    assert figures("mmbench", questions, ["B", "green", "B"]) == {
        "accuracy": 1.0,
        "CircularEval": 0.5,
        "unparsed": 0.0,
    }
    assert figures("mmbench", questions, ["a dog", "A or B", "a dog"]) == {
        "accuracy": 0.5,
        "CircularEval": 0.5,
        "unparsed": 0.5,
    }


def test_pope_by_hand(tmp_path):
    questions = read("pope", MAKE["pope"](tmp_path / "data"))
    # labels yes, no, yes in each of adversarial, popular, random
    found = figures("pope", questions, ["Yes", "No", "no"] + ["yes.", "Yes, there is.", "yes"] + ["no", "yes", "maybe"])
    assert found == {
        "mean F1": round((2 / 3 + 4 / 5 + 1 / 2) / 3, 4),
        "accuracy": round(5 / 9, 4),
        "precision": round(4 / 6, 4),
        "recall": round(4 / 6, 4),
        "F1": round(2 / 3, 4),
        "yes": round(6 / 9, 4),
        "unclear": round(1 / 9, 4),
        "F1: adversarial": 0.6667,
        "F1: popular": 0.8,
        "F1: random": 0.5,
    }


def test_answers_of_all_annotators_count(tmp_path):
    questions = read("clotho-aqa", MAKE["clotho-aqa"](tmp_path / "data"))
    found = figures("clotho-aqa", questions, ["Yes.", "drops"])
    # rows: 2 of 3 and 1 of 3; the second question has no majority
    assert found == {"exact match": 0.5, "with the majority": 1.0, "with any": 1.0}


def test_words_within_a_free_answer(tmp_path):
    questions = read("activitynet-qa", MAKE["activitynet-qa"](tmp_path / "data"))
    found = figures("activitynet-qa", questions, ["yes", "It is the long jump."])
    assert found == {"exact match": 0.5, "contains": 1.0, "type: 3": 1.0, "type: 7": 1.0}
    assert figures("activitynet-qa", questions, ["yesterday", "jump"])["contains"] == 0.0


def submitted(name, tmp_path, answers=None):
    questions = read(name, MAKE[name](tmp_path / "data"))
    answered = [Answered(replace(q, media=()), (answers or ["x"] * 9)[i]) for i, q in enumerate(questions)]
    (tmp_path / "out").mkdir()
    return BENCHMARKS[name].submit(tmp_path / "out", answered)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "vqav2",
            [{"question_id": number, "answer": "x"} for p in (100, 101, 102) for number in (p * 1000, p * 1000 + 1)],
        ),
        ("textvqa", [{"question_id": 34602, "answer": "x"}]),
        ("mm-vet", {"v1_0": "x"}),
        ("a-okvqa", dict.fromkeys(["22jbM6gDxdaMaunuzgrsBB", "hard"], {"multiple_choice": "", "direct_answer": "x"})),
        ("msvd-qa", [{"id": "30933", "question": "what is eating a peanut?", "answer": "squirrel", "pred": "x"}]),
    ],
)
def test_json_for_the_official_scorers(name, expected, tmp_path):
    (path,) = submitted(name, tmp_path)
    assert json.loads(path.read_text()) == expected


def test_other_files_for_the_official_scorers(tmp_path):
    paths = submitted("pope", tmp_path / "pope")
    assert [path.name for path in paths] == ["adversarial.jsonl", "popular.jsonl", "random.jsonl"]
    assert json.loads(paths[0].read_text().splitlines()[0]) == {
        "question": "Is there a snowboard in the image?",
        "answer": "x",
    }
    (path,) = submitted("seed", tmp_path / "seed", ["Two", "B or C"])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"question_id": "101669", "prediction": "B"},
        {"question_id": "v10", "prediction": "B or C"},
    ]
    (path,) = submitted("clotho", tmp_path / "clotho", ["a, b", "c"])
    with open(path, newline="") as file:
        assert list(csv.reader(file)) == [["file_name", "caption_predicted"], ["Rain.wav", "a, b"], ["Bird.wav", "c"]]
    (path,) = submitted("mmbench", tmp_path / "mmbench", ["B", "green", "?\x07"])
    rows = list(openpyxl.load_workbook(path).active.values)
    assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction", "category", "l2-category")
    assert rows[1] == (241, "Which\nis it?", "a cat", "a dog", None, None, "B", "identity", "attribute_reasoning")
    assert [row[6] for row in rows[1:]] == ["B", "C", "?"]


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("vqav2", lambda d: next(d.glob("*annot*")).unlink(), "has no file v2_mscoco_val2014_annotations.json"),
        ("vqav2", lambda d: next(d.glob("*questions*")).write_text("[]"), "must hold a JSON object with a list under"),
        (
            "vqav2",
            lambda d: next(d.glob("*annot*")).write_text('{"annotations": []}'),
            "100000 is not in the other file",
        ),
        ("a-okvqa", lambda d: write(d / "aokvqa_v1p0_val.json", [{"question_id": "x"}]), "record 0: has no 'question'"),
        ("textvqa", lambda d: write(d / "TextVQA_0.5.1_val.json", {"data": [1]}), "is not a JSON object"),
        ("pope", lambda d: (d / "coco_pope_random.json").write_text("{}\n"), "line 1: has no 'question_id'"),
        ("mm-vet", lambda d: write(d / "mm-vet.json", []), "must hold a JSON object of objects"),
        (
            "clotho",
            lambda d: (d / "clotho_captions_evaluation.csv").write_text("file_name,caption_1\na.wav,x\n"),
            "'caption_2'",
        ),
        (
            "clotho",
            lambda d: (d / "clotho_captions_evaluation.csv").write_text("file_name\na.wav,x\n"),
            "row 2: 2 columns",
        ),
        ("clotho-aqa", lambda d: (d / "clotho_aqa_test.csv").write_text(""), "is empty"),
        ("mmbench", lambda d: (d / "mmbench_dev_20230712.tsv").write_text("index\tquestion\n1\tx\n"), "has no 'image'"),
        ("race-audio", lambda d: [p.unlink() for p in d.glob("*.json")], "has no file"),
        ("ehsl", lambda d: write(d / "high_exam.json", [{"conversations": []}]), "conversations"),
        ("msvd-qa", lambda d: (d / "youtube_mapping.txt").write_text("a vid2\n"), "vid1 is not in youtube_mapping.txt"),
    ],
)
def test_what_is_missing_is_named(name, spoil, message, tmp_path):
    folder = MAKE[name](tmp_path / "data")
    spoil(folder)
    with pytest.raises(UsageError) as error:
        read(name, folder)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_names_splits_and_folders_are_checked(tmp_path):
    with pytest.raises(UsageError, match="benchmark 'vqa' does not exist; allowed: a-okvqa, ok-vqa"):
        find_benchmark("vqa")
    with pytest.raises(UsageError, match="pope has no split 'val'; allowed: test"):
        find_benchmark("pope", "val")
    with pytest.raises(UsageError, match="no such folder; it is to have coco_pope_random.json"):
        open_folder(BENCHMARKS["pope"], tmp_path / "nowhere")
    assert decoding_of(BENCHMARKS["activitynet-qa"], "published") == Decoding(1024, temperature=0.2)
    assert decoding_of(BENCHMARKS["activitynet-qa"], "greedy") == Decoding(1024)
    with pytest.raises(UsageError, match="5 beams"):
        decoding_of(BENCHMARKS["clotho"], "published")


def test_files_in_another_order_are_joined(tmp_path):
    folder = coco_vqa(tmp_path / "data")
    path = next(folder.glob("*annot*"))
    content = json.loads(path.read_text())
    content["annotations"].reverse()
    write(path, content)
    assert [q.facts["type"] for q in read("vqav2", folder)] == ["other", "yes/no"] * 3


def test_media_may_lie_elsewhere(tmp_path):
    folder = coco_vqa(tmp_path / "data")
    (folder / "val2014").rename(tmp_path / "coco")
    benchmark, split = find_benchmark("vqav2")
    question = next(benchmark.read(open_folder(benchmark, folder, tmp_path / "coco"), split))
    assert question.media[0].paths == (str(tmp_path / "coco" / "COCO_val2014_000000000100.jpg"),)


def make_config(root):
    return make_servable_run(root / "run", model={"language": {"max_positions": 512}}).config


def test_every_benchmark_is_answered(tmp_path):
    """In this process, by the engine: a reply to every question; the same alone as in company; faults are named."""
    config = make_config(tmp_path)
    answerer = Answerer(config.model_dump(mode="json"), str(final_model(config)), Decoding(5), on_gpu=False)
    everything = [q for name, make in MAKE.items() for q in read(name, make(tmp_path / name))]
    replies = answerer.answer(everything)
    assert [reply.fault for reply in replies] == [""] * len(everything)
    assert {reply.tokens for reply in replies} <= {1, 2, 3, 4, 5}
    assert all(reply.cut == (reply.tokens == 5) for reply in replies)
    assert len({reply.answer for reply in replies}) > 3
    for row in (0, len(everything) - 1):
        assert answerer.answer([everything[row]]) == [replies[row]]
    missing = replace(everything[0], media=(replace(everything[0].media[0], paths=("/nowhere/a.jpg",)),))
    own = replace(everything[0], prompt="<image>\nWhat is an <image>?")
    long = replace(everything[0], prompt="<image>\n" + "What? " * 2000)
    good = everything[1]
    found = answerer.answer([missing, own, good, long])
    assert found[0].fault == "/nowhere/a.jpg: No such file or directory"
    assert "media placeholders" in found[1].fault
    assert found[2] == replies[1]
    assert "the model takes at most 511" in found[3].fault


def test_captions_of_clotho_are_those_of_the_file(tmp_path):
    assert [q.references for q in read("clotho", MAKE["clotho"](tmp_path / "data"))] == [
        tuple(said) for said in CAPTIONS.values()
    ]
