"""From samples with several files of any kind to spliced embeddings, against one sample at a time."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unimoe_ray.config.model import IGNORE_INDEX, PLACEHOLDER_IDS
from unimoe_ray.data.batch import collate
from unimoe_ray.data.samples import PreparedSample
from unimoe_ray.data.store import StoredFeatures
from unimoe_ray.model.splice import splice
from unimoe_ray.model.unimoe import to_batch

WIDTH, VOCAB = 3, 20
word = st.tuples(st.just("text"), st.integers(1, VOCAB - 1), st.booleans())
media = st.tuples(st.sampled_from(list(PLACEHOLDER_IDS)), st.lists(st.integers(1, 4), min_size=1, max_size=3))
rows = st.lists(st.lists(st.one_of(word, word, media), max_size=7), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(rows, st.booleans(), st.integers(0, 2**31 - 1))
def test_any_mix_of_media_lengths_and_padding(rows, pad_left, seed):
    rng = np.random.default_rng(seed)
    table = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(seed))
    store: dict[str, StoredFeatures] = {}
    samples, wanted, wanted_labels = [], [], []
    for number, row in enumerate(rows):
        ids, labels, names, counts = [], [], [], []
        expected, expected_labels = [], []
        for kind, *what in row:
            if kind == "text":
                token, answer = what
                ids.append(token)
                labels.append(token if answer else IGNORE_INDEX)
                expected.append(table[token][None])
                expected_labels.append(labels[-1])
                continue
            (lengths,) = what
            values = rng.normal(size=(len(lengths), max(lengths), WIDTH)).astype(np.float16)
            for window, length in enumerate(lengths):
                expected.append(torch.from_numpy(values[window, :length].astype(np.float32)))
                values[window, length:] = np.nan  # never read
            name = f"{kind}/{len(store)}"
            store[name] = StoredFeatures(values, lengths)
            ids.append(PLACEHOLDER_IDS[kind])
            labels.append(IGNORE_INDEX)
            names.append(name)
            counts.append(sum(lengths))
            expected_labels += [IGNORE_INDEX] * sum(lengths)
        samples.append(PreparedSample(str(number), "t", "g", ids, labels, names, counts))
        wanted.append(torch.cat([torch.zeros(0, WIDTH), *expected]))
        wanted_labels.append([IGNORE_INDEX, *expected_labels[1:]] if expected_labels else [])

    batch = to_batch(collate(samples, store.__getitem__, pad_left=pad_left))
    found = splice(table[batch.input_ids.clamp(min=0)], batch.input_ids, batch.features)
    width = max(1, max(len(row) for row in wanted))
    assert found.shape == (len(rows), width, WIDTH)
    for index, expected in enumerate(wanted):
        real = slice(width - len(expected), width) if pad_left else slice(0, len(expected))
        mask = torch.zeros(width, dtype=torch.bool)
        mask[real] = True
        assert torch.equal(batch.mask[index], mask)
        assert torch.equal(found[index, real], expected)
        assert torch.equal(found[index, ~mask], table[0].expand(width - len(expected), WIDTH))
        assert batch.labels[index, real].tolist() == wanted_labels[index]
        assert (batch.labels[index, ~mask] == IGNORE_INDEX).all()
