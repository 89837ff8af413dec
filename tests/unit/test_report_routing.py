"""The report's parts about routing: condensed histories, strips, curves and findings, also in a real browser."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.unit.test_report import _Page
from unimoe_ray.report import write_report
from unimoe_ray.report.history import MAX_BINS, RoutingHistory
from unimoe_ray.report.lines import spread

L, E = 3, 4
SLOTS = ["base", "image", "speech", "audio"]


def lines(steps: int, layers: int = L, experts: int = E) -> list[dict]:
    """Of a run in which image tokens move from the first to the second expert; an expert of layer 2 dies at step 60."""
    chooser = np.random.default_rng(0)
    found = []
    for step in range(1, steps + 1):
        text = chooser.integers(40, 60, (layers, experts))
        image = chooser.integers(5, 15, (layers, experts))
        image[:, 0] += max(0, 100 - step)
        image[:, 1] += step
        if step >= 60:
            text[1, 3] = image[1, 3] = 0
        line = {
            "step": step,
            "steps": steps,
            "stage": "tune",
            "run": "tune",
            "loss": 2 / step,
            "tokens": 500,
            "seconds": 0.5,
        }
        line |= {"expert_tokens": {"text": text.tolist(), "image": image.tolist()}, "expert_load": [[0.25]]}
        line |= {"router_entropy": [1.2 - 0.001 * step] * layers, "busiest_share": [0.3 + 0.001 * step] * layers}
        if step % 25 == 0:
            line["validation"] = {"text": math.exp(-step / 80), "image": 0.2 + step / 100, "audio+video": 0.5}
        found.append(line)
    return found


def make_run(folder: Path, metrics: list[dict], findings: list[dict]) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(json.dumps({"model": {"moe": {"slots": SLOTS}}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (folder / "findings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in findings))
    return folder


FINDINGS = [
    {
        "run": "tune",
        "step": 59,
        "since": 40,
        "signature": "collapse",
        "text": "layer 3 sends all",
        "layer": 2,
        "over": False,
    },
    {
        "run": "tune",
        "step": 109,
        "since": 60,
        "signature": "dead",
        "text": "expert 3 had no token",
        "layer": 1,
        "over": False,
    },
    {
        "run": "tune",
        "step": 120,
        "since": 101,
        "signature": "collapse",
        "text": "layer 3 is back",
        "layer": 2,
        "over": True,
    },
]


@pytest.mark.parametrize("steps", [1, 95, 96, 97, 1000, 5000])
def test_a_condensed_history_has_the_sums_of_all_its_steps(steps):
    history, records = RoutingHistory(), lines(steps)
    for record in records:
        history.add(record["step"], record)
    assert len(history.bins) <= 2 * MAX_BINS and (steps <= 2 * MAX_BINS) == (history.width == 1)
    assert [b.first for b in history.bins[1:]] == [b.last + 1 for b in history.bins[:-1]]
    assert (history.bins[0].first, history.bins[-1].last) == (1, steps)
    for number, b in enumerate(history.bins):
        part = [np.array(r["expert_tokens"]["image"]) for r in records[b.first - 1 : b.last]]
        share = sum(part) / sum(part).sum(-1, keepdims=True)
        assert np.allclose(history.shares("image")[number], share)
        entropy = np.mean([r["router_entropy"] for r in records[b.first - 1 : b.last]], axis=0)
        assert np.allclose(history.means("entropy")[number], entropy)
    assert np.isnan(history.shares("speech")).all()
    assert np.allclose(history.shares(None).sum(-1), 1)


def test_steps_done_again_replace_the_old_ones():
    history = RoutingHistory()
    for record in [*lines(30), *lines(40)[19:]]:
        history.add(record["step"], record)
    assert [b.first for b in history.bins] == list(range(1, 41))


def test_labels_are_spread_in_order_and_stay_inside():
    assert spread([50.0, 50.0, 50.0], 12, 10, 200) == [50, 62, 74]
    assert spread([198.0, 199.0], 12, 10, 200) == [188, 200]
    assert spread([30.0, 10.0], 12, 10, 200) == [30, 10]
    crowded = spread([100.0] * 40, 12, 10, 200)
    assert crowded == sorted(crowded) and crowded[0] >= 10 - 1e-9 and crowded[-1] <= 200 + 1e-9


def test_the_page_shows_how_the_load_developed(tmp_path):
    records = lines(180)
    text = write_report(make_run(tmp_path / "run", records, FINDINGS)).read_text()
    page = _Page(text)
    strips = [json.loads(data) for data in page.all("figure", "data-strip")]
    assert len(strips) == 3 * L and all(strip["rows"] == SLOTS for strip in strips)  # all tokens, text, image
    assert strips[0]["spans"][0] == [1, 2] and strips[0]["spans"][-1] == [179, 180]
    first = sum(np.array(record["expert_tokens"]["image"][0]) for record in records[:2])
    image = strips[2 * L]["shares"]
    assert [row[0] for row in image] == pytest.approx((100 * first / first.sum()).tolist(), abs=0.051)
    assert strips[1]["shares"][3][-1] == 0 and strips[0]["shares"][3][-1] > 10
    charts = [json.loads(data) for data in page.all("figure", "data-lines")]
    assert [chart["names"] for chart in charts] == [
        ["text", "image", "audio+video"],
        *[["layer 1", "layer 2", "layer 3"]] * 2,
    ]
    assert charts[0]["steps"] == list(range(25, 181, 25)) and charts[0]["values"][1][0] == 0.45
    assert charts[1]["values"][0][0] == pytest.approx(1.1985, abs=1e-3)
    plain = re.sub(r"\s+", " ", re.sub(r"<(style|script|svg).*?</\1>|<[^>]+>", " ", text, flags=re.S))
    assert "2 remarks on 1 run" in plain
    assert "collapse tune, from step 40 to 100 Layer 3 sends all." in plain
    assert "dead expert tune, since step 60 Expert 3 had no token." in plain


def test_a_large_model_has_a_strip_per_layer(tmp_path):
    text = write_report(make_run(tmp_path / "run", lines(100, 24, 64), [])).read_text()
    (strip,) = (json.loads(data) for data in _Page(text).all("figure", "data-strip"))
    assert len(strip["rows"]) == 24 and strip["shares"][0][0] == pytest.approx(30.2, abs=0.1)
    assert len(text) < 300_000 and "Nothing to remark on" in text


def test_damaged_loads_are_named_and_those_without_them_are_none(tmp_path):
    records = lines(3)
    records[1]["expert_tokens"]["text"] = [[1, 2], [3]]
    records[2]["expert_tokens"] = {"text": [[1, 2, 3]]}
    text = write_report(make_run(tmp_path / "run", records, [{"run": 1}])).read_text()
    assert "values that are no numbers" in text and text.count('<figure class="strip') == 9
    dense = [line | {"expert_tokens": None, "expert_load": None} for line in lines(3)]
    text = write_report(make_run(tmp_path / "dense", dense, [])).read_text()
    assert "While training" not in text and "Nothing to remark on" in text


def test_strips_and_curves_can_be_read_off_in_a_browser(tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium", path="/usr/bin")
    if chromium is None:
        pytest.skip("no /usr/bin/chromium")
    path = write_report(make_run(tmp_path / "run", lines(180), FINDINGS))
    with sync_api.sync_playwright() as playwright:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags, timeout=60_000)
        context = browser.new_context(offline=True, viewport={"width": 390, "height": 800})
        page, errors = context.new_page(), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text))
        page.goto(path.as_uri())
        assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")
        strips = page.locator("figure.strip:visible")
        assert strips.count() == L
        page.get_by_label("image", exact=True).check(force=True)
        assert strips.count() == L
        strips.first.locator("svg").focus()
        page.keyboard.press("Home")
        readout = strips.first.locator(".readout")
        assert re.fullmatch(
            r"steps 1–2: base [\d.]+, image [\d.]+, speech [\d.]+, audio [\d.]+", readout.text_content()
        )
        page.keyboard.press("Tab")
        assert readout.text_content() == "first → last, %"
        chart = page.locator("figure.lines").first
        chart.locator("svg").hover()
        assert re.match(r"step \d+: text [\d.]+, image ", chart.locator(".readout").text_content())
        browser.close()
    assert errors == []
