"""What a model costs to use: parameters, arithmetic, bytes, milliseconds and memory for pictures and captions.

python eval/cost.py --checkpoint RUN_OR_FILE --json cost.json
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.table import Table

from eval.base.arguments import answer_early, read_options
from eval.command_line import EvaluationOptions
from longclip_teacher.errors import InputError, run_command


@dataclass
class Options(EvaluationOptions):
    """Measure what a model costs: parameters, FLOPs, file size, latency, memory; for a student also when fused.

    python eval/cost.py --checkpoint runs/distil --threads 1 --json cost.json
    python eval/cost.py --checkpoint open_clip:ViT-B-32/openai --device cuda --precision fp16
    """

    repeats: int = 10
    """Calls that are timed; each figure is their median."""
    threads: int | None = None
    """CPU threads. Unset: torch's default, one per core."""
    reparameterize: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = False
    batch_size: tyro.conf.Suppress[tyro.conf.Fixed[int]] = 64
    num_workers: tyro.conf.Suppress[tyro.conf.Fixed[int]] = 0
    cache_dir: tyro.conf.Suppress[tyro.conf.Fixed[Path | None]] = None

    def check(self) -> None:
        """Raise InputError for options that cannot work, before any data is read."""
        if self.threads is not None and self.threads < 1:
            raise InputError(f"--threads {self.threads}: 1 or more")
        super().check()


if __name__ == "__main__":
    answer_early(Options)  # --help and refused options end here: the imports below take seconds

import torch

from eval.base.consoles import plain_console
from eval.measures.costs import BATCH_SIZES, FULL_CAPTION_TOKENS, FullCost, measure_full_costs, threads_in_words
from eval.towers.models import ClipModel, describe_model, weights_file
from longclip_teacher.atomic_files import write_json
from mobileclip_student import MobileCLIP, reparameterize, save_student


def main() -> None:
    """Run the command."""
    options = read_options(Options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    assert options.checkpoint is not None  # check() ensures it
    model = options.load()
    path = weights_file(options.checkpoint)
    models: dict[str, ClipModel] = {"as loaded": model}
    weights = {} if path is None else {"as loaded": path}
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model, MobileCLIP) and not model.config.reparameterized:
            fused = models["reparameterised"] = reparameterize(model)
            weights["reparameterised"] = Path(folder) / "fused.safetensors"
            save_student(fused, weights["reparameterised"])
        costs = measure_full_costs(models, weights, repeats=options.repeats, precision=options.precision)
    if options.json is not None:
        write_json(options.json, {"checkpoint": options.checkpoint, "costs": costs})
    print_table(costs, describe_model(model))


_ROWS = (  # label, key, divisor of the figure, format
    *((f"parameters, {part}", f"params{key}", 1e6, ".2f M") for part, key in (("all", ""), ("image", "_image"))),
    ("parameters, text", "params_text", 1e6, ".2f M"),
    ("file", "bytes", 1e6, ".1f MB"),
    ("FLOPs, a picture", "flops_image", 1e9, ".3f G"),
    *((f"FLOPs, a caption of {length}", f"flops_text_{length}", 1e9, ".3f G") for length in FULL_CAPTION_TOKENS),
    *((f"{batch} picture{'s' * (batch > 1)}", f"image_ms_b{batch}", 1, ".2f ms") for batch in BATCH_SIZES),
    *(
        (f"{batch} caption{'s' * (batch > 1)} of {length}", f"text_{length}_ms_b{batch}", 1, ".2f ms")
        for length in FULL_CAPTION_TOKENS
        for batch in BATCH_SIZES
    ),
    *((f"peak memory, batch {batch}", f"peak_bytes_b{batch}", 1e6, ".1f MB") for batch in BATCH_SIZES),
)


def print_table(costs: Mapping[str, FullCost], model: str) -> None:
    """Print the figures as a table on stdout, one column per form of `model`, and the conditions below it."""
    first: dict[str, Any] = next(iter(costs.values()))
    table = Table(title=f"{model}, pictures of {first['image_size']} px", title_justify="left")
    table.add_column("")
    for name in costs:
        table.add_column(name, justify="right")
    for label, key, unit, form in _ROWS:
        number, _, symbol = form.partition(" ")
        figures = [cost[key] for cost in costs.values()]
        table.add_row(
            label, *("-" if figure is None else f"{float(figure) / unit:{number}} {symbol}" for figure in figures)
        )
    console = plain_console()
    console.print(table)
    notes = [
        f"{first['machine']} ({first['device']}), {threads_in_words(first['threads'])}, {first['precision']}",
        f"each time is the median of {first['repeats']} calls and is that of the whole batch",
        "FLOPs are 2 x MACs; memory is that of tensors: the weights and the most that a call has alive",
    ]
    if len(costs) > 1:
        notes.insert(0, "reparameterised: the branches of the loaded model are fused; the features stay the same")
    for note in notes:
        console.print(note, soft_wrap=True)


if __name__ == "__main__":
    run_command(main)
