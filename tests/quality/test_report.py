"""The report of a real run: its structure, what is missing from it, and how a browser shows it."""

from __future__ import annotations

import json
import re
import subprocess
from copy import deepcopy
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sparselora_dist.cli import main
from sparselora_dist.config import RunConfig
from sparselora_dist.quality import report as report_module
from sparselora_dist.quality.curves import Line, line_chart, thin
from sparselora_dist.quality.report import render
from sparselora_dist.quality.subject import find_subject, measure
from support.browser import find_browser, words
from support.harness import ROOT

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
    curves, maps = page.all("svg"), [table for table in page.all("table") if table.get("class") == "heat"]
    assert len(page.all("figure")) == len(page.captions) == len(curves) + len(maps) == 7 and len(curves) == 3
    for caption in page.captions:
        assert re.search(r"Units: \w.*\.$", caption), caption
    for svg in curves:
        assert svg["role"] == "img" and svg["aria-label"] and re.fullmatch(r"0 0 \d+ \d+", svg["viewbox"] or "")
    assert all(table["aria-label"] for table in maps)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids), "a name occurs once in a page"
    # Self-contained: nothing is fetched, nothing runs.
    assert not re.search(r"https?:|//\w", report.replace("<!doctype", ""))
    assert [script["type"] for script in page.all("script")] == ["application/json"]
    assert not any("src" in attributes for _, attributes in page.tags)
    assert not re.search(r"@import|url\((?!#)", report)
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
        share = 100 * figure["mean"]
        cell = rf'<td[^>]* style="--share:{share:.1f}%" title="layer 3, {name}: {share:.1f} %">{share:.0f}</td>'
        assert re.search(cell, report), (name, share)
    assert 'title="layer 0, ffn: dense">dense</td>' in report and 'title="layer 1, ffn: 90.0 %">90</td>' in report


def test_the_curves_are_the_runs(report: str, trained: Path) -> None:
    """As many points as steps and evaluations, the last of the loss below the first, and units on both axes."""
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    svg = re.search(r'aria-label="Loss over steps">(.*?)</svg>', report, re.S)
    assert svg is not None
    colours = {name: re.search(rf'<path d="M ([^"]*)" [^>]*stroke: {name}', svg[1]) for name in ("#0b5fa5", "#b4460e")}
    training, evaluation = (
        [[float(part) for part in point.split()] for point in found[1].replace("L", "").strip().splitlines()]
        for found in colours.values()
        if found
    )
    assert len(training) == 6 and len(evaluation) == sum("eval_loss" in row for row in rows) == 3
    losses = [row["loss"] for row in rows if "loss" in row]
    # Down the picture is less loss: the same order, on one straight scale.
    (_, first), (_, last) = training[0], training[-1]
    for (_, y), loss in zip(training, losses):
        assert (y - first) / (last - first) == pytest.approx((loss - losses[0]) / (losses[-1] - losses[0]), abs=1e-4)
    assert ">nats per token</text>" in svg[1] and ">optimizer step</text>" in svg[1] and ">evaluation</text>" in svg[1]


def test_without_matplotlib(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page is made, and says what would bring the curves."""
    monkeypatch.setattr(report_module, "find_spec", lambda name: None)
    text = render(RunConfig.from_file(trained / "run.json"), trained, None)
    assert "pip install &#39;sparselora-dist[report]&#39;" in text and not Page(text).all("svg")


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


def test_curves_and_thinning() -> None:
    points = thin([(i, 2.0) for i in range(10_000)])
    assert len(points) <= 240 and {y for _, y in points} == {2.0}
    assert thin([(1, float("nan")), (2, 3.0), (3, float("inf"))]) == [(2.0, 3.0)] and thin([]) == []
    drawn = line_chart([Line("<a & b>", [(0, 0.0), (20_000, 12_000.0)])], "step", "unit", zero=True)
    assert drawn == line_chart([Line("<a & b>", [(0, 0.0), (20_000, 12_000.0)])], "step", "unit", zero=True)
    labels = re.findall(r"<text [^>]*>([^<]*)</text>", drawn)
    assert {"0", "10,000", "20,000", "step", "unit"} <= set(labels) and "<metadata>" not in drawn
    both = line_chart([Line("<a & b>", [(0, 1.0)]), Line("c", [])], "step", "unit")
    assert "&lt;a &amp; b&gt;" in both and len(re.findall("<use [^>]*#0b5fa5", both)) == 2, "its dot, and the legend's"
    # The same figure twice has other names for its markers than another figure of the page.
    names = [set(re.findall(r'id="(\w+)"', svg)) for svg in (drawn, both)]
    assert not names[0] & names[1]


def test_the_template_is_packaged() -> None:
    """Every file of the package that is no Python is named in pyproject.toml."""
    tomllib = pytest.importorskip("tomllib")
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    root = ROOT / "sparselora_dist"
    named = {
        path
        for package, patterns in data.items()
        if package.split(".")[0] == "sparselora_dist"
        for pattern in patterns
        for path in root.joinpath(*package.split(".")[1:]).glob(pattern)
    }
    others = {path for path in root.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others == named and root / "quality/templates/report.html.jinja" in named


# --- in a browser -----------------------------------------------------------------------------------------------------

PROBE = """<script>
let errors = 0; addEventListener("error", () => errors++, true);
addEventListener("load", () => {
  const texts = [...document.querySelectorAll("svg text")].map(text => {
    const svg = text.ownerSVGElement;
    return parseFloat(getComputedStyle(text).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  });
  const cells = [...document.querySelectorAll("td, th")].filter(cell => cell.checkVisibility());
  texts.push(...cells.map(cell => parseFloat(getComputedStyle(cell).fontSize)));
  const cut = [...document.querySelectorAll("svg text")].some(text => {
    const [inner, outer] = [text, text.ownerSVGElement].map(node => node.getBoundingClientRect());
    return inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.bottom > outer.bottom + 1;
  }) || cells.some(cell => cell.closest(".heat") && cell.scrollWidth > cell.clientWidth + 1);
  const shades = [...document.querySelectorAll(".heat td")].map(cell => getComputedStyle(cell).backgroundColor);
  const boxes = [...document.querySelectorAll("figure, .card, h1, h2, p")].map(node => node.getBoundingClientRect());
  const clash = [...document.querySelectorAll("svg")].some(svg => {
    const all = [...svg.querySelectorAll("text")].map(text => text.getBoundingClientRect());
    return all.some((a, i) => all.some((b, j) => i < j && a.left < b.right - 1 && b.left < a.right - 1
      && a.top < b.bottom - 3 && b.top < a.bottom - 3));
  });
  parent.postMessage(JSON.stringify({width: innerWidth, scroll: document.documentElement.scrollWidth, errors,
    smallest: Math.min(...texts), right: Math.max(...boxes.map(box => box.right)), clash, cut,
    shades: new Set(shades).size,
    left: Math.min(...boxes.map(box => box.left)), requests: performance.getEntriesByType("resource").length}), "*");
});
</script>"""
# A browser's window has a least width, a frame has none.
FRAME = """<!doctype html><title>-</title><link rel="icon" href="data:,"><body style="margin:0">
<script>addEventListener("message", event => document.title = event.data)</script>
<iframe src="page.html" style="border:0;width:{width}px;height:2400px"></iframe>"""


def large(fidelity: dict[str, Any]) -> dict[str, Any]:
    """As of a model of 80 layers, measured at four ranks: 12 columns."""
    wide = deepcopy(fidelity) | {"ranks": [8, 16, 32, 128], "layers": 80}
    sites = {site["group"]: site for site in wide["sites"]}
    for of in (*sites.values(), *wide["groups"].values()):
        for figure in ("recall", "energy"):
            of[figure] |= dict.fromkeys(("16", "32", "128"), of[figure]["8"])
    return wide | {"sites": [site | {"layer": layer} for layer in range(80) for site in sites.values()]}


@pytest.mark.parametrize("size", ["a run", "80 layers"])
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_it(
    report: str, trained: Path, fidelity: dict[str, Any], tmp_path: Path, width: int, size: str
) -> None:
    """No error in the console, nothing fetched, nothing past the edge, text that can be read and does not overlap."""
    program = find_browser()
    text = report if size == "a run" else render(RunConfig.from_file(trained / "run.json"), trained, large(fidelity))
    (tmp_path / "page.html").write_text(text.replace("<head>", "<head>" + PROBE), encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME.format(width=width), encoding="utf-8")
    command = words(program, tmp_path / "profile", width, 2400)
    page = (tmp_path / "frame.html").as_uri()
    shown = subprocess.run([*command, "--dump-dom", page], capture_output=True, text=True, timeout=120)
    assert ":CONSOLE" not in shown.stderr, shown.stderr
    title = re.search(r"<title>(\{.*?\})</title>", shown.stdout)
    assert title, shown.stdout[:500] + shown.stderr[-2000:]
    seen = json.loads(title[1])
    assert seen["errors"] == 0 and seen["requests"] == 0, seen
    assert seen["width"] == width and seen["scroll"] <= width, seen
    assert seen["left"] >= 0 and seen["right"] <= width, seen
    assert seen["smallest"] >= 10 and not seen["clash"] and not seen["cut"], seen
    assert seen["shades"] >= 4, "cells are shaded"
    picture = tmp_path / "page.png"
    subprocess.run([*command, f"--screenshot={picture}", page], capture_output=True, timeout=120, check=True)
    assert picture.stat().st_size > 20_000
