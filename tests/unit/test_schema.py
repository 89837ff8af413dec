"""Records of the official conversation format: what is accepted, and the reason when it is not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimoe_ray.data.schema import PLACEHOLDER, BadSample, Media, Sample, parse_record


def record(question="what?", answer="this", **fields):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **fields}


def test_official_record():
    sample = parse_record(
        record(
            "<image>\n<speech>\nsay <audio>", id=7, task="vqa", image="a.png", speech=["b.wav"], audio="c.wav", x=[1]
        ),
        index=3,
    )
    assert sample == Sample(
        "7",
        "vqa",
        (("<image>\n<speech>\nsay <audio>", "this"),),
        (Media("image", ("a.png",)), Media("speech", ("b.wav",)), Media("audio", ("c.wav",))),
        {"x": [1]},
    )
    assert sample.group == "audio+image+speech"


def test_defaults():
    sample = parse_record(record(), index=3)
    assert (sample.id, sample.task, sample.media, sample.group) == ("3", "default", (), "text")


def test_media_follow_the_placeholders_over_all_turns():
    turns = [("<image> <video>", "a"), ("<image>", "b"), ("<video> <image>", "c")]
    conversation = [{"from": w, "value": v} for q, a in turns for w, v in (("human", q), ("gpt", a))]
    sample = parse_record(
        {"conversations": conversation, "image": ["1.png", "2.png", "3.png"], "video": ["a.mp4", "b.mp4"]}, 0
    )
    assert [m.paths[0] for m in sample.media] == ["1.png", "a.mp4", "2.png", "b.mp4", "3.png"]
    assert sample.group == "image+video"
    assert len(sample.turns) == 3


@pytest.mark.parametrize(
    ("video", "expected"),
    [
        ("a.mp4", [("a.mp4",)]),
        (["a.mp4", "b.mp4"], [("a.mp4",), ("b.mp4",)]),
        (["1.png", "2.JPG"], [("1.png", "2.JPG")]),
        ([["1.png"], ["2.png", "3.png"]], [("1.png",), ("2.png", "3.png")]),
        (["1.png", "b.mp4"], [("1.png",), ("b.mp4",)]),
        ([], []),
    ],
)
def test_forms_of_video(video, expected):
    sample = parse_record(record("<video>" * len(expected), video=video), 0)
    assert [m.paths for m in sample.media] == expected
    assert {m.kind for m in sample.media} <= {"video"}


@pytest.mark.parametrize("tower", ["speech", "audio"])
def test_voice_answers_audio_placeholders_with_the_chosen_tower(tower):
    sample = parse_record(record("<speech> <audio>", voice="v.wav", speech="s.wav"), 0, voice_as=tower)
    assert sample.media == (Media("speech", ("s.wav",)), Media(tower, ("v.wav",)))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record("<image>"), r"more <image> placeholders than files \(0\)"),
        (record("<image> <image>", image="a.png"), r"more <image> placeholders than files \(1\)"),
        (record("<image>", image=["a.png", "b.png"]), "2 files for 1 <image> placeholders"),
        (record("x", video="a.mp4"), "1 files for 0 <video> placeholders"),
        (record("<audio>", voice="a.wav", audio="b.wav"), "voice and audio are both given"),
        (record(answer=" \n"), "answer 1 is empty"),
        (record(answer="<image>"), "answer 1 has a media placeholder"),
        (record("<video>", video=[[]]), "video: a video without frames"),
        (record("<image>", image=""), "image: an empty path"),
        (record("<image>", image="a\0.png"), "image: .*null"),
        (record("<video>", video=[["1.png", ""]]), "video: an empty path"),
        ({"conversations": []}, "conversations: .*at least 1"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "turns must alternate"),
        ({"conversations": record()["conversations"][::-1]}, "turns must alternate"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "conversations.0.from: .*'human' or 'gpt'"),
        ({"conversations": [{"from": "human"}]}, "conversations.0.value: Field required"),
        ({}, "conversations: Field required"),
        (record("<image>", image=3), "image"),
        (record(id=1.5), "id"),
        (record(task=None), "task"),
        ([], "record: .*dictionary"),
        ("text", "record: .*dictionary"),
        (None, "record: .*dictionary"),
        (record("\ud800"), "conversations.0.value: .*surrogate"),
        (record(id="\udfff"), "id: .*surrogate"),
        (record(task="\udfff"), "task: .*surrogate"),
        (record("<video>", video=[["\udfff.png"]]), "video: .*surrogate"),
    ],
)
def test_bad_records(bad, reason):
    with pytest.raises(BadSample, match=reason) as error:
        parse_record(bad, 0)
    assert "\n" not in str(error.value)


def test_empty_answers_are_allowed_where_asked_for():
    assert parse_record(record(answer=""), 0, allow_empty_answer=True).turns == (("what?", ""),)


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
turn = st.fixed_dictionaries(
    {
        "from": st.sampled_from(["human", "gpt", "x"]),
        "value": st.sampled_from(["<image>", "a", "", "<video> <image>"]) | st.text(max_size=5),
    }
)
media = st.text(max_size=4) | st.lists(st.text(max_size=4), max_size=3) | json


@settings(max_examples=150, deadline=None)
@given(
    json
    | st.fixed_dictionaries(
        {"conversations": st.lists(turn, max_size=4) | json},
        optional={k: media for k in ("image", "video", "audio", "speech", "voice", "id", "task", "more")},
    )
)
def test_any_json_is_a_sample_or_one_reason(value):
    try:
        sample = parse_record(value, 0)
    except BadSample as error:
        assert str(error) and "\n" not in str(error)
        return
    placeholders = [name for question, _ in sample.turns for name in PLACEHOLDER.findall(question)]
    voice = "voice" in value and bool(value["voice"])
    assert [m.kind for m in sample.media] == ["speech" if voice and p == "audio" else p for p in placeholders]
    assert all(m.paths and all(m.paths) for m in sample.media)
    assert all(answer.strip() for _, answer in sample.turns)
