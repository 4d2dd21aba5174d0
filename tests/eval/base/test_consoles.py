"""What users name is printed as they wrote it: rich takes none of it for markup or emojis."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from rich.table import Table

from eval.base.consoles import plain_console
from eval.zeroshot_imagenet import print_table

ROOT = Path(__file__).parents[3]
NAMES = ["pets[/x]", "[bold]a[/bold]", "[/]", ":smile:", "a[red]b"]


@pytest.mark.parametrize("name", NAMES)
def test_titles_headers_cells_and_lines_are_no_markup(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title=name, caption=name)
    table.add_column(name)
    table.add_row(name)
    console = plain_console()
    console.print(table)
    console.print(name)
    assert capsys.readouterr().out.count(name) == 5
    plain_console(stderr=True, soft_wrap=True).print(name)
    assert capsys.readouterr().err == f"{name}\n"


@pytest.mark.parametrize("name", NAMES)
def test_a_data_sets_name_is_printed_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = {"dataset": name, "num_images": 1, "num_classes": 2, "num_templates": 1, "top1": 1.0, "top5": 1.0}
    result |= {"mean_per_class": 1.0, "confusion": [[name, name, 3]], "num_unreadable": 1, "unreadable": [name]}
    print_table(result | {"count_mismatch": name})
    output = capsys.readouterr()
    assert output.out.count(name) == 4 and output.err == f"warning: {name}\n"


def test_every_console_is_plain_and_every_bar_of_user_text_too() -> None:
    sources = [path for folder in ("eval", "training", "scripts") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 100
    for path in sources:
        text = path.read_text(encoding="utf-8")
        if path.name != "consoles.py":
            assert "rich.console import" not in text and not re.search(r"(?<!plain_)\bConsole\(", text), path
        assert not re.search(r"from rich import print|rich\.print|from_markup|\[/?bold\]", text), path
