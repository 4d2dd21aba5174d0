"""Compare what other libraries read from an exported folder with the model itself; write their own resize's cosine.

    make loaders                 a small student of random weights
    make loaders MODEL=model     the folder that scripts/export.py wrote; its card gets the cosine

transformers.js in Node, OpenVINO, sentence-transformers and transformers are installed under .compat/loaders, apart
from the environment that runs this. A folder whose features differ by more than 1e-5, or whose tokenizer differs on
plain text, fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_sample_images

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]

from PIL import Image  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from caption_strings import KINDS, caption_strings  # noqa: E402
from eval.towers.models import load_model  # noqa: E402
from exporting.card import with_own_resize  # noqa: E402
from exporting.folder import WEIGHTS, write_manifest  # noqa: E402
from longclip_teacher.text import EOT, CaptionTokenizer  # noqa: E402
from mobileclip_student import create_student, save_student  # noqa: E402
from mobileclip_student.model import variant_config  # noqa: E402

HERE, PLACE = Path(__file__).parent, ROOT / ".compat" / "loaders"
PACKAGES, NODE_PACKAGE = ("sentence-transformers>=6", "transformers>=5", "openvino"), "@huggingface/transformers@4"
TOLERANCE = 1e-5
CAPTIONS = ["a red bus", "A dog &amp; its “ball” don’t match!!! " * 60, "", "naïve café, 3.5 (two)"]


def main() -> None:
    """Prepare, run each library, compare."""
    install()
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        folder = Path(sys.argv[1]).resolve() if sys.argv[1:] else small_export(work)
        expected, ours = reference(folder, work)
        run([str(PLACE / "env/bin/python"), str(HERE / "in_python.py"), str(folder), str(work)])
        (PLACE / "in_node.mjs").write_text((HERE / "in_node.mjs").read_text())
        run(["node", str(PLACE / "in_node.mjs"), str(folder), str(work)])
        node, python = (json.loads((work / f"{name}.json").read_text()) for name in ("node", "python"))
        rust = [found.ids for found in tokenizer_of(folder).encode_batch([text for _, text in caption_strings()])]
    print(f"transformers' CLIPModel: {python['clip_model']}")
    faults = [] if python["clip_model"].startswith("refused") else ["CLIPModel.from_pretrained builds a model"]
    for name, found, wanted in (
        ("ONNX Runtime, texts", python["onnxruntime"][0], expected["texts"]),
        ("ONNX Runtime, fixed pixels", python["onnxruntime"][1], expected["pictures"]),
        ("OpenVINO, texts", python["openvino"][0], expected["texts"]),
        ("OpenVINO, fixed pixels", python["openvino"][1], expected["pictures"]),
        ("sentence-transformers, texts", python["texts"], expected["texts"]),
        ("sentence-transformers, pictures", python["pictures"], expected["pictures"]),
        ("transformers.js, texts", node["text_embeds"], expected["texts"]),
        ("transformers.js, fixed pixels", node["image_embeds"], expected["pictures"]),
    ):
        difference = float(np.abs(np.array(found) - wanted).max())
        print(f"{name}: largest difference {difference:.1e}")
        faults += [f"{name} differs"] * (difference > TOLERANCE)
    for name, found, wanted in zip(("texts", "pictures"), python.get("quantized", ()), expected.values(), strict=False):
        cosine = float((np.array(found) * wanted).sum(axis=1).min())
        print(f"sentence-transformers in int8, {name}: least cosine {cosine:.4f}")
    for name, ids in (("tokenizers (Python, Rust)", rust), ("transformers.js", node["ids"])):
        different = different_kinds(ids, ours)
        print(f"{name}: " + ", ".join(f"{kind} {different[kind]} of {count}" for kind, count in KINDS.items()))
        faults += [f"{name} differs on plain text"] * (different["plain"] > 0)
    cosine = float((np.array(node["own_resize"]) * expected["pictures"]).sum(axis=1).min())
    print(f"transformers.js with its own resize: least cosine {cosine:.4f} over {len(node['own_resize'])} pictures")
    if sys.argv[1:]:
        card = folder / "README.md"
        card.write_text(with_own_resize(card.read_text(encoding="utf-8"), cosine), encoding="utf-8")
        write_manifest(folder)
    sys.exit("; ".join(faults) or 0)


def install() -> None:
    """Install the libraries once. torch comes from the environment that runs this, through a .pth file."""
    mark, wanted = PLACE / "installed", " ".join((*PACKAGES, NODE_PACKAGE))
    if mark.is_file() and mark.read_text() == wanted:
        return
    venv.create(PLACE / "env", with_pip=True)
    python = str(PLACE / "env/bin/python")
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()
    Path(site, "shared.pth").write_text(sysconfig.get_path("purelib"))
    run([python, "-m", "pip", "install", "--quiet", *PACKAGES])
    # without scripts: one of them fetches a build for GPUs, and the package brings the one for CPUs
    run(["npm", "install", "--silent", "--prefix", str(PLACE), "--ignore-scripts", NODE_PACKAGE])
    mark.write_text(wanted)


def run(command: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(command, check=True, env=environment)


def small_export(work: Path) -> Path:
    """The folder of a small student of random weights."""
    torch.manual_seed(0)
    config = variant_config("tiny")
    shape = {"image_size": 64, "layers": (1,), "embed_dims": (16,), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    save_student(create_student(replace(config, image=replace(config.image, **shape))).eval(), work / "s.safetensors")
    command = [
        sys.executable,
        str(ROOT / "scripts/export.py"),
        str(work / "s.safetensors"),
        "--out",
        str(work / "model"),
    ]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return work / "model"


@torch.no_grad()
def reference(folder: Path, work: Path) -> tuple[dict[str, np.ndarray], list[list[int]]]:
    """Write the inputs; return the model's features of captions and pictures, and our ids of the 20,000 strings."""
    model = load_model(folder / WEIGHTS)
    photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    boxes = [(0, 0, 640, 427), (0, 0, 300, 427), (200, 100, 640, 300), (100, 50, 400, 350)]
    pictures = [photograph.crop(box) for photograph in photographs for box in boxes]
    names = [f"{number}.png" for number in range(len(pictures))]
    for picture, name in zip(pictures, names, strict=True):
        picture.save(work / name)
    pixels = torch.stack([model.preprocess(picture) for picture in pictures])
    strings = [text for _, text in caption_strings()]
    inputs: dict[str, Any] = {
        "captions": CAPTIONS,
        "strings": strings,
        "pictures": names,
        "pixels": {"shape": list(pixels.shape), "values": pixels.tolist()},
    }
    for name, value in inputs.items():
        (work / f"{name}.json").write_text(json.dumps(value))
    expected = {
        "texts": model.encode_text(model.tokenizer(CAPTIONS), normalize=True).numpy(),
        "pictures": model.encode_image(pixels, normalize=True).numpy(),
    }
    ids = CaptionTokenizer(1000)(strings).tolist()
    return expected, [row[: row.index(EOT) + 1] for row in ids]


def tokenizer_of(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def different_kinds(ids: list[list[int]], ours: list[list[int]]) -> Counter[str]:
    """How many strings of each kind have other ids."""
    rows = zip(caption_strings(), ids, ours, strict=True)
    return Counter(kind for (kind, _), found, wanted in rows if found != wanted)


if __name__ == "__main__":
    main()
