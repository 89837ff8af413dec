"""Real files through real (randomly weighted) towers in Ray Data's actors; broken ones end in quarantine."""

import base64
import json
import re
import tarfile
import threading
import time
import zipfile
from functools import partial
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pytest
import ray
import soundfile
from PIL import Image
from pyarrow import parquet
from ray.data import ExecutionResources

from tests.stand_in_tower import StandInJob, encodings, pictures, repeats
from tests.tiny import tiny_config
from unimoe_ray.config.data import SourceConfig
from unimoe_ray.config.model import MODALITIES
from unimoe_ray.data import prepare as preparing
from unimoe_ray.data.encode import EncodeSettings
from unimoe_ray.data.features import TOWER_OF, decode_media, encode_files
from unimoe_ray.data.loader import Layout, iterate_steps, rank_dataset, read_features
from unimoe_ray.data.plan import Order
from unimoe_ray.data.samples import SampleTable
from unimoe_ray.data.schema import parse_record
from unimoe_ray.data.store import FeatureStore, blocks
from unimoe_ray.model.connectors import build_connector
from unimoe_ray.towers import load_tower, load_towers


@pytest.fixture(scope="module")
def cluster():
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    yield
    ray.shutdown()


def noise(seconds: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(16_000 * seconds)).astype(np.float32)


def picture(path: Path, seed: int) -> Path:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return path


def movie(path: Path, sound: np.ndarray | None) -> Path:
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=8)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        audio = container.add_stream("aac", rate=16_000, layout="mono") if sound is not None else None
        for grey in (0, 100, 200):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), grey, np.uint8), format="rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None:
            frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
            frame.sample_rate = 16_000
            container.mux([*audio.encode(frame), *audio.encode(None)])
    return path


def record(name: str, question: str, **fields) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "yes"}]
    return {"id": name, "task": "look", "conversations": turns, **fields}


def make_files(root: Path) -> None:
    root.mkdir()
    whole = picture(root / "whole.png", 0).read_bytes()
    (root / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (root / "text.png").write_text("this is no picture")
    picture(root / "other.png", 1)
    soundfile.write(root / "empty.wav", np.zeros(0), 16_000)
    soundfile.write(root / "speech.wav", noise(1.0, 2), 16_000)
    soundfile.write(root / "sound.wav", noise(1.5, 3), 16_000)
    movie(root / "sound.mp4", noise(1.5, 4))
    movie(root / "silent.mp4", None)


GOOD = [
    record("image", "<image> x?", image="whole.png"),
    record("mixed", "<speech> and <image> x?", image="other.png", speech="speech.wav"),
    record("video", "<video>\n<audio>\nx?", video="sound.mp4", audio="sound.mp4"),
    record("sounds", "<audio> <audio> x?", audio=["sound.wav", "sound.mp4"]),
    record("frames", "<video> x?", video=["whole.png", "other.png", "whole.png"]),
    record("silent", "<video> x?", video="silent.mp4"),
]
BAD = {
    "truncated": (record("truncated", "<image> x?", image="truncated.png"), "truncated.png: .*truncated"),
    "twice": (record("twice", "<image> <image> x?", image=["whole.png", "truncated.png"]), "truncated.png"),
    "text": (record("text", "<image> x?", image="text.png"), "text.png: not an image that can be read"),
    "empty": (record("empty", "<speech> x?", speech="empty.wav"), "empty.wav: has no sound samples"),
    "mute": (record("mute", "<audio> x?", audio="silent.mp4"), "silent.mp4: has no sound track"),
    "wrong": (record("wrong", "<video> x?", video="sound.wav"), "sound.wav: has no video stream"),
    "deaf": (record("deaf", "<audio> x?", audio="whole.png"), "whole.png: .*[Ff]ormat"),
    "late": (record("late", "<image> <image>" + " x" * 200, image=["whole.png", "other.png"]), "tokens with media"),
}


def test_good_files_are_encoded_once_and_broken_ones_are_quarantined(cluster, tmp_path):
    make_files(tmp_path / "source")
    changes = {"data": {"max_bad_fraction": 0.6}, "model": {"language": {"max_positions": 128}}}
    changes["mini"] = {"random_towers": True}
    towers = load_towers(tiny_config(tmp_path, **changes))
    fingerprints = {kind: towers[TOWER_OF[kind]].fingerprint() for kind in MODALITIES}

    def prepare(name: str):
        config = tiny_config(tmp_path, name=name, **changes)
        settings = EncodeSettings(str(tmp_path / "features"), fingerprints, 2, config.data, partial(load_tower, config))
        video, connector = config.model.video, config.model.connector
        connectors = {m: build_connector(m, towers[TOWER_OF[m]].feature_dim, 1, connector, video) for m in MODALITIES}
        seen = []
        result = preparing.prepare(
            config,
            [SourceConfig(path=str(tmp_path / "source"))],
            settings,
            lambda kind, lengths: connectors[kind].soft_tokens(lengths),
            2,
            lambda *progress: seen.append(progress),
        )
        return config, result, seen

    for split, records in (("train", GOOD + [bad for bad, _ in BAD.values()]), ("dev", GOOD), ("test", GOOD[:1])):
        (tmp_path / "source" / f"{split}.json").write_text(json.dumps(records))
    config, result, seen = prepare("first")
    assert result.samples == {"train": {"look": 6}, "dev": {"look": 6}, "test": {"look": 1}}
    entries = [json.loads(line) for line in (config.run_dir / "quarantine.jsonl").read_text().splitlines()]
    assert result.quarantined == len(entries) == len(BAD)
    for entry in entries:
        assert re.search(BAD[entry["id"]][1], entry["reason"]), entry
        assert entry["split"] == "train" and "\n" not in entry["reason"]
    # By kind: 4 images, 4 videos (one of frames), 4 sounds, 2 of speech; 2 + 1 + 2 + 1 of them are broken.
    assert (result.media, result.encoded) == (14, 8)
    assert seen[-1] == ("encoding media", 14, 14)

    source = preparing.source(config, "train")
    table = SampleTable(Path(source.samples))
    by_id = {table.get(row).id: table.get(row) for row in range(len(table))}
    assert by_id.keys() == {good["id"] for good in GOOD}
    assert by_id["image"].soft_tokens == [16] and by_id["video"].soft_tokens == [4, 6]
    assert by_id["mixed"].soft_tokens == [13, 16] and by_id["frames"].group == "video"
    for index, good in enumerate(GOOD):
        files = parse_record(good, index, locate=lambda _, path: str(tmp_path / "source" / path)).media
        for name, item in zip(by_id[good["id"]].media, files, strict=True):
            wanted = encode_files(towers[TOWER_OF[item.kind]], [decode_media(item, 2, config.data)])[0]
            found = read_features(source, name)
            assert found.lengths == wanted.lengths
            scale = np.abs(wanted.values.astype(np.float32)).max()
            assert scale > 0 and np.abs(found.values - wanted.values.astype(np.float32)).max() < 4e-3 * scale

    # Another run on the same data finds all that is sound; only broken files are tried again.
    _, again, seen = prepare("second")
    assert (again.encoded, again.samples) == (0, result.samples)
    assert ("encoding media", 6, 6) in seen
    assert prepare("second")[1:] == (again, [])


def test_media_in_archives_cells_and_data_urls_are_read_by_the_actors(cluster, tmp_path):
    """The same files as they are and packed: the same names, the same features, encoded once."""
    first, second = picture(tmp_path / "whole.png", 0), picture(tmp_path / "other.png", 1)
    changes = {"mini": {"random_towers": True}}
    tower = load_tower(tiny_config(tmp_path, **changes), "image")
    fingerprints = {kind: tower.fingerprint() for kind in MODALITIES}

    def prepare(name: str, store: str, sources: list[SourceConfig]):
        config = tiny_config(tmp_path, name=name, **changes)
        load = partial(load_tower, config)
        settings = EncodeSettings(str(tmp_path / store), fingerprints, 2, config.data, load)
        result = preparing.prepare(config, sources, settings, lambda _, lengths: sum(lengths), 2, lambda *_: None)
        return result.encoded, preparing.source(config, "train")

    with zipfile.ZipFile(tmp_path / "m.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(first, "deep/first.png")
    with tarfile.open(tmp_path / "m.tar", "w") as archive:
        archive.add(second, "second.png")
    inline = f"data:image/png;base64,{base64.b64encode(second.read_bytes()).decode()}"
    packed = {
        "zipped": record("zipped", "<image> x?", image="deep/first.png"),
        "tarred": record("tarred", "<video> x?", video=["second.png", "second.png"]),
        "inline": record("inline", "<image> y?", image=inline),
    }
    for name, entry in packed.items():
        (tmp_path / f"{name}.json").write_text(json.dumps([entry]))
    row = record("cell", "<image> z?", image={"bytes": first.read_bytes(), "path": None})
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "cell.parquet")
    sources = [
        SourceConfig(path=str(tmp_path / "zipped.json"), media=str(tmp_path / "m.zip")),
        SourceConfig(path=str(tmp_path / "tarred.json"), media=str(tmp_path / "m.tar"), weight=2),
        SourceConfig(path=str(tmp_path / "inline.json")),
        SourceConfig(path=str(tmp_path / "cell.parquet")),
    ]
    encoded, found = prepare("packed", "one", sources)
    assert encoded == 3  # two pictures and a video
    assert [(span.first, span.weight) for span in found.spans] == [(0, 1.0), (1, 2.0), (2, 1.0), (3, 1.0)]

    plain = [record("a", "<image> x?", image="whole.png"), record("b", "<video> x?", video=["other.png"] * 2)]
    plain += [record("c", "<image> y?", image="other.png"), record("d", "<image> z?", image="whole.png")]
    (tmp_path / "train.json").write_text(json.dumps(plain))
    alone = [SourceConfig(path=str(tmp_path / "train.json"))]
    assert prepare("plain", "one", alone)[0] == 0
    encoded, other = prepare("anew", "two", alone)
    assert encoded == 3
    rows = [SampleTable(Path(source.samples)) for source in (found, other)]
    for index in range(4):
        media = rows[0].get(index).media
        assert media == rows[1].get(index).media
        for name in media:
            np.testing.assert_array_equal(read_features(found, name).values, read_features(other, name).values)


def test_two_jobs_at_once_encode_everything_once(cluster, tmp_path):
    paths = pictures(tmp_path / "pictures", 60)
    jobs = [StandInJob(tmp_path, "one", paths[:45], 0.03), StandInJob(tmp_path, "two", paths[15:], 0.03)]
    results: dict[str, preparing.Prepared] = {}
    threads = [threading.Thread(target=lambda j=job: results.update({j.config.name: j.prepare()})) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[name].samples["train"] for name in ("one", "two")] == [{"look": 45}, {"look": 45}]
    assert sum(result.encoded for result in results.values()) == len(FeatureStore(jobs[0].folder)) == 60
    assert repeats(jobs[0].log) == 0 and min(result.encoded for result in results.values()) > 0


def test_a_damaged_block_is_encoded_again_and_nothing_else(cluster, tmp_path):
    job = StandInJob(tmp_path, "job", pictures(tmp_path / "pictures", 24))
    first = job.prepare()
    before = {path.name: path.read_bytes() for path in blocks(job.folder)}
    assert (first.encoded, len(before), job.said) == (24, 3, [])
    name = sorted(before)[1]
    (job.folder / name).write_bytes(before[name][:1000])
    assert job.prepare().encoded == repeats(job.log) == 8
    (line,) = job.said
    assert line.startswith(f"{job.folder / name}: damaged")
    assert {path.name: len(path.read_bytes()) for path in blocks(job.folder)} == {n: len(b) for n, b in before.items()}
    assert job.prepare().encoded == 0 and len(encodings(job.log)) == 24 + 8
    # Damage that another job has mended since is noticed, too.
    (job.folder / name).write_bytes(before[name][:1000])
    other = StandInJob(tmp_path, "other", pictures(tmp_path / "pictures", 1))
    again = other.prepare()
    assert len(other.said) == 1
    assert job.prepare().encoded == 8 - again.encoded and len(FeatureStore(job.folder)) == 24


def test_streamed_batches_are_those_of_the_store(cluster, tmp_path):
    paths = pictures(tmp_path / "pictures", 20)
    (paths[3]).write_bytes(paths[3].read_bytes()[:60])
    options = {"held_out": paths[15:], "max_bad_fraction": 0.1}
    stored = StandInJob(tmp_path / "s", "stored", paths[:16], features="store", **options)
    assert stored.prepare().encoded == 19
    streamed = StandInJob(tmp_path / "t", "streamed", paths[:16], features="auto", store_max_gb=1e-9, **options)
    result = streamed.prepare()
    assert (result.encoded, result.samples, result.quarantined) == (
        5,
        {"train": {"look": 15}, "dev": {}, "test": {"look": 5}},
        1,
    )
    (line,) = streamed.said
    assert line.startswith("features are made on the fly, as data.features=auto: stored, they would be 0.000 GB")
    assert len(FeatureStore(streamed.folder)) == 5 and streamed.prepare().encoded == 0
    before = len(encodings(streamed.log))

    def batches(job: StandInJob) -> list[dict[str, np.ndarray]]:
        order, layout = Order((("look", 1.0),), batch_size=6, seed=0, steps=5), Layout(0, 1, max_tokens=40)
        dataset = rank_dataset(job.source("train"), order, layout, steps_per_block=2)
        steps = iterate_steps(dataset, prefetch_blocks=1)
        return [arrays for step in steps for arrays in step.micro_batches]

    expected, found = batches(stored), batches(streamed)
    assert len(expected) == len(found) > 5
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    assert expected[0]["image.values"].any()
    # All pictures, each twice: one actor made each once, and wrote none of them.
    made = encodings(streamed.log)[before:]
    assert len(made) == 15 and len({pid for pid, _ in made}) == 1 and len(FeatureStore(streamed.folder)) == 5
    # What is held out comes from the store, without a tower.
    held = [streamed.source("test"), stored.source("test")]
    names = SampleTable(Path(held[0].samples)).get(0).media
    assert held[0].stream is None
    np.testing.assert_array_equal(*(read_features(source, names[0]).values for source in held))


def test_data_that_wait_for_the_trainer_take_no_core_from_it(cluster, tmp_path, monkeypatch):
    """As after a recovery, when the cluster's room for data is short and batches are made one at a time."""
    job = StandInJob(tmp_path / "s", "stored", pictures(tmp_path / "pictures", 6), features="store")
    job.prepare()
    tight = ExecutionResources(cpu=0.1)
    monkeypatch.setattr(ray.data.DataContext.get_current().execution_options, "resource_limits", tight)
    order, layout = Order((("look", 1.0),), batch_size=2, seed=0, steps=24), Layout(0, 1, max_tokens=40)
    steps = iterate_steps(rank_dataset(job.source("train"), order, layout, steps_per_block=1), prefetch_blocks=1)
    seen = [next(steps), next(steps)]
    time.sleep(1.0)
    before = time.process_time()
    time.sleep(1.0)
    assert time.process_time() - before < 0.4  # Two thirds of a second and more without a pause between rounds.
    assert len(seen) + len(list(steps)) == 24
