"""The photo search's page in headless Chromium, against scripts/search_photos.py on the same files: `make test-web`.

It must find the same ten pictures with the same scores, but where scores differ by less than 1e-3; notice what changed
in a folder; work when its server is gone; ask no other host; and leave no error in the console.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]

from PIL import Image  # noqa: E402

from browser.material import WORDS, write_model, write_other_formats, write_pictures  # noqa: E402
from browser.rules import differences  # noqa: E402
from photo_search.errors import InputError, run  # noqa: E402
from photo_search.web.build import WEB, built_page  # noqa: E402
from photo_search.web.serve import page_server  # noqa: E402

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TOLERANCE = 1e-3
TOP = 10
MOST_FAULTS = 20  # that are printed
PICTURES = 200
FILLER = "we stood there for a while and looked at it all without a word between us " * 5
LONG = [f"{FILLER} and there was a {word}" for word in ("river", "window")]
QUERIES = [
    *("A {} and a {}. Then the {}! Is it {}? Nobody knows.".format(*WORDS[at : at + 4]) for at in (0, 4, 8, 12, 16)),
    "red", "A dog at night.\nSnow", "the sky, the sand; a bird",
]  # fmt: skip
Answers = list[list[dict[str, Any]]]


def main() -> None:
    """Prepare, run, compare."""
    chromium = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    if chromium is None:
        raise InputError("Chromium is not installed: the browser tests need it (Debian: apt-get install chromium)")
    built = built_page()
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        (work / "rules").mkdir()
        faults = differences(work / "rules")
        print(f"rules of the page against Python's: {'; '.join(faults) or 'equal'}")
        task = prepare(work, chromium)
        found = browse(work, task, page_server(built, work / "model", work / "all/beside"))
        faults += found["faults"] + compare(found, work)
    for fault in faults[:MOST_FAULTS]:
        print(f"FAILED: {fault}")
    if len(faults) > MOST_FAULTS:
        print(f"FAILED: {len(faults) - MOST_FAULTS} more")
    sys.exit(1 if faults else 0)


def prepare(work: Path, chromium: str) -> dict[str, Any]:
    """Write models and pictures, index them in Python; return what the browser is told."""
    write_model(work / "model", seed=0)
    write_model(work / "other", seed=1, resample=2)
    shutil.copytree(work / "model", work / "damaged")
    with (work / "damaged/tokenizer.json").open("a") as file:
        file.write(" ")
    photos = write_pictures(work / "all/photos", PICTURES, seed=3)
    write_other_formats(photos, seed=4)
    write_pictures(work / "all/beside", 6, seed=5)
    index(work, "first", "model")
    return {
        "chromium": chromium,
        "photos": str(photos),
        "queries": QUERIES,
        "long": LONG,
        "tooLong": "red " * 300,
        "damaged": str(work / "damaged"),
        "otherModel": str(work / "other"),
        "files": [str(photos / "001.jpg"), str(photos / "few.gif")],
    }


def browse(work: Path, task: dict[str, Any], server: ThreadingHTTPServer) -> dict[str, Any]:
    """Run Chromium, and do what it asks for."""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (work / "task.json").write_text(json.dumps(task | {"address": f"http://127.0.0.1:{server.server_port}/"}))
    script = Path(__file__).with_name("in_chromium.mjs")
    pipe = subprocess.PIPE
    with subprocess.Popen(["node", str(script), str(WEB), str(work)], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin and process.stdout
        for line in process.stdout:
            if line == "change the pictures\n":
                change(work / "all/photos")
                index(work, "changed", "model")
            elif line == "stop the server\n":
                server.shutdown()
                server.server_close()
            elif line == "index with the other model\n":
                shutil.rmtree(work / "all/beside")  # the page does not reach it any more
                index(work, "other model", "other")
            print("done", file=process.stdin, flush=True)
    if process.returncode:
        sys.exit("FAILED: the browser's script ended early")
    return json.loads((work / "found.json").read_text())


def change(photos: Path) -> None:
    """Rename a picture, delete one, replace one."""
    (photos / "007.jpg").rename(photos / "renamed.jpg")
    (photos / "008.jpg").unlink()
    Image.new("RGB", (90, 60), "orange").save(photos / "009.jpg")


def index(work: Path, name: str, model: str) -> None:
    call("index", work / "all", "--model", work / model, "--index", work / name)


def compare(found: dict[str, Any], work: Path) -> list[str]:
    """What is not as it must be."""
    faults, messages = [], found["messages"]
    for name, indexed in (
        ("first", "first"), ("changed", "changed"), ("offline", "changed"), ("damaged", "changed"),
        ("other model", "other model"),
    ):  # fmt: skip
        faults += compare_answers(name, found["answers"][name], QUERIES, work / indexed)
    faults += compare_answers("long", found["long"], LONG, work / "first")
    if found["long"][0][0]["name"] == found["long"][1][0]["name"]:
        faults.append("a detail after token 77 does not change the winner")
    beside, photos = 6, PICTURES + 6
    for name, wanted in {
        "start": f"{beside} pictures to search",
        "first": f"{photos} pictures read, 0 known by their contents, 0 unchanged.",
        "length": "The text has 302 tokens; the model reads the first 248.",
        "again": f"0 pictures read, 0 known by their contents, {photos + 1} unchanged.",
        "changed": f"1 picture read, 1 known by their contents, {photos - 2} unchanged, 2 removed.",
        "offline": f"{photos + beside - 1} pictures to search",
        "damaged": "damaged/tokenizer.json is not the file that was exported: "
        "export the model again with scripts/export.py",
        "other model": "The model is ready. Choose the pictures to search: those of another model are not kept.",
        "emptied": "None yet.",
        "embedded again": f"{photos - 1} pictures read, 0 known by their contents, 0 unchanged.",
        "files": "0 pictures read, 2 known by their contents, 0 unchanged.",
        "second": f"{photos + 1} pictures to search",
        "other tab": "another tab has changed or deleted the model: load this page again",
        "forgotten": "None yet. scripts/export.py writes one.; None yet.; 0",
    }.items():  # fmt: skip
        if messages[name] != wanted:
            faults.append(f"{name}: the page says {messages[name]!r}, not {wanted!r}")
    if found["problems"] != ["photos/broken.jpg: damaged, or in a format that this browser does not read"]:
        faults.append(f"problems: {found['problems']}")
    if found["width"] > 390 or not found["isolated"]:
        faults.append(f"the page is {found['width']} pixels wide on a screen of 390; isolated: {found['isolated']}")
    return faults


def compare_answers(name: str, answers: Answers, queries: list[str], indexed: Path) -> list[str]:
    """The page's ten against all that Python finds, query by query."""
    faults, largest, swapped = [], 0.0, 0
    for query, hits in zip(queries, answers, strict=True):
        expected = json.loads(call("search", query, "--index", indexed, "--top", 1000, "--json"))
        by_name = {hit["name"]: hit for hit in expected}
        if len(hits) != TOP or not all(hit["isShown"] for hit in hits):
            faults.append(f"{name}: {len(hits)} hits, {sum(hit['isShown'] for hit in hits)} of them with a picture")
        for hit, wanted in zip(hits, expected, strict=False):
            ours = by_name.get(hit["name"])
            if ours is None:
                faults.append(f"{name}: {hit['name']} is found, and is not in the index of Python")
                continue
            swapped += hit["name"] != wanted["name"]
            largest = max(largest, abs(hit["score"] - ours["score"]))
            if abs(ours["score"] - wanted["score"]) >= TOLERANCE or abs(hit["score"] - ours["score"]) >= TOLERANCE:
                faults.append(f"{name}: {query!r:.60}: {hit['name']} ({hit['score']:.4f}), not {wanted['name']}")
            faults += compare_sentences(name, hit["sentences"], ours["sentences"])
    told = f"largest difference of a score {largest:.1e}, {swapped} hits in another order"
    print(f"{name}: {len(queries)} queries, {told}")
    return faults


def compare_sentences(name: str, found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> list[str]:
    """Texts are equal, scores to the three digits shown, ranks but for a few ties of nearly equal scores."""
    if [one["text"] for one in found] != [one["text"] for one in wanted]:
        return [f"{name}: sentences {found}, not {wanted}"]
    return [
        f"{name}: {one['text']}: {one}, not {other}"
        for one, other in zip(found, wanted, strict=True)
        if abs(one["score"] - other["score"]) >= TOLERANCE or abs(one["rank"] - other["rank"]) > 2
    ]


def call(*arguments: object) -> str:
    """Run scripts/search_photos.py."""
    command = [sys.executable, str(ROOT / "scripts/search_photos.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


if __name__ == "__main__":
    run(main)
