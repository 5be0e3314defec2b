"""The report of a real run: its structure, what is missing from it, and how a browser shows it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sparselora_dist.cli import main
from sparselora_dist.config import RunConfig
from sparselora_dist.quality import html
from sparselora_dist.quality.report import render
from sparselora_dist.quality.subject import find_subject, measure

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_VOID = {"meta", "link", "br", "img", "input", "hr"}


@dataclass
class Page(HTMLParser):
    """What a page is made of; refuses tags that do not nest."""

    text: str
    open: list[str] = field(default_factory=list)
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    data: str = ""

    def __post_init__(self) -> None:
        HTMLParser.__init__(self)
        self.feed(self.text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "figcaption":
            self.captions.append("")

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if "figcaption" in self.open:
            self.captions[-1] += data
        if self.open and self.open[-1] == "script":
            self.data += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="session")
def fidelity(trained: Path) -> dict[str, Any]:
    return measure(find_subject(str(trained), None), rows=16)


@pytest.fixture(scope="session")
def report(trained: Path, fidelity: dict[str, Any]) -> str:
    return render(RunConfig.from_file(trained / "run.json"), trained, fidelity)


def titles(text: str) -> list[str]:
    return re.findall(r"<figure><h3>(.*?)</h3>", text)


def test_the_report_of_a_run(report: str, trained: Path, fidelity: dict[str, Any]) -> None:
    page = Page(report)
    assert titles(report) == [
        "Loss", "Throughput", "Sparse work", "Sparsity", "Recall", "Energy kept", "Mask stability",
    ]  # fmt: skip
    assert len(page.all("figure")) == len(page.captions) == len(page.all("svg")) == 7
    for caption in page.captions:
        assert re.search(r"Units: \w.*\.$", caption), caption
    for svg in page.all("svg"):
        assert svg["role"] == "img" and svg["aria-label"] and re.fullmatch(r"0 0 \d+ \d+", svg["viewbox"] or "")
    # Self-contained: nothing is fetched, nothing runs.
    assert not re.search(r"https?:|//\w", report.replace("<!doctype", ""))
    assert [script["type"] for script in page.all("script")] == ["application/json"]
    assert not any("src" in attributes for _, attributes in page.tags)
    assert not re.search(r"@import|url\(", report)
    assert "@media (max-width:" in report and 'name="viewport"' in report
    kept = json.loads(page.data)
    assert kept["summary"]["steps"] == 6 and kept["fidelity"] == json.loads(json.dumps(fidelity))
    assert len(kept["metrics"]) == 6 + 3
    summary = json.loads((trained / "summary.json").read_text())
    for shown in (
        f"{summary['eval_loss']:.3f}",
        f"{summary['executed_flops_share']:.1%}",
        "sparse_lora.layers.ffn.1-4",
    ):
        assert shown in report
    assert 'class="missing"' not in report
    assert len(report) < 300_000


def test_the_heat_maps_show_the_figures(report: str, fidelity: dict[str, Any]) -> None:
    site = next(site for site in fidelity["sites"] if (site["layer"], site["group"]) == (3, "ffn"))
    for name, figure in (("ffn r8", site["recall"]["8"]), ("ffn ranks", site["between_ranks"])):
        assert f"<title>layer 3, {name}: {100 * figure['mean']:.1f} %</title>" in report
    assert "<title>layer 0, ffn: dense</title>" in report and "<title>layer 1, ffn: 90.0 %</title>" in report


def test_the_command_on_a_run(trained: Path, capsys: Any) -> None:
    """The run's model, data, sparsity and adapter; the report goes into its folder."""
    assert main(["inspect", str(trained), "--rows", "8"]) == 0
    out = capsys.readouterr().out
    assert "with the run's adapter" in out and "recall at rank 8 against the activations with the LoRA branch" in out
    assert "Recall" in titles((trained / "inspect" / "report.html").read_text())
    written = json.loads((trained / "inspect" / "fidelity.json").read_text())
    assert written["adapter"] == str(trained / "adapter") and written["data"].endswith("eval.jsonl")
    adapted = {group: means["adapted_recall"] for group, means in written["groups"].items()}
    assert all(0 < value <= 1 for value in adapted.values()) and set(adapted) == {"ffn", "qk", "vo"}


def test_one_row_has_nothing_to_be_compared_with(trained: Path) -> None:
    fidelity = measure(find_subject(str(trained), None), rows=1)
    assert fidelity["batches"] == 1 and not any(site["between_ranks"] for site in fidelity["sites"])
    assert "stability is left out" in render(RunConfig.from_file(trained / "run.json"), trained, fidelity)


def test_a_long_run_stays_a_small_page(trained: Path, tmp_path: Path) -> None:
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(20_000):
            file.write(json.dumps({"step": step, "eval_loss" if step % 5000 == 0 else "loss": 1.0}) + "\n")
    text = render(RunConfig.from_file(trained / "run.json"), tmp_path, None)
    kept = json.loads(Page(text).data)["metrics"]
    assert len(kept) <= 2010 and sum("eval_loss" in row for row in kept) == 4 and len(text) < 500_000


def test_what_is_missing_is_said(trained: Path, fidelity: dict[str, Any], tmp_path: Path) -> None:
    config = RunConfig.from_file(trained / "run.json")
    text = render(config, tmp_path, None)
    Page(text)
    for sentence in ("summary.json is not there", "metrics.jsonl is not there", "The estimator was not measured"):
        assert sentence in text
    assert not titles(text) and "train.learning_rate" in text
    assert "This is no run" in render(config, None, fidelity)
    # No evaluation; a row cut off by a crash; a loss that is no number.
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 1.5}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 4, "lo')
    (tmp_path / "summary.json").write_text(
        json.dumps({"steps": 3, "eval_loss": None, "train_loss_first": float("nan")})
    )
    text = render(config, tmp_path, None)
    page = Page(text)
    assert "no evaluation rows" in text and "had no evaluation data" in text
    assert [row["loss"] for row in json.loads(page.data)["metrics"]] == [2.0, None, 1.5]
    alone = fidelity | {
        "sites": [site | {"between_steps": None, "between_ranks": None} for site in fidelity["sites"]],
    }
    assert "stability is left out" in render(config, None, alone)


def test_names_are_text(trained: Path, fidelity: dict[str, Any]) -> None:
    """A name with markup in it stays a name, in the page and in its data."""
    data = RunConfig.from_file(trained / "run.json").to_dict()
    data["data"]["train"] = "<script>alert(1)</script>.jsonl"
    text = render(RunConfig.from_dict(data), trained, fidelity | {"data": "</script><script>x"})
    page = Page(text)
    assert len(page.all("script")) == 1 and json.loads(page.data)["fidelity"]["data"] == "</script><script>x"


def test_ticks_and_thinning() -> None:
    assert html.ticks(0.0, 1.0) == [0, 0.2, 0.4, 0.6, 0.8, 1.0] and html.ticks(0, 0)[0] == 0
    for low, high in ((1.137, 6.008), (-3, 7e5), (5, 5), (0.99991, 0.99992)):
        found = html.ticks(low, high)
        assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 8, found
    points = html.thin([(i, 2.0) for i in range(10_000)])
    assert len(points) <= 240 and {y for _, y in points} == {2.0}
    assert [html.number(value) for value in (0, 0.25, 3000, 12_000, 3.4e6)] == ["0", "0.25", "3000", "12k", "3.4M"]
    wide = html.heat_map("wide", ["a"] * 12, ["0"], [[0.5] * 12])
    assert 'viewBox="0 0 744 ' in wide and "min-width:744px" in wide


# --- in a browser -----------------------------------------------------------------------------------------------------

PROBE = """<script>
let errors = 0; addEventListener("error", () => errors++, true);
addEventListener("load", () => {
  const texts = [...document.querySelectorAll("svg text")].map(text => {
    const svg = text.ownerSVGElement;
    return parseFloat(text.getAttribute("font-size")) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  });
  const boxes = [...document.querySelectorAll("figure, .card, h1, h2, p")].map(node => node.getBoundingClientRect());
  const clash = [...document.querySelectorAll("svg")].some(svg => {
    const all = [...svg.querySelectorAll("text")].map(text => text.getBoundingClientRect());
    return all.some((a, i) => all.some((b, j) => i < j && a.left < b.right - 1 && b.left < a.right - 1
      && a.top < b.bottom - 3 && b.top < a.bottom - 3));
  });
  parent.postMessage(JSON.stringify({width: innerWidth, scroll: document.documentElement.scrollWidth, errors,
    smallest: Math.min(...texts), right: Math.max(...boxes.map(box => box.right)), clash,
    left: Math.min(...boxes.map(box => box.left)), requests: performance.getEntriesByType("resource").length}), "*");
});
</script>"""
# A browser's window has a least width, a frame has none.
FRAME = """<!doctype html><title>-</title><link rel="icon" href="data:,"><body style="margin:0">
<script>addEventListener("message", event => document.title = event.data)</script>
<iframe src="page.html" style="border:0;width:{width}px;height:2400px"></iframe>"""


def browser() -> str:
    """A Chromium; ``SPARSELORA_BROWSER`` names one that is not on the path."""
    found = os.environ.get("SPARSELORA_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed, and SPARSELORA_BROWSER names none")
    return found


@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_it(report: str, tmp_path: Path, width: int) -> None:
    """No error in the console, nothing fetched, nothing past the edge, text that can be read and does not overlap."""
    program = browser()
    (tmp_path / "page.html").write_text(report.replace("<head>", "<head>" + PROBE), encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME.format(width=width), encoding="utf-8")
    words = [
        program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},2400",
    ]  # fmt: skip
    words.append("--virtual-time-budget=3000")
    page = (tmp_path / "frame.html").as_uri()
    shown = subprocess.run([*words, "--dump-dom", page], capture_output=True, text=True, timeout=120)
    assert ":CONSOLE" not in shown.stderr, shown.stderr
    title = re.search(r"<title>(\{.*?\})</title>", shown.stdout)
    assert title, shown.stdout[:500] + shown.stderr[-2000:]
    seen = json.loads(title[1])
    assert seen["errors"] == 0 and seen["requests"] == 0, seen
    assert seen["width"] == width and seen["scroll"] <= width, seen
    assert seen["left"] >= 0 and seen["right"] <= width, seen
    assert seen["smallest"] >= 10 and not seen["clash"], seen
    picture = tmp_path / "page.png"
    subprocess.run([*words, f"--screenshot={picture}", page], capture_output=True, timeout=120, check=True)
    assert picture.stat().st_size > 20_000
