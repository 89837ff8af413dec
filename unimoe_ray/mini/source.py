"""The embedded default as a data source: its suite on disk and its towers in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from unimoe_ray.config import Config
from unimoe_ray.mini.assets import Assets, fetch
from unimoe_ray.mini.suite import SuiteScale, build
from unimoe_ray.mini.towers import load_towers
from unimoe_ray.model.features import Tower


def suite_dir(config: Config) -> Path:
    """Where the suite of this seed is, or will be."""
    return Path(config.data.dir) / f"mini-{config.mini.scale}-{config.suite_seed}"


def suite(config: Config, say: Callable[[str], None]) -> Path:
    """The folder of the suite for this seed, built unless it is there."""
    scale = SuiteScale.tiny() if config.mini.scale == "tiny" else SuiteScale()
    folder = suite_dir(config)
    if not (folder / "suite.json").is_file():
        say("fetching the mini assets")
        assets = fetch(say, parts=("suite",) if config.mini.random_towers else ("suite", "towers"))
        say(f"making the task suite in {folder}")
        build(folder, assets, config.suite_seed, scale)
    return folder


def suite_hash(config: Config) -> str | None:
    """The content hash stamped on the suite, if this run uses it."""
    if not config.data.is_mini:
        return None
    return json.loads((suite_dir(config) / "suite.json").read_text())["hash"]


def towers(config: Config, modalities: tuple[str, ...] = ("image", "speech", "audio")) -> dict[str, Tower]:
    """Small frozen towers of these modalities, loaded once in a process. Raises UsageError for a name that is not a
    small one's."""
    chosen = config.model.towers
    return {m: _tower(m, getattr(chosen, m).name, config.mini.random_towers) for m in modalities}


@lru_cache(maxsize=6)
def _tower(modality: str, name: str, random: bool) -> Tower:
    return load_towers({modality: name}, None if random else _assets(), random=random)[modality]


@lru_cache(maxsize=1)
def _assets() -> Assets:
    return fetch(debian_packages=False)
