"""report.html: complete, self-contained and safe, with the right figures."""

from __future__ import annotations

import base64
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.measures.figures import Column, best_models, figure_columns, format_figure, model_figures
from eval.measures.retrieval_examples import Answer, Example
from eval.pages.charts import line_chart
from eval.pages.report import Report, model_colours, write_report
from longclip_teacher.errors import InputError
from training.record.curves import run_provenance, training_curves

RIGHT = (
    "A navy board in a red frame. top left shows a large red zero on dark. "
    "bottom right shows a small blue two on light."
)
WRONG = RIGHT.replace("small blue two", "large pink six")


class Page(HTMLParser):
    """Collect the elements and the text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[tuple[str, str]] = []  # (innermost open element, text)
        self.open = [""]
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag  # every element is closed in order

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.words.append((self.open[-1], data.strip()))

    def text_of(self, tag: str) -> list[str]:
        return [text for inside, text in self.words if inside == tag]

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Write a run folder with a log: a loss term, one validation, and a half-written last line."""
    folder = tmp_path / "run"
    folder.mkdir()
    rows: list[dict] = [{"step": step, "group": "train", "loss": 9 / step, "lr": 1e-3} for step in (1, 2, 3)]
    rows[1]["loss"] = float("nan")
    rows.append({"step": 3, "group": "val", "i2t_r1": 50.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "gro')
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Write a small board and a picture as large as a photograph."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / "small.png", tmp_path / "large.png"]
    for path, shape in zip(paths, [(48, 40, 3), (600, 900, 3)], strict=True):
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(path)
    return paths


def full_report(run: Path, pictures: list[Path]) -> Report:
    small, large = pictures
    examples = [
        Example(small, [Answer(WRONG, False, 1), Answer(RIGHT, True, 2)]),
        Example("a caption with <b>tags</b> & signs", [Answer(large, True, 1), Answer(small, False, 2)]),
    ]
    return Report(
        title="Title <script>alert(1)</script>",
        paragraphs=["First & foremost.", "Second."],
        columns=figure_columns(["twins"], references={"twins": (25.0, "a ceiling")}),
        models={
            "big": {
                "twins_i2t_r1": 80.04,
                "twins_t2i_r1": 70.0,
                "zeroshot_top1": 5.0,
                "params": 5_000_000,
                "text_ms": 2.0,
            },
            "tiny": {"twins_i2t_r1": 79.98, "twins_t2i_r1": 60.0, "zeroshot_top1": 7.0, "params": 900, "text_ms": None},
        },
        spreads={"tiny": {"twins_t2i_r1": 1.25}},
        sections={"Training": training_curves({"tiny": run}, model_colours(["big", "tiny"]))},
        examples={"What tiny finds": examples},
        provenance={"command": "python x.py --a '<b>'"},
    )


def test_the_page_needs_nothing_from_anywhere(run: Path, pictures: list[Path], tmp_path: Path) -> None:
    write_report(tmp_path / "new" / "report.html", full_report(run, pictures))
    page = Page(tmp_path / "new" / "report.html")
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    assert not re.search(r"url\((?!#)|@import", page.source)
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            assert (attributes.get(name) or "#").startswith(("data:image/", "#"))
    policy = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy and policy[0] and policy[0].startswith("default-src 'none'")
    assert "<b>tags</b>" not in page.source
    assert "Title <script>alert(1)</script>" in page.text_of("h1")
    assert any("a caption with <b>tags</b> & signs" in text for text in page.text_of("blockquote"))
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "report.html"]  # no temporary file is left


def test_the_best_as_shown_is_bold_and_spreads_stand_beside_means(
    run: Path, pictures: list[Path], tmp_path: Path
) -> None:
    write_report(tmp_path / "report.html", full_report(run, pictures))
    page = Page(tmp_path / "report.html")
    # 80.04 and 79.98 both show as 80.0; fewer parameters are better; a single caption time is not a best
    assert page.text_of("b") == ["80.0", "70.0", "80.0", "7.0", "900"]
    assert "± 1.2" in page.source
    assert {"5.00 M", "–"} <= set(page.text_of("td"))


def test_bars_are_as_long_as_the_figures(run: Path, pictures: list[Path], tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", full_report(run, pictures))
    page = Page(tmp_path / "report.html")
    styles = [span.get("style") or "" for span in page.all("span") if span.get("class") == "fill"]
    widths = [float(re.search(r"width: ([\d.]+)%", style)[1]) for style in styles]  # type: ignore[index]
    assert widths == [80.04, 79.98, 70.0, 60.0, 5.0, 7.0]  # only percentages have bars
    references = [span.get("style") for span in page.all("span") if span.get("class") == "reference"]
    assert references == ["left: 25.00%"] * 4


def test_curves_are_drawn_where_there_are_two_points(run: Path, pictures: list[Path], tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", full_report(run, pictures))
    labels = [svg["aria-label"] for svg in Page(tmp_path / "report.html").all("svg")]
    assert labels == [
        "Loss",
        "Learning rate",
    ]  # one validation makes no curve, and a term that the run lacks makes none either


def test_pictures_are_in_the_page(run: Path, pictures: list[Path], tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", full_report(run, pictures))
    uris = [image["src"] or "" for image in Page(tmp_path / "report.html").all("img")]
    shown = [Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) for uri in uris]
    small, large = (Image.open(path) for path in pictures)
    assert len(shown) == 3
    assert np.array_equal(np.asarray(shown[0]), np.asarray(small))  # JPEG does not blur boards of a few pixels
    assert max(shown[1].size) == 224 and shown[1].size[0] / shown[1].size[1] == pytest.approx(
        large.width / large.height, rel=0.02
    )


def test_a_wrong_caption_shows_where_it_differs(run: Path, pictures: list[Path], tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", full_report(run, pictures))
    page = Page(tmp_path / "report.html")
    assert page.text_of("mark") == ["marked", "large pink six"]  # the first is in the legend
    spans = " ".join(page.text_of("span"))
    assert "… bottom right shows a" in spans  # the long common beginning is left out
    assert RIGHT in spans  # the right caption is complete
    assert "the right one has rank 2" in " ".join(page.text_of("span"))


def test_a_title_alone_is_a_page_too(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", Report("Nothing yet", ["No model was tested."]))
    page = Page(tmp_path / "report.html")
    assert not page.all("table") and not page.all("svg") and not page.all("img")
    assert page.text_of("p") == ["No model was tested."]


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    example = Example(tmp_path / "gone.png", [Answer(RIGHT, True, 1)])
    with pytest.raises(InputError, match=r"no picture at .*gone\.png"):
        write_report(tmp_path / "report.html", Report("x", [], examples={"x": [example]}))
    assert not (tmp_path / "report.html").exists()


def test_a_chart_is_well_formed_repeatable_and_free_of_fixed_colours() -> None:
    lines = {"a": [(1, 2.0), (2, 1.0)], "b": [(step, 1 / step) for step in range(1, 40)]}
    svg = line_chart(lines, {"a": 0, "b": 7}, 'Loss "<x>"')
    ElementTree.fromstring(svg)
    assert svg == line_chart(lines, {"a": 0, "b": 7}, 'Loss "<x>"')
    assert "var(--line-0)" in svg and "var(--line-1)" in svg and "var(--ink)" in svg
    assert not re.search(r"#0000|: #", svg)


def test_provenance_of_a_run(tmp_path: Path) -> None:
    assert run_provenance(tmp_path) == {}
    record = {
        "command": ["python", "training/main.py", "--a", "b c"], "commit": "abc", "uncommitted_changes": True,
        "python": "3.11.1", "packages": {"torch": "2.6", "timm": None},
        "machine": "Linux", "cpu_count": 2, "gpu": None, "world_size": 2, "threads": 1,
    }  # fmt: skip
    (tmp_path / "environment.json").write_text(json.dumps(record))
    provenance = run_provenance(tmp_path)
    assert provenance["command"] == "python training/main.py --a 'b c'"
    assert provenance["commit"].startswith("abc with uncommitted changes")
    assert provenance["machine"] == "Linux, 2 CPUs, no GPU"
    assert provenance["software"] == "Python 3.11.1, torch 2.6"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (62.66, "%", "62.7"), (100, "%", "100.0"), (0, "%", "0.0"), (None, "%", "–"), (None, "bytes", "–"),
        (999, "count", "999"), (3_458_173, "count", "3.46 M"), (149_600_000, "count", "150 M"),
        (42_100, "count", "42.1 k"),
        (812, "bytes", "812 B"), (13_895_468, "bytes", "13.9 MB"), (5.1e12, "bytes", "5100 GB"),
        (1.234, "ms", "1.23"), (12.34, "ms", "12.3"), (456.7, "ms", "457"),
    ],
)  # fmt: skip
def test_figures_as_people_read_them(value: float | None, unit: str, text: str) -> None:
    assert format_figure(value, unit) == text  # type: ignore[arg-type]


def test_figures_of_results_have_columns() -> None:
    retrieval = {"i2t": {"r1": 12.0, "r5": 0.0}, "t2i": {"r1": 34.0, "r5": 0.0}}
    figures = model_figures({"urban": retrieval, "zeroshot": {"top1": 5.0, "top5": 6.0}})
    assert figures == {"urban_i2t_r1": 12.0, "urban_t2i_r1": 34.0, "zeroshot_top1": 5.0}
    assert [column.key for column in figure_columns(["urban"], cost=False)] == list(figures)


def test_the_best_needs_a_rival() -> None:
    column = Column("x", "x", "ms", "")
    assert best_models(column, {"a": {"x": 1.0}, "b": {"x": None}, "c": {}}) == set()
    assert best_models(column, {"a": {"x": 1.001}, "b": {"x": 1.0}, "c": {"x": 2.0}}) == {"a", "b"}
