"""The pictures that were found as one HTML file: no scripts, and nothing from outside it is loaded."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from photo_search.atomic import replaced
from photo_search.errors import InputError, shown
from photo_search.images import open_image
from photo_search.searching import Hit, Query

__all__ = ["write_contact_sheet"]

_SIDE = 480  # pixels of the longer side of a picture
_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; --pale: rgb(128 128 128 / 15%); }
body { margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
header p { max-width: 50rem; white-space: pre-line; }
ol { display: grid; gap: 2rem; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); padding: 0; }
li { list-style: none; }
img, .gone { background: var(--pale); display: block; height: 15rem; object-fit: contain; width: 100%; }
.gone { align-content: center; text-align: center; }
h2 { font-size: 1rem; margin: .5rem 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: .875rem; width: 100%; }
td { border-top: 2px solid var(--pale); padding: .25rem 0; vertical-align: top; }
td:first-child { font-variant-numeric: tabular-nums; padding-right: .75rem; white-space: nowrap; }
.far { opacity: .65; }
"""
_BESIDE = "Beside each sentence: where the picture stands among all pictures for that sentence alone."
_FAR = 0.25  # a sentence for which a quarter of all pictures fit better is shown pale


def write_contact_sheet(path: Path, folder: Path, query: Query, hits: Sequence[Hit], num_pictures: int) -> None:
    """Write the page. `folder` is the one that was indexed; a picture that is gone from it is said to be."""
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    asked = [escape(query.text or "")] if query.text else []
    asked += [f"Like the picture {escape(shown(str(query.image)))}"] if query.image else []
    asked += [f"Not: {escape(query.minus)}"] if query.minus else []
    page = f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'sha256-{digest}'">
<meta name="referrer" content="no-referrer">
<title>Photo search</title>
<style>{_STYLE}</style>
<header><h1>Photo search</h1>{"".join(f"<p>{line}</p>" for line in asked)}
<p>The best {len(hits)} of {num_pictures} pictures. {_BESIDE if any(hit.sentences for hit in hits) else ""}</p></header>
<ol>
{"".join(_hit(folder, number, hit, num_pictures) for number, hit in enumerate(hits, start=1))}</ol>
</html>
"""
    with replaced(path) as file:
        file.write(page.encode("utf-8", "backslashreplace"))


def _hit(folder: Path, number: int, hit: Hit, num_pictures: int) -> str:
    place = folder / hit.name
    rows = "".join(
        f"<tr{' class=far' if one.rank > _FAR * num_pictures else ''}><td>{one.rank} of {num_pictures}</td>"
        f"<td>{escape(one.text)}</td></tr>\n"
        for one in hit.sentences
    )
    table = f"<table>{rows}</table>" if rows else ""
    name = f'<a href="{escape(place.as_uri())}">{escape(shown(hit.name))}</a>'
    return f"<li>{_thumbnail(place)}<h2>{number}. {name} ({hit.score:.3f})</h2>{table}</li>\n"


def _thumbnail(path: Path) -> str:
    try:
        image = open_image(path)
    except InputError:
        return '<div class="gone">cannot be read any more</div>'
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
