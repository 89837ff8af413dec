"""The feature store and the prepared samples: what is written comes back, blocks appear complete or not at all."""

import hashlib

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimoe_ray.data.locations import BadMedia, content_key
from unimoe_ray.data.samples import PreparedSample, SampleTable, write_samples
from unimoe_ray.data.store import FeatureStore, StoredFeatures, partition_dir, write_block


def features(seed: int, windows: int = 2, n: int = 3, dim: int = 4) -> StoredFeatures:
    values = np.random.default_rng(seed).normal(size=(windows, n, dim)).astype(np.float16)
    return StoredFeatures(values, list(range(1, windows + 1)))


shapes = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=5)


@settings(max_examples=30, deadline=None)
@given(st.lists(shapes, max_size=3))
def test_blocks_come_back(tmp_path_factory, blocks):
    folder = tmp_path_factory.mktemp("store") / "deep" / "er"
    written = {}
    for number, block in enumerate(blocks):
        entries = {f"{number}-{i}": features(i, *shape) for i, shape in enumerate(block)}
        write_block(folder, list(entries), list(entries.values()))
        written |= entries
    store = FeatureStore(folder)
    assert len(store) == len(written)
    for key, expected in written.items():
        found = store.get(key)
        assert key in store and store.lengths(key) == found.lengths == expected.lengths
        assert found.values.dtype == np.float16 and np.array_equal(found.values, expected.values)
    assert "other" not in store
    with pytest.raises(KeyError):
        store.get("other")


def test_values_are_a_view_of_the_mapped_file(tmp_path):
    write_block(tmp_path, ["a"], [features(0, 10, 100, 50)])
    before = pa.total_allocated_bytes()
    values = FeatureStore(tmp_path).get("a").values
    assert not values.flags.owndata
    assert pa.total_allocated_bytes() - before < 10_000 < values.nbytes


def test_the_same_block_twice_is_one_file(tmp_path):
    first = write_block(tmp_path, ["a", "b"], [features(0), features(1)])
    assert write_block(tmp_path, ["a", "b"], [features(0), features(1)]) == first
    assert [p.name for p in tmp_path.iterdir()] == [first.name]


def test_what_was_not_finished_is_not_seen(tmp_path):
    path = write_block(tmp_path, ["a"], [features(0)])
    (tmp_path / ".half.123").write_bytes(path.read_bytes()[:100])
    assert len(FeatureStore(tmp_path)) == 1
    assert len(FeatureStore(tmp_path / "missing")) == 0


def test_content_key(tmp_path):
    for name, content in (("a", b"one"), ("b", b"two"), ("c", b"one"), ("d", b"onetwo"), ("e", b"x")):
        (tmp_path / name).write_bytes(content)

    def key(*names):
        return content_key([str(tmp_path / name) for name in names], 100)

    assert key("a") == key("c") == hashlib.sha256(hashlib.sha256(b"one").digest()).hexdigest()
    keys = [key("a"), key("b"), key("a", "b"), key("b", "a"), key("d"), key("d", "e"), key("a", "b", "e")]
    assert len(set(keys)) == len(keys)
    with pytest.raises(BadMedia, match="missing: No such file"):
        key("a", "missing")


def test_partitions_differ_by_modality_and_fingerprint(tmp_path):
    folders = {
        partition_dir(tmp_path, m, f) for m in ("image", "video") for f in ("1" * 64, "2" * 64, "f4-" + "1" * 64)
    }
    assert len(folders) == 6


def prepared(index: int, task: str, group: str, media: int) -> PreparedSample:
    ids = [1, *[-200] * media, 5, 3, 7 + index, 2]
    labels = [-100] * (len(ids) - 2) + ids[-2:]
    return PreparedSample(f"s{index}", task, group, ids, labels, [f"image/{i}" for i in range(media)], [4] * media)


def test_samples_come_back(tmp_path):
    samples = [prepared(i, f"task{i % 3}", "image" if i % 2 else "text", i % 2) for i in range(7)]
    path = tmp_path / "sub" / "train.arrow"
    write_samples(path, samples)
    table = SampleTable(path)
    assert len(table) == 7
    assert [table.get(row) for row in range(7)] == samples
    assert np.asarray(table.lengths).tolist() == [s.length for s in samples] == [5, 9, 5, 9, 5, 9, 5]
    assert {t: list(rows) for t, rows in table.by_task().items()} == {
        "task0": [0, 3, 6],
        "task1": [1, 4],
        "task2": [2, 5],
    }
    assert [code == np.asarray(table.groups)[0] for code in np.asarray(table.groups)] == [
        s.group == "text" for s in samples
    ]
    assert [p.name for p in path.parent.iterdir()] == ["train.arrow"]


def test_a_split_without_samples(tmp_path):
    write_samples(tmp_path / "dev.arrow", [])
    table = SampleTable(tmp_path / "dev.arrow")
    assert len(table) == len(table.lengths) == len(table.groups) == 0
    assert table.by_task() == {}


def test_prompts_have_no_labels(tmp_path):
    write_samples(tmp_path / "test.arrow", [PreparedSample("a", "t", "text", [1, 5, 3], [], [], [])])
    assert SampleTable(tmp_path / "test.arrow").get(0).labels == []
