"""Recall when sentences of long captions are dropped, shuffled or added, and tokens are cut; the effect of padding.

    python eval/long_captions.py --checkpoint RUN_OR_FILE --protocol urban1k --root data/Urban1k --out-dir behaviour

Pictures are encoded once; only the captions change. In the captions of Long-CLIP (Zhang et al. 2024) the first sentence
sums up the picture and the others give details: a model that reads only the first loses nearly all recall without it.

Shapes: N pictures, M captions, D embedding width, L tokens, B batch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.table import Table

from eval.base.arguments import answer_early, read_options
from eval.command_line import EvaluationOptions
from longclip_teacher.errors import InputError, run_command


@dataclass
class Options(EvaluationOptions):
    """How recall depends on long captions: sentences dropped, shuffled, added one by one; tokens cut; padding.

    python eval/long_captions.py --checkpoint runs/distil --protocol urban1k --root data/Urban1k --out-dir behaviour
    python eval/long_captions.py --checkpoint longclip-b --root data/mine --json behaviour.json --limit 200
    """

    protocol: str = "folder"
    """Benchmark; `python eval/retrieval.py --protocol list` explains each. folder: your own pairs."""
    root: Path | None = None
    """Folder of the benchmark's files."""
    annotations: Path | None = None
    """The protocol's annotation file, if it has one that is not in its usual place below --root."""
    limit: int | None = None
    """Use only the first N pictures: for a quick look, not for a figure to report."""
    out_dir: Path | None = None
    """Folder for a plot of the curves, long_captions.png."""

    def check(self) -> None:
        """Raise InputError for options that cannot work, before any data is read."""
        if self.root is None:
            raise InputError("pass --root DIR, the folder of the benchmark's files")
        super().check()
        if self.out_dir is not None and self.out_dir.exists() and not self.out_dir.is_dir():
            raise InputError(f"--out-dir {self.out_dir} is a file: name a folder")


if __name__ == "__main__":
    answer_early(Options)  # --help and refused options end here: the imports below take seconds

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from eval.base.consoles import plain_console
from eval.base.processes import start
from eval.base.sentences import split_sentences
from eval.benchmarks.protocols import RetrievalSet, load_retrieval_set
from eval.measures.caption_edits import (
    drop_first_sentence,
    first_sentences,
    only_sentence,
    shuffle_sentences,
)
from eval.measures.recall import direction_metrics, recall_metrics, retrieval_ranks
from eval.measures.retrieval_set import EncodedSet, encode_retrieval_set
from eval.pages.long_caption_plots import plot_long_captions
from eval.towers.features import Encoding, encode_captions, evaluation_mode, model_device, show_track
from eval.towers.models import ClipModel
from eval.towers.open_clip_model import OpenClipModel
from longclip_teacher.atomic_files import write_json

__all__ = ["long_caption_behaviour", "padding_cosines"]

SHUFFLE_SEEDS = (0, 1, 2)
CUT_LENGTHS = (20, 77, 128, 248)
PADDED_LENGTHS = (77, 128, 248)
MAX_SENTENCES = 12
EXACT_COSINE = 0.99999  # a model that masks pads reaches this in float32


def long_caption_behaviour(
    model: ClipModel, retrieval_set: RetrievalSet, encoding: Encoding = Encoding()
) -> dict[str, Any]:
    """Recall in both directions under each edit of the captions, as in the JSON.

    `original`, `first_dropped` and `shuffled` (mean over three seeds) have the figures of `recall_metrics`;
    `relative_change` is the change of R@1 by the two edits, in percent of the original. These lists have one entry per
    step: `first_sentences` (k = 1 ... K, where K is the 95th percentile of the number of sentences, at most 12),
    `only_sentence` (the k-th sentence alone: the queries are the captions that have one and the pictures whose captions
    all do; the other captions stay among the candidates with their last sentence), `cut` (captions cut to a number of
    tokens, EOT kept) and `padding` (see `padding_cosines`, on the first sentences). `encode_retrieval_set` says what
    happens to unreadable pictures.
    """
    encoded = encode_retrieval_set(model, retrieval_set, encoding)
    captions = encoded.captions
    num_sentences = np.array([len(split_sentences(caption)) for caption in captions])
    steps = range(1, min(MAX_SENTENCES, int(np.ceil(np.percentile(num_sentences, 95)))) + 1)

    def recall(edited: Sequence[str]) -> dict[str, Any]:
        features, _ = encode_captions(model, edited, encoding)
        return recall_metrics(encoded.image_features, features, encoded.caption_image)

    original = recall_metrics(encoded.image_features, encoded.text_features, encoded.caption_image)
    dropped = recall([drop_first_sentence(caption) for caption in captions])
    shuffled = _mean([recall([shuffle_sentences(text, seed) for text in captions]) for seed in SHUFFLE_SEEDS])
    return {
        "protocol": retrieval_set.name,
        "num_images": len(encoded.images),
        "num_texts": len(captions),
        "num_truncated": encoded.num_truncated,
        "context_length": model.context_length,
        "unreadable": [lost.name for lost in encoded.unreadable],
        "count_mismatch": retrieval_set.count_mismatch,
        "mean_sentences": float(num_sentences.mean()),
        "num_of_one_sentence": int((num_sentences <= 1).sum()),
        "original": original,
        "first_dropped": dropped,
        "shuffled": shuffled,
        "relative_change": {
            "first_dropped": _relative_change(original, dropped),
            "shuffled": _relative_change(original, shuffled),
        },
        "first_sentences": [{"k": k, **recall([first_sentences(text, k) for text in captions])} for k in steps],
        "only_sentence": [_only_sentence_recall(model, encoded, k, encoding) for k in steps],
        "cut": _cut_recall(model, encoded, encoding),
        "padding": padding_cosines(model, [first_sentences(text, 1) for text in captions], encoding),
    }


def padding_cosines(
    model: ClipModel, captions: Sequence[str], encoding: Encoding = Encoding()
) -> list[dict[str, float]]:
    """`[{num_tokens, min_cosine, mean_cosine}]`: features of captions padded to 77, 128 and 248 tokens, compared with
    those of the same captions without padding.

    Lengths beyond the model's context are left out, and so are captions that the shortest length would cut. Every batch
    has one caption of the full length beside the padded ones, so that no model can trim the padding away. A model that
    always pads to its context (published students, open_clip's models) has the cosine 1 by construction.
    """
    lengths = [length for length in PADDED_LENGTHS if length <= model.context_length]
    if not lengths:
        return []
    num_tokens = {text: model.tokenizer.count_tokens(text) for text in dict.fromkeys(captions)}
    short = sorted((text for text in num_tokens if num_tokens[text] <= lengths[0]), key=num_tokens.__getitem__)
    if not short:
        raise InputError(f"no caption of at most {lengths[0]} tokens to pad: all first sentences are longer")
    by_length: dict[int, list[str]] = {}
    for text in short:
        by_length.setdefault(num_tokens[text], []).append(text)
    unpadded = torch.cat([_encode_at(model, texts, length, encoding) for length, texts in by_length.items()]).double()
    result: list[dict[str, float]] = []
    for length in lengths:
        padded = _encode_at(model, short, length, encoding, beside=f"{short[0]} " * length)
        cosines = F.cosine_similarity(padded.double(), unpadded, dim=1)
        result.append({"num_tokens": length, "min_cosine": float(cosines.min()), "mean_cosine": float(cosines.mean())})
    return result


def _only_sentence_recall(model: ClipModel, encoded: EncodedSet, k: int, encoding: Encoding) -> dict[str, Any]:
    sentences = [only_sentence(caption, k) for caption in encoded.captions]
    instead = [split_sentences(caption)[-1] for caption in encoded.captions]
    texts = [sentence or last for sentence, last in zip(sentences, instead, strict=True)]
    features, _ = encode_captions(model, texts, encoding)
    ranks = retrieval_ranks(encoded.image_features, features, encoded.caption_image)
    has_sentence = torch.tensor([sentence is not None for sentence in sentences])
    asked = torch.ones(len(encoded.images), dtype=torch.bool)
    asked[encoded.caption_image.cpu()[~has_sentence]] = False
    return {
        "k": k,
        "num_texts": int(has_sentence.sum()),
        "num_images": int(asked.sum()),
        "i2t": direction_metrics(ranks.i2t.select(asked)) if asked.any() else None,
        "t2i": direction_metrics(ranks.t2i.select(has_sentence)),
    }


def _cut_recall(model: ClipModel, encoded: EncodedSet, encoding: Encoding) -> list[dict[str, Any]]:
    ordered = sorted(set(encoded.captions), key=model.tokenizer.count_tokens, reverse=True)
    row_of = {caption: row for row, caption in enumerate(ordered)}
    rows = torch.tensor([row_of[caption] for caption in encoded.captions])
    num_tokens = np.array([model.tokenizer.count_tokens(caption) for caption in encoded.captions])
    result = []
    for length in [length for length in CUT_LENGTHS if length <= model.context_length]:
        features = _encode_at(model, ordered, length, encoding)[rows]
        recall = recall_metrics(encoded.image_features, features, encoded.caption_image)
        result.append({"num_tokens": length, "num_cut": int((num_tokens > length).sum()), **recall})
    return result


def _encode_at(
    model: ClipModel, captions: Sequence[str], num_tokens: int, encoding: Encoding, beside: str | None = None
) -> Float[Tensor, "M D"]:
    """Unit-norm features of captions cut and padded to `num_tokens`, in order; each batch ends with `beside`."""
    size = encoding.batch_size
    batches = [list(captions[start : start + size]) for start in range(0, len(captions), size)]
    description = f"captions at {num_tokens} tokens" if encoding.show_progress and len(batches) > 1 else None
    features = []
    with evaluation_mode(model, encoding.precision):
        for batch in show_track(batches, description, len(batches)):
            texts = [*batch, beside] if beside is not None else batch
            tokens = _tokens_at(model, texts, num_tokens).to(model_device(model))  # [B,L]
            features.append(model.encode_text(tokens)[: len(batch)].float())
    return F.normalize(torch.cat(features), dim=-1)


def _tokens_at(model: ClipModel, texts: Sequence[str], num_tokens: int) -> Int[Tensor, "B L"]:
    """Captions cut to `num_tokens`. open_clip's models need their whole context, padded as their tokenizer does."""
    tokens = model.tokenizer(texts, num_tokens)
    if not isinstance(model, OpenClipModel):
        return tokens
    padding = int(model.tokenizer("", model.context_length)[0, -1])
    return F.pad(tokens, (0, model.context_length - tokens.shape[1]), value=padding)


def _mean(figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of several dicts of figures with the same keys, nested dicts included."""
    return {
        key: _mean([figure[key] for figure in figures])
        if isinstance(value, dict)
        else mean(figure[key] for figure in figures)
        for key, value in figures[0].items()
    }


def _relative_change(original: dict[str, Any], edited: dict[str, Any]) -> dict[str, float | None]:
    """Change of R@1 in percent of the original; None if the original is 0."""
    before, after = ({way: figures[way]["r1"] for way in ("i2t", "t2i")} for figures in (original, edited))
    return {way: 100 * (after[way] - before[way]) / before[way] if before[way] else None for way in before}


def main() -> None:
    """Run the command."""
    options = read_options(Options)
    assert options.root is not None  # check() has seen to it
    with start(options.device, allow_tf32=False) as runtime:
        retrieval_set = load_retrieval_set(options.protocol, options.root, options.limit, options.annotations)
        if retrieval_set.count_mismatch and runtime.is_main:
            print(f"warning: {retrieval_set.count_mismatch}", file=sys.stderr)
        result = {"checkpoint": options.checkpoint, "precision": options.precision}
        result |= long_caption_behaviour(options.load(), retrieval_set, options.encoding())
        if not runtime.is_main:
            return
        if options.json is not None:
            write_json(options.json, result)
        if options.out_dir is not None:
            plot_long_captions(result, options.out_dir / "long_captions.png")
        print_behaviour(result)


def print_behaviour(result: dict[str, Any]) -> None:
    """Print the figures as a table on stdout."""
    table = Table(title=f"{result['protocol']}: {result['num_images']} pictures, {result['num_texts']} captions")
    for column in ("captions", "image to text R@1 %", "text to image R@1 %"):
        table.add_column(column, justify="left" if column == "captions" else "right")
    for name in ("original", "first_dropped", "shuffled"):
        table.add_row(name.replace("_", " "), *_shown(result[name]), end_section=name == "shuffled")
    for step in result["first_sentences"]:
        name = f"first {step['k']} sentences" if step["k"] > 1 else "first sentence"
        table.add_row(name, *_shown(step), end_section=step is result["first_sentences"][-1])
    for step in result["only_sentence"]:
        name = f"sentence {step['k']} alone ({step['num_texts']} captions)"
        table.add_row(name, *_shown(step), end_section=step is result["only_sentence"][-1])
    for step in result["cut"]:
        table.add_row(f"cut at {step['num_tokens']} tokens ({step['num_cut']} cut)", *_shown(step))
    console = plain_console()
    console.print(table)
    notes = []
    for edit, name in (("first_dropped", "first sentence dropped"), ("shuffled", "sentences shuffled")):
        change = [result["relative_change"][edit][way] for way in ("i2t", "t2i")]
        i2t, t2i = ("-" if value is None else f"{value:+.1f}%" for value in change)
        notes.append(f"{name}: image to text {i2t}, text to image {t2i} relative")
    for step in result["padding"]:
        verdict = "as without padding" if step["min_cosine"] >= EXACT_COSINE else "padding changes the features"
        notes.append(f"padded to {step['num_tokens']} tokens: cosine {step['min_cosine']:.6f} at least, {verdict}")
    for note in notes:
        console.print(note, soft_wrap=True)


def _shown(figures: dict[str, Any]) -> list[str]:
    return [f"{figures[way]['r1']:.1f}" if figures[way] else "-" for way in ("i2t", "t2i")]


if __name__ == "__main__":
    run_command(main)
