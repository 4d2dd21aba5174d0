"""What a model reads of long captions: recall when they are edited, cut and padded, and details that it does not see.

    python eval/long_captions.py --checkpoint RUN_OR_FILE --protocol urban1k --root data/Urban1k --out-dir behaviour

Pictures are encoded once; only the captions change. In the captions of Long-CLIP (Zhang et al. 2024) the first sentence
sums up the picture and the others give details: a model that reads only the first loses nearly all recall without it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from eval.base.arguments import answer_early, read_options
from eval.command_line import EvaluationOptions
from longclip_teacher.errors import InputError, run_command


@dataclass
class Options(EvaluationOptions):
    """What a model reads of long captions: how many tokens it uses, and what edits of the captions cost it.

    python eval/long_captions.py --checkpoint runs/distil --protocol urban1k --root data/Urban1k --out-dir behaviour
    python eval/long_captions.py --checkpoint longclip-b --against student=runs/s0,runs/s1 --root data/mine --out-dir b
    torchrun --nproc_per_node=4 eval/long_captions.py --checkpoint longclip-l --root data/mine --json behaviour.json

    Captions are cut every 8 tokens. Sentences are removed, swapped, shuffled, or read alone; words are left out; text
    about something else is put in front; one colour, number or place is changed. Every figure has a 95% interval over
    the pictures. This takes about as long as 40 passes over the captions, while pictures are encoded once.
    """

    protocol: str = "folder"
    """Benchmark; `python eval/retrieval.py --protocol list` explains each. folder: your own pairs."""
    root: Path | None = None
    """Folder of the benchmark's files."""
    annotations: Path | None = None
    """The protocol's annotation file, if it has one that is not in its usual place below --root."""
    against: tuple[str, ...] = ()
    """Further models, compared with that of --checkpoint on the same pictures: each CHECKPOINT, NAME=CHECKPOINT or
    NAME=SEED,SEED,..., with or without @SETTINGS, as in eval/compare.py."""
    limit: int | None = None
    """Use only the first N pictures: for a quick look, not for a figure to report."""
    out_dir: Path | None = None
    """Folder for the page report.html, with its plots, and results.json."""

    def check(self) -> None:
        """Raise InputError for options that cannot work, before any data is read."""
        if self.root is None:
            raise InputError("pass --root DIR, the folder of the benchmark's files")
        super().check()
        if self.out_dir is not None and self.out_dir.exists() and not self.out_dir.is_dir():
            raise InputError(f"--out-dir {self.out_dir} is a file: name a folder")


if __name__ == "__main__":
    answer_early(Options)  # --help and refused options end here: the imports below take seconds

from eval.base.consoles import plain_console
from eval.base.environment import environment_record, provenance
from eval.base.processes import start
from eval.benchmarks.protocols import RetrievalSet, load_retrieval_set
from eval.command_line import show_recognised
from eval.measures.behaviour import measure_behaviour
from eval.measures.behaviour_figures import Behaviour
from eval.measures.bootstrap import INTERVAL_METHOD
from eval.measures.caption_edits import EDITS
from eval.measures.figures import WAYS, figure_columns
from eval.measures.padding import EXACT_COSINE
from eval.measures.retrieval_set import encode_retrieval_set
from eval.pages.behaviour_page import behaviour_charts, behaviour_tables
from eval.pages.behaviour_words import METHOD, behaviour_words
from eval.pages.report import Report, model_colours, write_report
from eval.towers.models import ClipModel, describe_model
from eval.towers.named_models import model_name, parse_models
from longclip_teacher.atomic_files import write_json

__all__ = ["behaviour_json", "behaviour_report", "print_behaviour"]

Measured = dict[str, list[dict[str, Any]]]  # by model, one result of measure_behaviour per seed


def main() -> None:
    """Run the command."""
    options = read_options(Options)
    assert options.root is not None and options.checkpoint is not None  # check() has seen to it
    further = parse_models(options.against)
    first = model_name(options.checkpoint)
    if first in further:
        raise InputError(f"two models are called {first}: name the one of --against, as in other=CHECKPOINT")
    with start(options.device, tf32=False) as runtime:
        retrieval_set = load_retrieval_set(options.protocol, options.root, options.limit, options.annotations)
        if retrieval_set.count_mismatch and runtime.is_main:
            print(f"warning: {retrieval_set.count_mismatch}", file=sys.stderr)
        measured: Measured = {}
        for name, checkpoint, model in _models(options, first):
            encoded = encode_retrieval_set(model, retrieval_set, options.encoding())
            result = measure_behaviour(model, encoded, options.encoding())
            result["figures"] = {"checkpoint": checkpoint, "read_as": describe_model(model)} | result["figures"]
            measured.setdefault(name, []).append(result)
        if not runtime.is_main:
            return
        behaviour = Behaviour(retrieval_set.name, measured)
        results = behaviour_json(options, retrieval_set, behaviour)
        if options.json is not None:
            write_json(options.json, results)
        if options.out_dir is not None:
            write_json(options.out_dir / "results.json", results)
            write_report(options.out_dir / "report.html", behaviour_report(retrieval_set, behaviour))
        print_behaviour(behaviour)


def _models(options: Options, first: str) -> Iterator[tuple[str, str, ClipModel]]:
    """Yield name, checkpoint and model, one model at a time in memory."""
    assert options.checkpoint is not None
    yield first, options.checkpoint, options.load()
    for name, entry in parse_models(options.against).items():
        for checkpoint in entry.checkpoints:
            with show_recognised():
                model = entry.settings.load(checkpoint, options.torch_device())
            yield name, checkpoint, model


# --- what is written ---


def behaviour_json(options: Options, retrieval_set: RetrievalSet, behaviour: Behaviour) -> dict[str, Any]:
    """Return results.json."""
    return {
        "protocol": retrieval_set.name,
        "sha256": retrieval_set.sha256,
        "count_mismatch": retrieval_set.count_mismatch,
        "precision": options.precision,
        "intervals": INTERVAL_METHOD,
        "models": {name: [seed["figures"] for seed in seeds] for name, seeds in behaviour.measured.items()},
        **behaviour.summary(),
        "words": {name: behaviour_words(behaviour, name) for name in behaviour.measured},
    }


def behaviour_report(retrieval_set: RetrievalSet, behaviour: Behaviour) -> Report:
    """Return the page."""
    names = list(behaviour.measured)
    columns = figure_columns([behaviour.test], zeroshot=False, cost=False)
    figures = {
        name: {f"{behaviour.test}_{way}_r1": 100 * behaviour.hits[name]["intact"][way].mean() for way in WAYS}
        for name in names
    }
    rows = provenance(environment_record())
    for name, seeds in behaviour.measured.items():
        rows[name] = "; ".join(f"{seed['figures']['checkpoint']}: {seed['figures']['read_as']}" for seed in seeds)
    rows[f"test {behaviour.test}"] = f"Pictures and captions have the sha256 {retrieval_set.sha256}"
    return Report(
        title=f"What is read of long captions: {', '.join(names)}",
        paragraphs=[
            *(words for name in names for words in behaviour_words(behaviour, name)),
            METHOD,
            f"{behaviour.test} has {len(retrieval_set.images)} pictures and {len(retrieval_set.captions)} captions. "
            f"{retrieval_set.description}",
            INTERVAL_METHOD,
        ],
        warnings=[retrieval_set.count_mismatch] if retrieval_set.count_mismatch else [],
        columns=columns,
        models=figures,
        tables=behaviour_tables(behaviour),
        sections={"What is read of a caption": behaviour_charts(behaviour, model_colours(names))},
        provenance=rows,
    )


# --- what is printed ---


def print_behaviour(behaviour: Behaviour) -> None:
    """Print the leading figures in words and a table of R@1, on stdout; of several models, from caption to picture."""
    console = plain_console(soft_wrap=True)
    for name in behaviour.measured:
        for words in behaviour_words(behaviour, name):
            console.print(words)
    figures = behaviour.first["figures"]
    table = Table(
        title=f"{behaviour.test}: {figures['num_images']} pictures, {figures['num_texts']} captions, R@1 % (loss)"
    )
    table.add_column("captions")
    ways = ["i2t", "t2i"] if len(behaviour.measured) == 1 else ["t2i"]
    for name in behaviour.measured:
        for way in ways:
            table.add_column(f"{name}\n{WAYS[way]}", justify="right")
    steps = {"intact": "as they are", **{edit.name: edit.title for edit in EDITS}}
    steps |= {name: f"sentence {name.removeprefix('only_')} alone" for name in figures["only_sentence"]}
    for step, title in steps.items():
        table.add_row(title, *_cells(behaviour, step, ways))
    plain_console().print(table)
    for name, seeds in behaviour.measured.items():
        for note in _notes(seeds[0]["figures"]):
            console.print(f"{name}: {note}")


def _cells(behaviour: Behaviour, step: str, ways: Sequence[str]) -> list[str]:
    cells = []
    for name in behaviour.measured:
        for way in ways:
            effect = behaviour.effect(step, way)
            if effect is None:
                cells.append("-")
                continue
            recall = f"{effect.recalls[name].value:.1f}"
            cells.append(recall if step == "intact" else f"{recall} ({effect.losses[name].value:.1f})")
    return cells


def _notes(figures: dict[str, Any]) -> Iterator[str]:
    for kind, found in figures["details"].items():
        if found["num_texts"]:
            yield (
                f"prefers the true caption to one with another {kind} in {found['prefers_true']:.1f}% of "
                f"{found['num_texts']} cases (50 if it sees no difference)"
            )
    for step in figures["padding"]:
        verdict = "as without padding" if step["min_cosine"] >= EXACT_COSINE else "padding changes the features"
        yield f"padded to {step['num_tokens']} tokens: cosine {step['min_cosine']:.6f} at least, {verdict}"


if __name__ == "__main__":
    run_command(main)
