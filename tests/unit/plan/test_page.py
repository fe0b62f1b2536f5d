"""The planner's page: whole by itself, readable in a real browser on a phone, in light and in dark."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sltrain_dist.config.load import build_config
from sltrain_dist.plan.components import GROUPS
from sltrain_dist.plan.paper.reference import reference_estimate
from sltrain_dist.plan.planned_run import PlannedRun, plan_run
from sltrain_dist.plan.reports.page import render_page
from sltrain_dist.plan.reports.sentences import search_columns, shared_settings
from sltrain_dist.plan.search.combinations import SearchResult, SingleChange, evaluate

BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)


@pytest.fixture(scope="module")
def planned() -> PlannedRun:
    """An answer with all that a page can hold: it does not fit, there are changes, and rows of a search."""
    settings: dict[str, Any] = {"preset": "llama_60m", "optim": {"state_bits": 8}}
    config = build_config(settings)

    def estimate(config: Any, *, ranks: int) -> Any:
        return reference_estimate(config)

    names = {"state bits": "8", "recompute": "all but attention", "engine": "zero 3, factors <&>"}
    rows = [evaluate(config, {**names, "micro-batch": f"{number} <&>"}, 1, estimate) for number in (1, 2)]
    found = SearchResult(rows)
    changes = [
        SingleChange({"train.activation_checkpointing": "selective", "train.checkpoint_policy": "attention"}, rows[0])
    ]
    return PlannedRun(
        config,
        1,
        500_000_000,
        reference_estimate(config),
        changes,
        found,
        rows,
        saved_files=["a/plan-01.yaml", "b.yaml"],
    )


@pytest.fixture(scope="module")
def estimated() -> PlannedRun:
    """A run of this code on several ranks, whose update has all five phases, short and long ones."""
    settings = {"preset": "llama_60m", "parallel": {"engine": "fsdp"}, "train": {"micro_batch": 8}}
    return plan_run(build_config(settings), 8, 10 * 10**9)


class Reader(HTMLParser):
    """Collects tags, and the texts of cells by row head."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag != "meta":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def test_the_page_is_whole_by_itself(planned: PlannedRun) -> None:
    text = render_page(planned)
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert not {"script", "link", "img", "iframe"} & reader.tags
    assert not re.search(r"https?:|//|url\(|@import", text)
    assert "<&>" not in text and "&lt;&amp;&gt;" in text


def test_every_number_is_in_a_table(planned: PlannedRun) -> None:
    reader = Reader()
    reader.feed(render_page(planned))
    by_name = {row[0].strip(): row[1:] for row in reader.rows}
    largest, unit = planned.estimate.phases(), 1e9 if planned.estimate.peak_bytes >= 1e9 else 1e6
    for group, (name, _) in GROUPS.items():
        sums = [point.groups().get(group, 0) for point in largest.values()]
        if any(each >= unit / 2000 for each in sums):
            assert by_name[name] == [f"{each / unit:,.3f}" if each >= unit / 2000 else "" for each in sums]
    assert by_name["allocated"] == [f"{point.total / unit:,.3f}" for point in largest.values()]
    first, second = (row for row in reader.rows if ".yaml" in row[0])
    assert (first[0], second[0]) == ("1 a/plan-01.yaml", "2 b.yaml")
    assert list(zip(first[1:], second[1:], strict=True)) == [tuple(cells) for cells in search_columns(planned).values()]
    moments = [row for row in reader.rows if len(row) == 3 and row[0] != "moment"]
    assert [row[2] for row in moments] == [f"{point.total / unit:,.3f}" for point in planned.estimate.timeline]


def test_settings_that_differ_are_columns(planned: PlannedRun) -> None:
    columns = search_columns(planned)
    figures = {"speed", "device", "to spare", "peak", "parameters", "FLOPs/token", "sent/update"}
    assert columns.keys() - figures == {"micro-batch"} and columns["micro-batch"] == ["1 <&>", "2 <&>"]
    shared = "state bits 8, recompute all but attention, engine zero 3, factors <&>"
    assert shared_settings(planned) == f"In all of these: {shared}."


@dataclass(frozen=True)
class Seen:
    """What a browser makes of a page of some width."""

    scroll_width: int
    cut: list[str]
    background: str
    colour: str
    heights: list[int]
    touching: list[str]


MEASURE = """
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement, style = getComputedStyle(page.body);
  const cut = [...page.querySelectorAll("body *")].filter(each => {
    const box = each.getBoundingClientRect();
    return box.width > 0 && getComputedStyle(each).position !== "absolute" && !each.closest("svg, thead")
      && (box.right > root.clientWidth + 1 || box.left < -1);
  }).map(each => each.tagName + ": " + each.textContent.slice(0, 40));
  const labels = [...page.querySelectorAll(".plot span, .phases span, .legend li")].map(each => {
    const text = page.createRange();
    text.selectNodeContents(each);
    return {name: each.textContent, box: text.getBoundingClientRect()};
  });
  const touching = labels.flatMap((a, index) => labels.slice(index + 1).filter(b =>
    a.box.left < b.box.right + 4 && b.box.left < a.box.right + 4
      && a.box.top < b.box.bottom && b.box.top < a.box.bottom
  ).map(b => a.name + " | " + b.name));
  document.querySelector("pre").textContent = JSON.stringify({
    touching,
    scroll_width: root.scrollWidth, cut, background: style.backgroundColor, colour: style.color,
    heights: [...page.querySelectorAll("section")].map(each => Math.round(each.getBoundingClientRect().height)),
  });
};
"""


def see(text: str, width: int, scheme: str, directory: Path) -> Seen:
    """Shows the page in a frame of that width, which is its viewport, and measures it."""
    if BROWSER is None:
        pytest.skip("no headless browser here; Debian: apt-get install chromium-headless-shell")
    outer = directory / "outer.html"
    frame = f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(text)}"></iframe>'
    outer.write_text(f"<!doctype html><meta charset=utf-8><pre></pre>{frame}<script>{MEASURE}</script>")
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",  # Chromium's own refuses root
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={directory / 'profile'}",
        f"--blink-settings=preferredColorScheme={'0' if scheme == 'dark' else '1'}",
        "--virtual-time-budget=5000",
        "--dump-dom",
        outer.as_uri(),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = re.search(r"<pre>(.*?)</pre>", result.stdout, re.DOTALL)
    assert found and found[1], result.stderr
    return Seen(**json.loads(html.unescape(found[1])))


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (360, "dark"), (1200, "light")])
def test_in_a_browser(planned: PlannedRun, tmp_path: Path, width: int, scheme: str) -> None:
    seen = see(render_page(planned), width, scheme, tmp_path)
    assert seen.scroll_width == width and seen.cut == []
    assert len(seen.heights) == 6 and min(seen.heights) > 30
    dark, light = sorted((luminance(seen.background), luminance(seen.colour)))
    assert (light + 0.05) / (dark + 0.05) > 7  # WCAG's AAA
    assert (luminance(seen.background) < luminance(seen.colour)) == (scheme == "dark")


@pytest.mark.parametrize("width", [320, 360, 414, 600, 720, 900, 1200])
def test_labels_of_the_drawing_do_not_touch(estimated: PlannedRun, tmp_path: Path, width: int) -> None:
    seen = see(render_page(estimated), width, "light", tmp_path)
    assert seen.touching == [] and seen.cut == [] and seen.scroll_width == width


def test_the_browser_sees_what_is_too_wide(planned: PlannedRun, tmp_path: Path) -> None:
    """Negative control."""
    wide = render_page(planned).replace("<main>", '<main><div style="width:500px">wide</div>')
    seen = see(wide, 360, "light", tmp_path)
    assert seen.scroll_width > 360 and any("wide" in each for each in seen.cut)
