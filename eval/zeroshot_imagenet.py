"""Zero-shot classification of ImageNet's validation set, or of any folder of class folders, as a command.

python eval/zeroshot_imagenet.py --checkpoint mobileclip_s0.pt --imagenet-val data/imagenet/val --json imagenet.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from eval.annotation_files import read_text
from eval.command_line import EvaluationOptions, write_json
from eval.zeroshot import OPENAI_TEMPLATES, SIMPLE_TEMPLATES, evaluate_zeroshot
from longclip_teacher.errors import InputError, run_command

# Where the layout of the validation folder is described
LAYOUT = "https://pytorch.org/vision/stable/generated/torchvision.datasets.ImageNet.html"


@dataclass
class Options(EvaluationOptions):
    """Zero-shot top-1 and top-5 accuracy of a student, a teacher or published weights, on ImageNet or your own classes.

    ImageNet, with 80 templates; then classes of your own, one folder each, with one template:
    python eval/zeroshot_imagenet.py --checkpoint mobileclip_s0.pt --variant s0 --imagenet-val data/imagenet/val
    python eval/zeroshot_imagenet.py --checkpoint runs/distil --imagenet-val data/pets --templates "a photo of a {}."
    """

    imagenet_val: Annotated[str | None, tyro.conf.arg(metavar="DIR|'DIR/*.tar'")] = None
    """The pictures. ImageNet: one folder a synset (n01440764/ILSVRC2012_val_00000293.JPEG, ...), all 1000 or some;
    your own: one folder a class; or webdataset shards whose samples have a .jpg and a .cls (the class number)."""
    classnames: Path | None = None
    """A text file of class names, one a line, in the sorted order of the folders. Unset: ImageNet's names for synset
    folders and for shards, otherwise the folders' own names with _ and - as spaces."""
    templates: Annotated[str, tyro.conf.arg(metavar="openai|simple|FILE|TEXT")] = "openai"
    """Sentences to put the class names into: openai (80), simple (7), a text file of them (one a line, {} for the
    name), or one in quotes, such as "a photo of a {}."."""


def main() -> None:
    """The command."""
    options = tyro.cli(Options, description=Options.__doc__)
    if options.imagenet_val is None:
        raise InputError(
            "pass --imagenet-val DIR: ImageNet's validation pictures in one folder a synset (n01440764/...), as "
            f"described at {LAYOUT}, or any folder of class folders"
        )
    options.check()
    classnames = read_lines(options.classnames) if options.classnames is not None else None
    templates = read_templates(options.templates)
    result = {"checkpoint": options.checkpoint, "precision": options.precision}
    result |= evaluate_zeroshot(options.load(), options.imagenet_val, classnames, templates, options.encoding())
    print_table(result)
    if options.json is not None:
        write_json(options.json, result)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{path} is empty: write one entry a line")
    return lines


def read_templates(choice: str) -> Sequence[str]:
    """The templates that --templates means."""
    named = {"openai": OPENAI_TEMPLATES, "simple": SIMPLE_TEMPLATES}
    if choice in named:
        return named[choice]
    if "{}" in choice:
        return [choice]
    if not Path(choice).is_file():
        raise InputError(f"--templates {choice!r} is no file, no sentence with {{}}, and neither of {', '.join(named)}")
    templates = read_lines(Path(choice))
    for number, template in enumerate(templates, start=1):
        if "{}" not in template:
            raise InputError(f"{choice}, template {number}: {template!r} has no {{}} for the class name")
    return templates


def print_table(result: dict[str, Any]) -> None:
    """The figures as a table on stdout, what casts doubt on them on stderr."""
    table = Table(title=f"zero-shot: {result['dataset']}", title_justify="left")
    for column in ("pictures", "classes", "templates", "top-1 %", "top-5 %"):
        table.add_column(column, justify="right")
    counts = (str(result[key]) for key in ("num_images", "num_classes", "num_templates"))
    table.add_row(*counts, f"{result['top1']:.1f}", f"{result['top5']:.1f}")
    Console().print(table)
    if result["num_unreadable"]:
        print(f"{result['num_unreadable']} pictures unreadable and left out, the first: {result['unreadable'][0]}")
    if result["count_mismatch"]:
        print(f"warning: {result['count_mismatch']}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
