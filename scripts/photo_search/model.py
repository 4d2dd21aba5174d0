"""An exported model: pictures and texts to features of unit norm, by ONNX Runtime.

Shapes: B pictures or texts, R side of the model's picture, L tokens, D features.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from photo_search.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["BATCH", "Model", "num_cores"]

BATCH = 32
"""The most pictures or texts that are encoded at a time."""
_MANIFEST, _SETTINGS, _TOKENIZER = "sha256.json", "preprocessor_config.json", "tokenizer.json"
_NAMED_GRAPH = re.compile(r"(?:vision|text)_model(\w*)\.onnx")


class Model:
    """A folder that scripts/export.py wrote. Each tower is loaded when it is first used.

    The path of one of its graphs, such as onnx/vision_model_quantized.onnx, stands for the folder with both graphs of
    that kind. Raises InputError, naming the file, if the folder or something in it is not what the export wrote.
    """

    def __init__(self, path: Path) -> None:
        named = _NAMED_GRAPH.fullmatch(path.name)
        self.path, self.folder, kind = (path, path.parent.parent, named[1]) if named else (path, path, "")
        self._image_graph, self._text_graph = f"onnx/vision_model{kind}.onnx", f"onnx/text_model{kind}.onnx"
        self._files = (_SETTINGS, _TOKENIZER, self._image_graph, self._text_graph)
        self.hashes = self._read_json(_MANIFEST)
        missing = [name for name in self._files if name not in self.hashes]
        if missing:
            raise InputError(f"{self.folder / _MANIFEST} does not name {missing[0]}: export the model again")

    @property
    def fingerprint(self) -> str:
        """It differs between models that give other features."""
        told = [str(self.hashes[name]) for name in self._files]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()

    def check_files(self) -> None:
        """Raise InputError if a file that is used is not the one that was exported, or is one of an unknown kind."""
        for name in self._files:
            try:
                found = file_sha256(self.folder / name).hex()
            except OSError as error:
                raise self._damaged(name, error) from None
            if found != self.hashes[name]:
                raise InputError(f"{self.folder / name} is not the file that was exported: export the model again")
        _ = self._settings

    def pixels(self, path: Path) -> np.ndarray:
        """A picture's file, resized and cropped as in training, as uint8 [R, R, 3]. Raises InputError naming it."""
        from PIL import Image

        from photo_search.images import MAX_IMAGE_PIXELS, open_image

        image = open_image(path)
        side, (width, height) = self._side, image.size
        scaled = [int(side * length / min(width, height)) for length in (width, height)]
        if scaled[0] * scaled[1] > MAX_IMAGE_PIXELS:  # as large as it would be between resizing and cropping
            raise InputError(f"{path}: {width} x {height} pixels are too narrow")
        image = image.resize((scaled[0], scaled[1]), Image.Resampling(self._settings["resample"]))
        left, top = (round((length - side) / 2) for length in scaled)
        return np.asarray(image.crop((left, top, left + side, top + side)))

    def encode_images(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """At most BATCH pictures, uint8 [R, R, 3] each, to float32 [B, D]."""
        return self._run(self._image_session, self.normalised(pixels))

    def normalised(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Pictures, uint8 [R, R, 3] each, as the image tower takes them: float32 [B, 3, R, R]."""
        values = np.stack(pixels).transpose(0, 3, 1, 2).astype(np.float32)
        values *= np.float32(self._settings["rescale_factor"])
        if self._settings["do_normalize"]:
            mean, std = (np.float32(self._settings[name])[:, None, None] for name in ("image_mean", "image_std"))
            values = (values - mean) / std
        return np.ascontiguousarray(values)

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts to float32 [B, D]. What stands after the last token that the model reads is left out."""
        parts = []
        for start in range(0, len(texts), BATCH):
            read = self.tokenizer.encode_batch([_whole(text) for text in texts[start : start + BATCH]])
            parts.append(self._run(self._text_session, np.array([found.ids for found in read], np.int64)))
        return np.concatenate(parts)

    def num_tokens(self, text: str) -> tuple[int, int]:
        """How many tokens a text has, and how many the model reads of it."""
        found = self.tokenizer.encode(_whole(text))
        # each part stands between a start and an end, and is padded
        parts = [sum(part.attention_mask) - 2 for part in (found, *found.overflowing)]
        return sum(parts) + 2, parts[0] + 2

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """It cuts texts at the model's length and pads them to the longest."""
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(str(self.folder / _TOKENIZER))
        except Exception as error:  # the library raises plain Exceptions
            raise self._damaged(_TOKENIZER, error) from None

    @cached_property
    def _settings(self) -> dict[str, Any]:
        settings = self._read_json(_SETTINGS)
        try:
            side = settings["size"]["shortest_edge"]
            if settings["crop_size"] != {"height": side, "width": side} or settings["resample"] not in (2, 3):
                raise ValueError("another way of resizing")
            settings["do_normalize"], settings["image_mean"], settings["image_std"], settings["rescale_factor"]
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(_SETTINGS, error) from None
        return settings

    @property
    def _side(self) -> int:
        return int(self._settings["size"]["shortest_edge"])

    @cached_property
    def _image_session(self) -> Any:
        return self._session(self._image_graph, num_cores())

    @cached_property
    def _text_session(self) -> Any:
        return self._session(self._text_graph, 1)

    def _session(self, name: str, threads: int) -> Any:
        import onnxruntime

        onnxruntime.set_default_logger_severity(3)  # its remarks on missing devices are no concern of the user
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the cores also decode pictures
        try:
            return onnxruntime.InferenceSession(str(self.folder / name), options, ["CPUExecutionProvider"])
        except Exception as error:  # each cause has a class of its own
            raise self._damaged(name, error) from None

    def _run(self, session: Any, batch: np.ndarray) -> np.ndarray:
        try:
            (given,) = session.get_inputs()
            features = np.asarray(session.run(None, {given.name: batch})[0], np.float32)
        except Exception as error:  # each cause has a class of its own
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(f"{self.folder} cannot be run ({reason}): export the model again") from None
        if not np.abs(np.linalg.norm(features, axis=1) - 1).max() < 1e-3:
            raise InputError(f"{self.folder} gives features that are not of unit norm: export the model again")
        return features

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._damaged(name, error) from None
        if not isinstance(content, dict):
            raise self._damaged(name, ValueError("no JSON object"))
        return content

    def _damaged(self, name: str, error: Exception) -> InputError:
        if not (self.folder / name).is_file():
            return InputError(f"no {name} in {self.folder}: --model takes a folder that scripts/export.py wrote")
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return InputError(f"{self.folder / name} cannot be read ({reason}): export the model again")


def file_sha256(path: Path) -> bytes:
    """The sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _whole(text: str) -> str:
    """Text without the halves of characters that a terminal of another encoding gives."""
    return text.encode("utf-8", "replace").decode()
