"""Features made on the fly, and the sizes by which it is chosen. No cluster."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.stand_in_tower import StandInTower, encodings, pictures
from tests.tiny import tiny_config
from unimoe_ray.data import stream as streaming
from unimoe_ray.data.catalog import Catalog
from unimoe_ray.data.encode import EncodeSettings
from unimoe_ray.data.features import encode_files
from unimoe_ray.data.locations import content_key
from unimoe_ray.data.schema import Media, Sample
from unimoe_ray.data.sizes import StoreSize, chosen, size_lines, store_sizes
from unimoe_ray.data.sources import Placed
from unimoe_ray.data.store import StoredFeatures, partition_dir, write_block
from unimoe_ray.data.stream import Stream, Streamer, write_places
from unimoe_ray.errors import UnimoeError
from unimoe_ray.store_table import store_table
from unimoe_ray.towers import load_tower


def settings(root: Path, **data) -> EncodeSettings:
    config = tiny_config(root, data=data)
    return EncodeSettings(str(root / "f"), {"image": "tower"}, 2, config.data, lambda _: StandInTower(root / "log"))


@pytest.fixture
def paths(tmp_path) -> dict[str, str]:
    """Locations by name, sorted."""
    return {f"image/{i:02d}": str(path) for i, path in enumerate(pictures(tmp_path / "pictures", 12))}


def make(tmp_path, paths, **data) -> Streamer:
    write_places(tmp_path / "places", ((name, [path]) for name, path in paths.items()))
    return Streamer(Stream(str(tmp_path / "places"), settings(tmp_path, **data)))


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_any_media_in_any_order(tmp_path, paths, monkeypatch, dtype):
    monkeypatch.setattr(streaming, "_PART", 5)
    streamer = make(tmp_path, paths, store_dtype=dtype)
    names = ["image/07", "image/00", "image/11", "image/07"]
    found = streamer(names)
    assert found.keys() == set(names)
    for name in names:
        (wanted,) = encode_files(StandInTower(tmp_path / "other"), [Image.open(paths[name]).convert("RGB")])
        assert found[name].values.dtype == {"fp16": np.float16, "fp32": np.float32}[dtype]
        assert np.array_equal(found[name].values, wanted.values) and found[name].lengths == wanted.lengths
    assert len(encodings(tmp_path / "log")) == 3


def test_what_was_used_last_is_kept(tmp_path, paths, monkeypatch):
    streamer = make(tmp_path, paths)
    monkeypatch.setattr(streaming, "CACHE_BYTES", 3 * 4 * 12 * 2)  # of three pictures
    names = list(paths)
    for name in (0, 1, 2, 0, 3, 0, 2, 1):  # 3 takes the place of 1, 1 that of 3
        streamer([names[name]])
    assert len(encodings(tmp_path / "log")) == 5
    assert len(streamer(names)) == len(names)


def test_media_that_are_gone_or_unknown(tmp_path, paths):
    streamer = make(tmp_path, paths)
    Path(paths["image/04"]).unlink()
    with pytest.raises(UnimoeError, match="4.png: No such file.*; it could be read when the data were prepared"):
        streamer(["image/03", "image/04"])
    for name in ("image/99", "audio/00", "image/0"):
        with pytest.raises(UnimoeError, match=f"{name} is not among the prepared media"):
            streamer([name])


def test_llava_is_three_quarters_of_a_terabyte():
    """665,000 pictures of 576 tokens with 1,024 numbers, two bytes each."""
    llava = StoreSize("image", 665_000, 1, 576, 1024)
    assert llava.bytes("fp16") == 665_000 * 576 * 1024 * 2 and round(llava.bytes("fp16") / 1e12, 1) == 0.8
    assert llava.bytes("fp32") == 2 * llava.bytes("fp16")
    assert chosen("auto", llava.bytes("fp16") / 1e9, 500.0) == "stream" == chosen("stream", 0.0, 500.0)
    assert chosen("auto", 499.0, 500.0) == "store" == chosen("store", 1e6, 500.0)


def test_sizes_are_told_by_a_few_files(tmp_path, paths):
    with Catalog(tmp_path / "catalog", 2**20) as catalog:
        for index, path in enumerate(paths.values()):
            sample = Sample(str(index), "see", (("<image>", "yes"),), (Media("image", (path,)),), {})
            catalog.add("train", Placed(sample, "file", str(index), 0))
        Path(paths["image/00"]).write_bytes(b"no picture any more")
        how = settings(tmp_path, store_max_gb=1e-6)
        (size,) = store_sizes(catalog, how)
        assert size == StoreSize("image", 12, 1, 4, 12) and size.bytes("fp16") == 12 * 4 * 12 * 2
        assert not (tmp_path / "log").exists()  # nothing was encoded
        (measured,) = store_sizes(catalog, how, lambda _: StandInTower(tmp_path / "log"))
    assert measured.seconds > 0 and 1 < len(encodings(tmp_path / "log")) < 12
    lines = size_lines([StoreSize("image", 12, 1, 4, 12, there=2, seconds=7200.0)], how, 2)
    assert " ".join(lines[2].split()) == "image 12 2 1 x 4 x 12 0.000 0.000 10 h 00 min"
    assert lines[3] == "in all 0.000 GB in fp16, more than data.store_max_gb=1e-06; data.features=auto: stream"


def test_a_dry_run_says_what_the_store_needs(tmp_path, paths):
    records = [
        {
            "id": name,
            "image": path,
            "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}],
        }
        for name, path in paths.items()
    ]
    (tmp_path / "train.json").write_text(json.dumps(records))
    data = {"sources": [{"path": str(tmp_path / "train.json")}], "store_max_gb": 1e-5}
    config = tiny_config(tmp_path, mini={"random_towers": True}, data=data)
    before = sorted(tmp_path.iterdir())
    head, store, _, image, total, how = store_table(config)
    assert head == "12 records, 12 media files, 0 records unusable" and sorted(tmp_path.iterdir()) == before
    assert store.startswith(f"feature store {tmp_path / 'data' / 'features'}: ")
    assert " ".join(image.split()).startswith("image 12 0 1 x 16 x 112 0.000 0.000 0 min")
    assert total == "in all 0.000 GB in fp16, more than data.store_max_gb=1e-05; data.features=auto: stream"
    assert "2 workers" in how
    # What is stored already is counted, too.
    tower = load_tower(config, "image")
    folder = partition_dir(tmp_path / "data" / "features", "image", tower.fingerprint())
    write_block(folder, [content_key([path], 2**20) for path in list(paths.values())[:5]], [stored()] * 5)
    assert " ".join(store_table(config)[3].split()).startswith("image 12 5 1 x 16 x 112")
    gone = tiny_config(tmp_path, data={"source": str(tmp_path / "gone")})
    (line,) = store_table(gone)
    assert line.startswith("nothing to count: ") and "gone" in line


def stored() -> StoredFeatures:
    return StoredFeatures(np.zeros((1, 16, 112), np.float16), [16])
