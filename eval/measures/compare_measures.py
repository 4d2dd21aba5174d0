"""The measurements of eval/compare.py, stored as one JSON file per model and set, so that a stopped run can continue.

Shapes: N pictures, M captions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.benchmarks.protocols import RetrievalSet
from eval.measures.recall import retrieval_ranks
from eval.measures.retrieval_examples import Answer, Example, worst_examples
from eval.measures.retrieval_set import EncodedSet, retrieval_figures
from eval.towers.models import ClipModel
from longclip_teacher.atomic_files import write_json

__all__ = ["Kept", "examples_of", "measure_retrieval", "model_digest"]


@dataclass(frozen=True)
class Kept:
    """Results in a folder, each stored with the inputs from which it was made. Other inputs make it again."""

    folder: Path

    def get(self, name: str, inputs: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the result of this name if it was made from the same inputs. Otherwise store and return `make()`."""
        path = self.folder / f"{name}.json"
        found = _read(path)
        if found is not None and found.get("inputs") == inputs and isinstance(found.get("result"), dict):
            return found["result"]
        result = make()
        write_json(path, {"inputs": dict(inputs), "result": result})
        return result


def measure_retrieval(
    model: ClipModel, retrieval_set: RetrievalSet, encoded: EncodedSet, *, num_failures: int
) -> dict[str, Any]:
    """Return the figures of eval/retrieval.py's JSON and the data for intervals and charts, ready for JSON.

    `ranks` has the rank of each picture's best caption (i2t) and of each caption's picture (t2i); `caption_image` [M]
    says which picture a caption belongs to, `num_tokens` [M] how long it is, `failures` the worst queries.
    """
    ranks = retrieval_ranks(encoded.image_features, encoded.text_features, encoded.caption_image)
    return {
        "figures": retrieval_figures(model, retrieval_set, encoded),
        "ranks": {"i2t": ranks.i2t.ranks.tolist(), "t2i": ranks.t2i.ranks.tolist()},
        "caption_image": encoded.caption_image.tolist(),
        "num_tokens": [model.tokenizer.count_tokens(caption) for caption in encoded.captions],
        "failures": [_plain(example) for example in worst_examples(encoded, ranks, num_examples=num_failures)],
    }


def examples_of(measured: Mapping[str, Any]) -> list[Example]:
    """Return the failures of `measure_retrieval` after a round trip through JSON."""
    return [
        Example(
            _content(example["query"]),
            [Answer(_content(answer["content"]), answer["is_right"], answer["rank"]) for answer in example["answers"]],
        )
        for example in measured["failures"]
    ]


def model_digest(model: ClipModel) -> str:
    """Return the sha256 of the weights and of all else that decides the features: the configuration (context length,
    pad mask, activation, picture size ...) and the preprocessing."""
    config = getattr(model, "config", None)  # open_clip's models have none
    digest = hashlib.sha256(f"{type(model).__name__} {model.context_length} {config} {model.preprocess}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _plain(example: Example) -> dict[str, Any]:
    answers = [
        {"content": _tagged(answer.content), "is_right": answer.is_right, "rank": answer.rank}
        for answer in example.answers
    ]
    return {"query": _tagged(example.query), "answers": answers}


def _tagged(content: Path | str) -> dict[str, str]:
    return {"picture": str(content)} if isinstance(content, Path) else {"caption": content}


def _content(tagged: Mapping[str, str]) -> Path | str:
    return Path(tagged["picture"]) if "picture" in tagged else tagged["caption"]


def _read(path: Path) -> dict[str, Any] | None:
    """Return a stored file's content, or None if it is missing, or damaged and must be made again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
