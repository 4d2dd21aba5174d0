"""The model card: README.md of an exported model, made from what its run recorded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks.protocols import RetrievalSet
from eval.towers.models import describe_model
from exporting.folder import WEIGHTS
from exporting.sources import Exported
from longclip_teacher.ancestry import Ancestry, describe_terms, is_research_only
from training.record.run_log import read_metrics
from training.settings.tree import TrainConfig

__all__ = ["model_card", "with_own_resize"]

_NOT_MEASURED = "transformers.js resizes in its own way: how far that is off was not measured."
_OWN_RESIZE = r"transformers\.js resizes in its own way: [^\n]*"
_ROLES = {"weights": "its weights began with these", "teacher": "its teacher's weights began with these"}
_APPLE_NOTICE = (  # which the licence asks for
    "Apple Machine Learning Research Model is licensed under the Apple Machine Learning Research Model License "
    "Agreement; give a copy of it (LICENSE_MODELS of apple/ml-mobileclip) with the model."
)


def model_card(
    model: Exported, files: Sequence[Mapping[str, str]], forms: Sequence[str] = (), pairs: RetrievalSet | None = None
) -> str:
    """The card in Markdown; `files` are the rows of the table of exported files.

    `forms` says what of the int8 files is int8, and `pairs` is the set by which they were judged.
    """
    sections = [
        "---",
        "library_name: onnx",
        "pipeline_tag: zero-shot-image-classification",
        *(["license: apple-amlr"] if is_research_only(model.model.ancestry) else []),
        "tags: [clip, long-captions, onnx, transformers.js]",
        "---",
        "",
        "# A compact CLIP that reads long captions",
        "",
        f"{describe_model(model.model)}. Pictures of {model.image_size} x {model.image_size} pixels and captions of up "
        f"to {model.context_length} tokens become features of {model.model.embed_dim} numbers and unit norm; their "
        "product is the similarity.",
        "",
        *_figures(model),
        *_training(model.config),
        *_files(files, forms, pairs),
        *_use(model),
        *_terms(model.model.ancestry),
        *_telephones(model, files),
        *_limits(model),
    ]
    return "\n".join(sections) + "\n"


def with_own_resize(card: str, cosine: float) -> str:
    """The card with the least cosine of features of pictures that transformers.js has resized with those of ours."""
    return re.sub(_OWN_RESIZE, f"transformers.js resizes in its own way: cosine {cosine:.4f} at least with ours.", card)


def _figures(model: Exported) -> list[str]:
    """The run's tests or, without them, its validation."""
    if model.run is None or model.config is None:
        return ["## Figures", "", "This file came without its run: no figures are known.", ""]
    results = model.run / "results.json"
    rows = []
    if results.is_file():
        judged = json.loads(results.read_text(encoding="utf-8"))["models"].get(model.config.run.train, {})
        rows = [_row(name, test) for name, test in judged.items() if isinstance(test, Mapping) and "i2t" in test]
    if not rows and (metrics := [row for row in read_metrics(model.run, "val") if "i2t_r1" in row]):
        best = max(metrics, key=lambda row: row.get("score", 0.0))
        rows = [f"| validation | {best['i2t_r1']:.1f} | {best['t2i_r1']:.1f} | |"]
    if not rows:
        return ["## Figures", "", "The run was not evaluated.", ""]
    head = ["| test | picture to caption, R@1 % | caption to picture, R@1 % | pictures |", "| --- | --- | --- | --- |"]
    return ["## Figures", "", *head, *rows, ""]


def _row(name: str, test: Mapping[str, Any]) -> str:
    return f"| {name} | {test['i2t']['r1']:.1f} | {test['t2i']['r1']:.1f} | {test['num_images']} |"


def _training(config: TrainConfig | None) -> list[str]:
    if config is None:
        return []
    losses = ", ".join(f"`{name}` {weight:g}" for name, weight in config.loss.weights.items() if weight)
    teacher = config.teacher.checkpoint or config.teacher.cache
    length = f"{config.run.max_steps} steps" if config.run.max_steps else f"{config.run.epochs:g} epochs"
    return [
        "## Training",
        "",
        f"- Data: {', '.join(map(_short, config.data.shards)) or 'not recorded'}",
        f"- Teacher: {_short(str(teacher)) if config.distils else 'none'}",
        f"- Losses: {losses}",
        f"- Length: {length} of {config.run.global_batch_size} pairs, {config.run.precision}, seed {config.run.seed}",
        "",
    ]


def _short(path: str) -> str:
    """The last two parts of a path: more would tell about the machine."""
    return f"`{'/'.join(Path(path).parts[-2:]).lstrip('/')}`"


def _files(files: Sequence[Mapping[str, str]], forms: Sequence[str], pairs: RetrievalSet | None) -> list[str]:
    cells = [list(files[0]), ["---"] * len(files[0]), *(list(row.values()) for row in files)]
    about = ["Cosine and difference are the worst over random inputs of every size, against the PyTorch model."]
    if pairs is not None:
        about += [
            "Those of int8 files (`quantized`) are the worst over pairs of pictures and captions, against the float32 "
            "files of the same runtime. R@1, picture to caption / caption to picture, is that of both towers on "
            f"{len(pairs.images)} pictures of `{pairs.name}`.",
            "Where the products of a text tower are int8, each call takes their ranges from its own captions: the "
            "features of a caption vary a little with those beside it.",
        ]
    listed = [f"- {form}" for form in forms]
    return [
        "## Files",
        "",
        " ".join(about),
        "",
        *(f"| {' | '.join(row)} |" for row in cells),
        "",
        *listed,
        *[""] * bool(listed),
    ]


def _use(model: Exported) -> list[str]:
    return [
        "## Use",
        "",
        "`onnx/text_model.onnx`: `input_ids` (int64) to `text_embeds`. `onnx/vision_model.onnx`: `pixel_values` to "
        "`image_embeds`. Any batch, and 2 to "
        f"{model.context_length} tokens; longer captions must be cut by the tokenizer, which `tokenizer.json` does.",
        "",
        "```python",
        "import onnxruntime, tokenizers",
        "",
        'tokenizer = tokenizers.Tokenizer.from_file("tokenizer.json")',
        'session = onnxruntime.InferenceSession("onnx/text_model.onnx")',
        'ids = [found.ids for found in tokenizer.encode_batch(["a long caption ..."])]',
        'features = session.run(None, {"input_ids": ids})[0]',
        "```",
        "",
        f"`{WEIGHTS}` holds the PyTorch weights: `mobileclip_student.load_student` or `longclip_teacher.load_teacher`.",
        "",
    ]


def _terms(ancestry: Ancestry) -> list[str]:
    """What binds the model, and a row for each of its ancestors."""
    table = [
        "| weights | role | terms | sha256 |",
        "| --- | --- | --- | --- |",
        *(f"| {one.source} | {_ROLES[one.role]} | {one.terms} | {one.sha256[:16]} |" for one in ancestry),
    ]
    return [
        "## Terms",
        "",
        f"The terms of this model are {describe_terms(ancestry)}.",
        *([f"It may not be used in a product or a service. {_APPLE_NOTICE}"] if is_research_only(ancestry) else []),
        "",
        *([*table, ""] if ancestry else []),
        "The terms of the training data are not recorded.",
        "",
    ]


def _telephones(model: Exported, files: Sequence[Mapping[str, str]]) -> list[str]:
    """What the files for telephones take, if there are any."""
    folders = {row["file"].split("/")[0] for row in files}
    if not folders & {"executorch", "coreml"}:
        return []
    told = [
        f"The files for telephones take one picture, float32 [1, 3, {model.image_size}, {model.image_size}], or the "
        f"token ids of one caption, [1, L] with L from 2 to {model.context_length}: int64 in ExecuTorch, int32 in Core "
        "ML.",
    ]
    if "coreml" in folders:
        told.append(
            "The Core ML packages were converted but not run, since Core ML runs on Apple's systems alone: compare "
            "their features with those of the ONNX files before you use them."
        )
    return ["## On telephones", "", *told, ""]


def _limits(model: Exported) -> list[str]:
    return [
        "## Limits",
        "",
        "- Pictures must be resized as in training, with antialiasing; other resizing changes the features.",
        f"- {_NOT_MEASURED}",
        "- The tokenizer file differs from the training tokenizer in captions with mojibake, rare HTML entities "
        "or C1 control characters.",
        f"- What stands after token {model.context_length} of a caption is not read.",
        "- It carries the biases of its data and its teacher, and was not tested for uses that affect people.",
        "",
    ]
