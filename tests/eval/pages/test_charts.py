"""Charts are well formed, repeatable and in the page's colours, and their points are in the right places."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

from eval.pages.charts import line_chart, scatter_chart

COLOURS = {"a": 0, "b": 1, "close": 2}


def test_a_band_is_drawn_about_its_line_alone() -> None:
    lines = {"a": [(60, 50.0), (90, 40.0)], "b": [(60, 30.0), (90, 20.0)]}
    plain = line_chart(lines, COLOURS, "x", x_label="tokens", y_label="R@1 %")
    banded = line_chart(lines, COLOURS, "x", x_label="tokens", y_label="R@1 %", bands={"a": [(45, 55), (35, 45)]})
    ElementTree.fromstring(banded)
    assert "PolyCollection" not in plain and banded.count('PolyCollection_1"') == 1
    band = banded[banded.index('PolyCollection_1"') :][:600]
    assert "var(--line-0)" in band and "opacity" in band
    assert ">tokens<" in banded and ">R@1 %<" in banded
    assert not re.search(r"#0000|: #", banded)


def test_points_of_a_scatter_have_their_names_apart_from_one_another() -> None:
    points = {"a": (5.0, 90.0), "b": (13.0, 40.0), "close": (13.0, 40.2)}
    svg = scatter_chart(points, COLOURS, "x", x_label="ms", y_label="R@1 %")
    ElementTree.fromstring(svg)
    assert svg == scatter_chart(points, COLOURS, "x", x_label="ms", y_label="R@1 %")
    assert all(f"var(--line-{colour})" in svg for colour in COLOURS.values())
    heights = _label_heights(svg)
    assert set(points) <= set(heights)
    assert heights["b"] - heights["close"] > 9  # one line of text, in points; y grows downwards


def test_a_name_is_text_and_no_markup() -> None:
    svg = scatter_chart({"<b>&": (1, 1)}, {"<b>&": 0}, "x", x_label="ms", y_label="%")
    assert "<b>" not in svg and "&lt;b&gt;&amp;" in svg


def test_far_apart_times_have_a_logarithmic_axis() -> None:
    near = scatter_chart({"a": (1, 1), "b": (2, 2)}, COLOURS, "x", x_label="ms", y_label="%")
    far = scatter_chart({"a": (1, 1), "b": (1000, 2)}, COLOURS, "x", x_label="ms", y_label="%")
    assert ">100<" in far and ">10<" in far and ">100<" not in near


def _label_heights(svg: str) -> dict[str, float]:
    found = {}
    for place, text in re.findall(r"<text([^>]*)>([^<]+)</text>", svg):
        if where := re.search(r'translate\([\d.-]+ ([\d.-]+)\)|\by="([\d.-]+)"', place):
            found[text] = float(where[1] or where[2])
    return found
