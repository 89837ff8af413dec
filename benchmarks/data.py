"""The data pipeline beside plain loops: CPU time of an image, peak memory, reading features beside making them.

    python benchmarks/data.py               some minutes; writes benchmarks/results/data.md
    python benchmarks/data.py --rounds 7
    python benchmarks/data.py --small       does it run; writes nothing

1. JPEG 640x480 to CLIP's input (decoded, cropped and resized to 336, float32): CPU milliseconds of an image, by
   ``/proc`` over the processes that do it. "plain loop": ``decode_media`` and ``preprocess`` in one process. "our
   pipeline": the encoding pipeline as it is (one actor, claims, blocks written and synced), with a tower whose network
   does nothing; counted in between, so that starting Ray, the actor and its imports is not.
   "with daemons": raylet, GCS and idle workers, too, whose time passes with the clock and not with the work. "arrays to
   the consumer": Ray Data tasks whose arrays the driver iterates over. torch's DataLoader and webdataset: one worker,
   the same functions, batches of 32 read by the consumer. Rounds are interleaved; figures are medians, a ratio is the
   median of the ratios within each round. webdataset is skipped where it is not installed (pip install webdataset).
2. Peak memory of the preparing process and of its largest worker, for tiny pictures and for ten times as many.
3. CPU time of a file read from the feature store (every byte copied into a batch) beside decoding and encoding it with
   the small towers, one thread.

The share of padding in batches has a benchmark of its own: benchmarks/batches.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil
import pyarrow as pa
import ray
import soundfile
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from unimoe_ray.config import Config, load
from unimoe_ray.config.data import DataConfig, SourceConfig
from unimoe_ray.data import prepare as preparing
from unimoe_ray.data.batch import stack_features
from unimoe_ray.data.catalog import Catalog
from unimoe_ray.data.encode import EncodeBlock, EncodeSettings, run_actors, write_todo
from unimoe_ray.data.features import decode_media, encode_files
from unimoe_ray.data.schema import Media, Sample
from unimoe_ray.data.sources import Placed
from unimoe_ray.data.store import FeatureStore, write_block
from unimoe_ray.model.features import Features
from unimoe_ray.model.towers.clip import ClipTower
from unimoe_ray.towers import sketch_tower

BATCH = 32
FRAMES = 8
DATA = DataConfig()
LOOP, OURS, DAEMONS, ARRAYS = (
    "plain loop",
    "our pipeline",
    "our pipeline, with daemons",
    "Ray Data, arrays to the consumer",
)
LOADER, WEBDATASET = "torch DataLoader", "webdataset"


class InputTower(ClipTower):
    """CLIP's input and no network behind it."""

    def __init__(self) -> None:
        tiny = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1)
        tiny.image_size, tiny.patch_size = 336, 14
        super().__init__(CLIPVisionModel(tiny))

    def forward(self, batch: list[np.ndarray]) -> Features:
        count = torch.arange(len(batch))
        return Features(torch.ones(len(batch), 1, 8), torch.ones_like(count), count)


class TinyTower(InputTower):
    """For the memory of many small files: no pixels are resized either."""

    def preprocess(self, media: Image.Image) -> np.ndarray:
        return np.asarray(media, np.float32)[None]


def jpegs(folder: Path, count: int) -> list[str]:
    """Pictures with the detail of photographs (some 60 kB each)."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        layers = [rng.integers(0, 256, (480 // k, 640 // k, 3), dtype=np.uint8) for k in (80, 20, 4)]
        big = [Image.fromarray(layer).resize((640, 480), Image.Resampling.BICUBIC) for layer in layers]
        mixed = Image.blend(Image.blend(big[0], big[1], 0.4), big[2], 0.2)
        paths.append(str(folder / f"{seed}.jpg"))
        mixed.save(paths[-1], quality=90)
    return paths


def to_input(tower: Any, path: str) -> np.ndarray:
    return tower.preprocess(decode_media(Media("image", (path,)), FRAMES, DATA))


def cpu_seconds(processes: list[psutil.Process]) -> dict[int, float]:
    """User and system time of those that still live, by process."""
    found = {}
    for process in processes:
        try:
            times = process.cpu_times()
            found[process.pid] = times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return found


def tree() -> list[psutil.Process]:
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


class Meter:
    """CPU time per item, by process, of a part of what an iterator gives: after its first pieces, and before its last,
    so that workers are as far ahead of the consumer at both ends."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self.used: dict[int, float] = {}
        self.items = 0

    def watch(self, sizes: Iterator[int], pieces: int) -> None:
        before: dict[int, float] = {}
        for number, size in enumerate(sizes):
            if 1 < number <= pieces - 4:
                self.items += size
            if number == 1:
                before = cpu_seconds(tree())
            elif number == pieces - 4:
                processes = tree()
                self.used = {pid: seconds - before.get(pid, 0.0) for pid, seconds in cpu_seconds(processes).items()}
                for process in processes:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        self.names[process.pid] = " ".join(process.cmdline())[:80]

    def ms(self, which: Callable[[int, str], bool] = lambda pid, name: True) -> float:
        """Milliseconds for an item, of the processes of a number and name."""
        total = sum(seconds for pid, seconds in self.used.items() if which(pid, self.names.get(pid, "")))
        return 1000 * total / self.items


def plain_loop(paths: list[str]) -> dict[str, float]:
    tower = InputTower()
    to_input(tower, paths[0])
    started = time.process_time()
    for path in paths:
        to_input(tower, path)
    return {LOOP: 1000 * (time.process_time() - started) / len(paths)}


def our_pipeline(paths: list[str], scratch: Path) -> dict[str, float]:
    data = DATA.model_copy(update={"encode_batch": BATCH})
    settings = EncodeSettings(str(scratch / "features"), {"image": "input"}, FRAMES, data, lambda _: InputTower())
    with Catalog(scratch / "catalog", DATA.max_bytes) as catalog:
        fill(catalog, paths)
        count = write_todo(catalog, ["image"], settings, scratch / "todo")
    job = (settings, str(scratch / "todo"), "benchmark", {"image": time.time()})
    meter = Meter()
    meter.watch((len(result) for result in run_actors(EncodeBlock, job, settings, count, 1)), count)
    at_work = lambda pid, name: pid == os.getpid() or "MapWorker" in name  # noqa: E731
    return {OURS: meter.ms(at_work), DAEMONS: meter.ms()}


def fill(catalog: Catalog, paths: list[str]) -> None:
    for index, path in enumerate(paths):
        sample = Sample(str(index), "see", (("<image>", "yes"),), (Media("image", (path,)),), {})
        catalog.add("train", Placed(sample, "list", str(index), 0))


def ray_arrays(paths: list[str]) -> dict[str, float]:
    tower = InputTower()

    def work(block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"input": np.concatenate([to_input(tower, path) for path in block["path"]])}

    blocks = [pa.table({"path": paths[i : i + BATCH]}) for i in range(0, len(paths), BATCH)]
    dataset = ray.data.from_arrow(blocks).map_batches(work, batch_size=None, concurrency=1)
    meter = Meter()
    batches = dataset.iter_batches(batch_size=None, batch_format="numpy")
    meter.watch((len(batch["input"]) for batch in batches), len(blocks))
    return {ARRAYS: meter.ms(lambda pid, name: pid == os.getpid() or name.startswith("ray::"))}


class Files(torch.utils.data.Dataset):
    def __init__(self, paths: list[str]):
        self.paths, self.tower = paths, InputTower()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(to_input(self.tower, self.paths[index]))


def torch_loader(paths: list[str]) -> dict[str, float]:
    return {LOADER: _torch(torch.utils.data.DataLoader(Files(paths), batch_size=BATCH, num_workers=1), len(paths))}


def _torch(loader: torch.utils.data.DataLoader, images: int) -> float:
    meter, before = Meter(), {process.pid for process in psutil.Process().children(recursive=True)}
    meter.watch((len(batch) for batch in loader), -(-images // BATCH))
    return meter.ms(lambda pid, name: pid not in before)


def web_dataset(paths: list[str], shard: Path) -> dict[str, float]:
    import tarfile

    import webdataset

    from unimoe_ray.data.locations import MediaBytes

    with tarfile.open(shard, "w") as archive:
        for index, path in enumerate(paths):
            archive.add(path, f"{index:06d}.jpg")
    tower = InputTower()

    def work(sample: dict[str, Any]) -> torch.Tensor:
        media = Media("image", (MediaBytes(sample["jpg"], sample["__key__"]),))
        return torch.from_numpy(tower.preprocess(decode_media(media, FRAMES, DATA)))

    dataset = (
        webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False)
        .map(work)
        .batched(BATCH, collation_fn=torch.stack)
    )
    return {WEBDATASET: _torch(torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1), len(paths))}


def start_ray() -> None:
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=600 * 2**20,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    ray.data.DataContext.get_current().print_on_execution_start = False


def cpu_times(images: int, rounds: int, root: Path) -> dict[str, dict[str, float]]:
    """Of each way: median CPU ms of an image, and the median ratio to the plain loop of its round."""
    paths = jpegs(root / "jpeg", images)
    start_ray()
    found: list[dict[str, float]] = []
    try:
        for number in range(rounds):
            (scratch := root / f"round-{number}").mkdir()
            round_ = plain_loop(paths)
            round_ |= our_pipeline(paths, scratch)
            round_ |= plain_again(paths, round_)
            round_ |= ray_arrays(paths) | torch_loader(paths)
            try:
                round_ |= web_dataset(paths, scratch / "shard.tar")
            except ModuleNotFoundError as error:
                print(f"webdataset is left out: {error}", file=sys.stderr)
            found.append(round_)
    finally:
        ray.shutdown()
    return {
        name: {
            "ms": statistics.median(r[name] for r in found),
            "ratio": statistics.median(r[name] / r[LOOP] for r in found),
            "least": min(r[name] / r[LOOP] for r in found),
            "most": max(r[name] / r[LOOP] for r in found),
        }
        for name in found[0]
    }


def plain_again(paths: list[str], round_: dict[str, float]) -> dict[str, float]:
    """The loop is timed before and after the pipeline: the machine's speed drifts."""
    return {LOOP: (round_[LOOP] + plain_loop(paths)[LOOP]) / 2}


def peak_memory(count: int, root: Path) -> dict[str, float]:
    """MiB at the peak of preparing so many tiny pictures, in a process of its own."""
    command = [sys.executable, __file__, "--prepare", str(count), str(root)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def prepare_tiny(count: int, root: Path) -> None:
    """Prints what ``peak_memory`` reads. The records are streamed, and so are the media files out of one tar."""
    import io
    import tarfile

    root.mkdir(parents=True)
    turns = [{"from": "human", "value": "<image> what is this?"}, {"from": "gpt", "value": "noise"}]
    with tarfile.open(root / "all.tar", "w") as archive:
        for index in range(count):
            pixels = io.BytesIO()
            colour = tuple(index.to_bytes(3, "little"))
            Image.new("RGB", (4, 4), colour).save(pixels, "PNG")
            record = json.dumps({"id": str(index), "conversations": turns}).encode()
            for name, content in (("png", pixels.getvalue()), ("json", record)):
                entry = tarfile.TarInfo(f"{index:08d}.{name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    config: Config = load("mini", [f"runs_dir={root}", f"data.dir={root}", "model.language.vocab_size=300"])
    settings = EncodeSettings(str(root / "features"), {"image": "tiny"}, FRAMES, config.data, lambda _: TinyTower())
    start_ray()
    largest, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(0.1):
            for process in psutil.Process().children(recursive=True):
                try:
                    if "MapWorker" in " ".join(process.cmdline()):
                        largest[0] = max(largest[0], process.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue

    thread = threading.Thread(target=look)
    thread.start()
    sources = [SourceConfig(path=str(root / "all.tar"))]
    try:
        result = preparing.prepare(config, sources, settings, lambda _, n: sum(n), 1, lambda *_: None)
    finally:
        done.set()
        thread.join()
        ray.shutdown()
    assert result.encoded == count and result.quarantined == 0, result
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps({"driver": int(status["VmHWM"].split()[0]) / 1024, "worker": largest[0] / 2**20}))


def store_and_towers(count: int, root: Path) -> dict[str, dict[str, float]]:
    """By kind: CPU ms to decode and encode a file, to read its features out of the store, and the ratio."""
    torch.set_num_threads(1)
    config = load("mini", ["mini.random_towers=true"])
    folder = root / "small"
    folder.mkdir()
    rng = np.random.default_rng(0)
    found = {}
    for kind in ("image", "speech", "audio"):
        paths = []
        for index in range(count):
            paths.append(str(folder / f"{kind}{index}.{'png' if kind == 'image' else 'wav'}"))
            if kind == "image":
                Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(paths[-1])
            else:
                soundfile.write(paths[-1], rng.normal(0, 0.1, 24_000).astype(np.float32), 16_000)
        tower = sketch_tower(config, kind)
        items = [Media(kind, (path,)) for path in paths]
        encode_files(tower, [decode_media(items[0], FRAMES, DATA)])
        started = time.process_time()
        features = []
        for first in range(0, count, BATCH):
            decoded = [decode_media(item, FRAMES, DATA) for item in items[first : first + BATCH]]
            features += encode_files(tower, decoded)
        made = (time.process_time() - started) / count
        keys = [f"{index:064d}" for index in range(count)]
        write_block(folder / kind, keys, features)
        store = FeatureStore(folder / kind)
        order = rng.permutation(count).repeat(4)
        started = time.process_time()
        for first in range(0, len(order), BATCH):
            stack_features(kind, [store.get(keys[index]) for index in order[first : first + BATCH]])
        read = (time.process_time() - started) / len(order)
        found[kind] = {"encode_ms": 1000 * made, "read_ms": 1000 * read, "ratio": made / read}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prepare", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        return prepare_tiny(int(arguments.prepare[0]), Path(arguments.prepare[1]))
    images, rounds, tiny, files = (256, 1, 300, 32) if arguments.small else (640, arguments.rounds, 3000, 256)
    lines: list[str] = []

    def say(line: str = "") -> None:
        print(line, flush=True)
        lines.append(line)

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        times = cpu_times(images, rounds, root)
        say(f"JPEG 640x480 to CLIP's input, {images} images, {rounds} rounds, one worker each:")
        say()
        say("| | CPU ms per image | ratio to the loop | least | most |")
        say("|---|---|---|---|---|")
        for name, row in times.items():
            say(f"| {name} | {row['ms']:.2f} | {row['ratio']:.3f} | {row['least']:.3f} | {row['most']:.3f} |")
        small, large = (peak_memory(n, root / f"tiny-{n}") for n in (tiny, 10 * tiny))
        say()
        say("Peak memory of preparing tiny pictures, MiB:")
        say()
        say(f"| | {tiny} | {10 * tiny} | ratio |")
        say("|---|---|---|---|")
        for name in small:
            say(f"| {name} | {small[name]:.0f} | {large[name]:.0f} | {large[name] / small[name]:.3f} |")
        reading = store_and_towers(files, root)
        say()
        say("A file of the small towers, CPU ms (64 px pictures, 1.5 s of sound):")
        say()
        say("| | decoded and encoded | read from the store | ratio |")
        say("|---|---|---|---|")
        for kind, row in reading.items():
            say(f"| {kind} | {row['encode_ms']:.2f} | {row['read_ms']:.4f} | {row['ratio']:.0f} |")
    if not arguments.small:
        (Path(__file__).parent / "results" / "data.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    memory = {"files": tiny, "small": small, "large": large}
    print(json.dumps({"benchmark": "data", "cpu": times, "memory": memory, "store": reading}))


if __name__ == "__main__":
    main()
