"""Micro-batches against a slow construction, and through their bytes."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from unimoe_ray.config.model import IGNORE_INDEX, PLACEHOLDER_IDS
from unimoe_ray.data.batch import collate, expand, from_bytes, to_bytes
from unimoe_ray.data.samples import PreparedSample
from unimoe_ray.data.store import StoredFeatures

DIM = 3
KINDS = tuple(PLACEHOLDER_IDS)


def stored(name: str) -> StoredFeatures:
    """``<kind>/<windows>-<tokens>-<seed>``: every window has one token less than the one before, at least one."""
    windows, n, seed = (int(part) for part in name.split("/")[1].split("-"))
    values = np.random.default_rng(seed).normal(size=(windows, n, DIM)).astype(np.float16)
    return StoredFeatures(values, [max(1, n - i) for i in range(windows)])


@st.composite
def sample_lists(draw):
    samples = []
    for index in range(draw(st.integers(0, 4))):
        ids, labels, media, counts = [1], [IGNORE_INDEX], [], []
        for _ in range(draw(st.integers(0, 5))):
            kind = draw(st.sampled_from([None, *KINDS]))
            if kind is None:
                ids.append(draw(st.integers(4, 300)))
                labels.append(ids[-1] if draw(st.booleans()) else IGNORE_INDEX)
            else:
                media.append(f"{kind}/{draw(st.integers(1, 3))}-{draw(st.integers(1, 4))}-{draw(st.integers(0, 99))}")
                counts.append(sum(stored(media[-1]).lengths))
                ids.append(PLACEHOLDER_IDS[kind])
                labels.append(IGNORE_INDEX)
        samples.append(PreparedSample(str(index), "t", "g", ids, labels, media, counts))
    return samples


def slow_rows(samples: list[PreparedSample]) -> list[list[tuple[int, int]]]:
    """(id, label) at each place of every row, unpadded."""
    rows = []
    for sample in samples:
        row, counts = [], list(sample.soft_tokens)
        for token, label in zip(sample.ids, sample.labels, strict=True):
            row += [(token, label)] * counts.pop(0) if token < 0 else [(token, label)]
        rows.append(row)
    return rows


@settings(max_examples=100, deadline=None)
@given(sample_lists(), st.booleans())
def test_collate(samples, pad_left):
    arrays = collate(samples, stored, pad_left=pad_left)
    rows = slow_rows(samples) or [[]]
    width = max(1, max(map(len, rows)))
    for index, row in enumerate(rows):
        gap = [(0, IGNORE_INDEX, False)] * (width - len(row))
        full = [(token, label, True) for token, label in row]
        expected = gap + full if pad_left else full + gap
        found = zip(arrays["input_ids"][index], arrays["labels"][index], arrays["mask"][index], strict=True)
        assert [tuple(entry) for entry in found] == expected
    assert [s.length for s in samples] == [len(row) for row in rows[: len(samples)]]
    for kind in KINDS:
        files = [stored(name) for sample in samples for name in sample.media if name.startswith(f"{kind}/")]
        if not files:
            assert f"{kind}.values" not in arrays
            continue
        values, lengths, owner = (arrays[f"{kind}.{part}"] for part in ("values", "lengths", "owner"))
        assert (values.dtype, lengths.dtype, owner.dtype) == (np.float16, np.int64, np.int64)
        assert lengths.tolist() == [n for file in files for n in file.lengths]
        for index, file in enumerate(files):
            mine = values[owner == index]
            assert np.array_equal(mine[:, : file.values.shape[1]], file.values)
            assert not mine[:, file.values.shape[1] :].any()
        # As many placeholders as valid feature tokens: what splice asserts for connectors of one token each.
        assert (arrays["input_ids"] == PLACEHOLDER_IDS[kind]).sum() == lengths.sum()


def test_without_labels():
    sample = PreparedSample("a", "t", "image", [1, PLACEHOLDER_IDS["image"], 5, 3], [], ["image/1-2-0"], [2])
    arrays = collate([sample], stored, with_labels=False)
    assert arrays["input_ids"].tolist() == [[1, -200, -200, 5, 3]]
    assert (arrays["labels"] == IGNORE_INDEX).all()


def test_expand():
    assert expand([1, -200, 5, -300], [-100, -100, 5, -100], [2, 0]) == ([1, -200, -200, 5], [-100, -100, -100, 5])


@settings(max_examples=50, deadline=None)
@given(sample_lists())
def test_bytes_come_back(samples):
    arrays = collate(samples, stored)
    back = from_bytes(to_bytes(arrays))
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype and np.array_equal(back[name], array)
