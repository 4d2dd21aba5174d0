"""This model in sentence-transformers: SentenceTransformer(FOLDER, trust_remote_code=True), texts and pictures.

The features are those of the ONNX files beside this one, computed by ONNX Runtime on the CPU: of the float32 graphs
or, with model_kwargs={"kind": "quantized"} or "fp16", of those.

Shapes: B texts or pictures, R image side, L tokens, D embedding.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from PIL import Image, ImageOps
from sentence_transformers.base.modules import InputModule
from tokenizers import Tokenizer

_SETTINGS = ("tokenizer.json", "preprocessor_config.json")
_GRAPHS = {"input_ids": "onnx/text_model", "pixel_values": "onnx/vision_model"}


class CompactLongCLIP(InputModule):
    """Texts or pictures to features of unit norm."""

    def __init__(self, files: dict[str, str]) -> None:
        super().__init__()
        self.files = files
        self.tokenizer = Tokenizer.from_file(files["tokenizer.json"])
        self.settings = json.loads(Path(files["preprocessor_config.json"]).read_text(encoding="utf-8"))
        self.sessions = {}
        for given, graph in _GRAPHS.items():
            (path,) = (path for name, path in files.items() if name.startswith(graph))
            self.sessions[given] = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    @classmethod
    def load(cls, model_name_or_path: str, **options: Any) -> CompactLongCLIP:
        """The module of a folder or of a hub name."""
        names = ("token", "cache_folder", "revision", "local_files_only")
        hub = {name: options[name] for name in names if name in options}
        kind = (options.get("model_kwargs") or {}).get("kind")
        graphs = [f"{graph}_{kind}.onnx" if kind else f"{graph}.onnx" for graph in _GRAPHS.values()]
        return cls({name: str(cls.load_file_path(model_name_or_path, name, **hub)) for name in (*_SETTINGS, *graphs)})

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Copy the files that the module reads."""
        for name, source in self.files.items():
            target = Path(output_path, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    @property
    def modalities(self) -> list[str]:
        return ["text", "image"]

    def get_embedding_dimension(self) -> int:
        """D"""
        return int(self.sessions["input_ids"].get_outputs()[0].shape[-1])

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **_: Any) -> dict[str, torch.Tensor]:
        """Token ids [B, L] of texts, or pixels [B, 3, R, R] of pictures (PIL or paths of `Path`)."""
        is_text = [isinstance(value, str) for value in inputs]
        if all(is_text):
            found = self.tokenizer.encode_batch([(prompt or "") + text for text in inputs])
            return {"input_ids": torch.tensor([one.ids for one in found])}
        if any(is_text):
            raise ValueError("texts and pictures in one call: encode them apart")
        return {"pixel_values": torch.stack([self.pixels(value) for value in inputs])}

    def pixels(self, picture: Image.Image | Path) -> torch.Tensor:
        """A picture [3, R, R] as in training: upright, resized by its shorter side, cut to its centre, normalised."""
        opened = picture if isinstance(picture, Image.Image) else Image.open(picture)
        shown = ImageOps.exif_transpose(opened).convert("RGB")
        side = self.settings["size"]["shortest_edge"]
        width, height = shown.size
        shorter = min(width, height)
        size = (int(side * width / shorter), int(side * height / shorter))
        shown = shown.resize(size, self.settings["resample"])
        left, top = (round((length - side) / 2) for length in size)
        values = np.asarray(shown.crop((left, top, left + side, top + side)), dtype=np.float32) / 255
        values = (values - np.float32(self.settings["image_mean"])) / np.float32(self.settings["image_std"])
        return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Add `sentence_embedding` [B, D], float32, of unit norm."""
        for name, session in self.sessions.items():
            if name in features:
                given = features[name]
                found = session.run(None, {name: given.cpu().numpy()})[0]
                features["sentence_embedding"] = torch.from_numpy(found).to(given.device)
        return features
