"""The photo search's page without a browser: its server, its build, its rules. `make test-web` runs the other tests."""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import photo_demo
from longclip_teacher.errors import InputError
from photo_models import write_model, write_pictures
from photo_search.errors import InputError as SearchError
from photo_search.web import build
from photo_search.web.build import WEB
from photo_search.web.serve import page_server

MOST_LINES = 400  # as tests/test_house.py has it for Python
POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'none'"
)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Page, model and pictures."""
    root = tmp_path_factory.mktemp("demo")
    (root / "page").mkdir()
    (root / "page/index.html").write_text((WEB / "index.html").read_text(encoding="utf-8"), encoding="utf-8")
    (root / "page/app.js").write_text("1")
    (root / "secret.txt").write_text("secret")
    return root / "page", write_model(root / "model"), write_pictures(root / "photos", 4)


@pytest.fixture(scope="module")
def port(places: tuple[Path, Path, Path]) -> Iterator[int]:
    server = page_server(*places)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def get(port: int, address: str, host: str = "") -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", address, headers={"Host": host or f"127.0.0.1:{port}"})
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read()


def test_the_server_names_model_and_pictures(port: int, places: tuple[Path, Path, Path]) -> None:
    _, model, photos = places
    start = json.loads(get(port, "/start.json")[2])
    assert start["model"]["name"] == "model" and len(start["model"]["fingerprint"]) == 64
    assert [one["name"] for one in start["pictures"]["files"]] == ["blue2.png", "green1.png", "red0.png", "red3.png"]
    first = start["pictures"]["files"][0]
    assert get(port, f"/{first['address']}")[2] == (photos / "blue2.png").read_bytes()
    assert first["size"] == (photos / "blue2.png").stat().st_size
    assert get(port, "/model/onnx/text_model.onnx")[2] == (model / "onnx/text_model.onnx").read_bytes()


def test_every_answer_has_the_policy(port: int) -> None:
    for address in ("/", "/app.js", "/start.json", "/pictures/0", "/nothing"):
        headers = get(port, address)[1]
        assert headers["Content-Security-Policy"] == f"{POLICY}; frame-ancestors 'none'"
        assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert headers["X-Content-Type-Options"] == "nosniff"
    assert get(port, "/app.js")[1]["Content-Type"] == "text/javascript"


def test_the_server_gives_nothing_else(port: int) -> None:
    for address in ("/secret.txt", "/../secret.txt", "/%2e%2e/secret.txt", "/pictures/4", "/pictures/", "//etc/passwd"):
        assert get(port, address)[::2] == (404, b"")
    assert get(port, "/start.json", host="photos.example:80")[::2] == (403, b"")
    assert get(port, "/start.json", host=f"localhost:{port}")[0] == 200


def test_a_taken_port_is_no_error(port: int, places: tuple[Path, Path, Path]) -> None:
    with page_server(*places) as second:
        assert second.server_port != port and second.server_address[0] == "127.0.0.1"


def test_the_page_allows_no_other_host() -> None:
    page = (WEB / "index.html").read_text(encoding="utf-8")
    assert f'content="{POLICY}"' in page
    sources = [WEB / "index.html", *(path for path in (WEB / "src").rglob("*") if path.is_file())]
    found = {host for path in sources for host in re.findall(r"https?://[\w.]+", path.read_text(encoding="utf-8"))}
    assert found == {"http://ns.adobe.com"}  # the name that XMP has in a JPEG


def test_the_sources_are_short() -> None:
    sources = [path for path in (WEB / "src").rglob("*") if path.is_file()]
    assert len(sources) > 15
    assert [path for path in sources if len(path.read_text(encoding="utf-8").splitlines()) > MOST_LINES] == []


def test_packages_are_exact_and_name_no_registry() -> None:
    package = json.loads((WEB / "package.json").read_text())
    lock = json.loads((WEB / "package-lock.json").read_text())
    asked = package["dependencies"] | package["devDependencies"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in asked.values())
    assert {name: lock["packages"][f"node_modules/{name}"]["version"] for name in asked} == asked
    for name, one in lock["packages"].items():
        assert "resolved" not in one and (not name or one["integrity"].startswith("sha512-"))


def test_rules_are_those_of_python(tmp_path: Path) -> None:
    if not (WEB / "node_modules/vite").is_dir():
        pytest.skip("the page's packages are not installed: make test-web installs them, and runs this as well")
    from browser.rules import differences

    assert differences(tmp_path) == []


def test_what_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=r"^no runs/quickstart/distilled/best\.safetensors: run `make quickstart` first$"
    ):
        photo_demo.Options().check()
    weights = tmp_path / photo_demo.RUN / "best.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    with pytest.raises(InputError, match=r"^--pictures nowhere: no such folder$"):
        photo_demo.Options(pictures=Path("nowhere")).check()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SearchError, match=r"^node and npm are not installed: the page needs Node.js 20\.19 or later$"):
        build.built_page()


def test_a_failing_npm_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, prints in (("node", "echo v22.1.0"), ("npm", "echo first; echo 'no network' >&2; exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{prints}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "package-lock.json").touch()
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(build, "WEB", tmp_path)
    with pytest.raises(SearchError, match=r"^npm ci --ignore-scripts --no-audit --no-fund failed: no network$"):
        build.install()
    (tmp_path / "node").write_text("#!/bin/sh\necho v20.18.3\n")
    with pytest.raises(SearchError, match=r"^node is v20\.18\.3: the page needs Node.js 20\.19 or later$"):
        build.install()
