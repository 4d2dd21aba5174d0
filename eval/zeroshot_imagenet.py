"""The command for zero-shot classification of ImageNet's test sets, CIFAR, or any folder of class folders.

python eval/zeroshot_imagenet.py --checkpoint mobileclip_s0.pt --imagenet-val data/imagenet/val --json imagenet.json
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table

from eval.base.arguments import answer_early, read_options
from eval.benchmarks.dataset_names import DatasetName
from eval.command_line import EvaluationOptions
from longclip_teacher.errors import InputError, run_command

# describes the layout of the validation folder
LAYOUT = "https://pytorch.org/vision/stable/generated/torchvision.datasets.ImageNet.html"


@dataclass
class Options(EvaluationOptions):
    """Zero-shot accuracy of a student, a teacher or published weights on ImageNet's test sets, CIFAR, or your classes.

    Examples: ImageNet and ImageNet-R with 80 templates, CIFAR-10 with its 18, and your own classes with one.
    python eval/zeroshot_imagenet.py --checkpoint mobileclip_s0.pt --variant s0 --imagenet-val data/imagenet/val
    python eval/zeroshot_imagenet.py --checkpoint longclip-b --dataset imagenet_r --imagenet-val data/imagenet-r
    python eval/zeroshot_imagenet.py --checkpoint longclip-b --dataset cifar10 --imagenet-val data/cifar
    python eval/zeroshot_imagenet.py --checkpoint runs/distil --imagenet-val data/pets --templates "a photo of a {}."
    """

    imagenet_val: Annotated[str | None, tyro.conf.arg(metavar="DIR|'DIR/*.tar'")] = None
    """The pictures. ImageNet: one folder per synset (n01440764/ILSVRC2012_val_00000293.JPEG, ...), all 1000 or some.
    ImageNet-V2: folders 0 to 999. CIFAR: its binary version, unpacked. Your own: one folder per class. Or webdataset
    shards whose samples have a .jpg and a .cls (the class number, 0 to 199 for imagenet_a and imagenet_r)."""
    dataset: DatasetName = "auto"
    """Which set it is. auto recognises ImageNet and ImageNet-V2 and treats everything else as your own classes. A set
    given by name must be complete; imagenet_a and imagenet_r choose only among their own 200 classes. folder: any
    folder of class folders, with the folders' names as they are."""
    classnames: Path | None = None
    """A text file of class names, one per line, in the sorted order of the folders (or of the class numbers, for a set
    given by name). Folders named by numbers go by number: folder 0 is the first line. Unset: ImageNet's names for
    synset folders and shards, CIFAR's own, otherwise the folders' names with _ and - as spaces."""
    templates: Annotated[str, tyro.conf.arg(metavar="auto|openai|simple|cifar|FILE|TEXT")] = "auto"
    """Sentences for the class names: openai (80), simple (7), cifar (18), a text file of them (one per line, {} for the
    name), or one in quotes, such as "a photo of a {}.". auto: cifar for CIFAR, otherwise openai."""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png|FILE.svg")] = None
    """File for a plot that shows which classes were mistaken for which."""

    def check(self) -> None:
        """Raise InputError for options that cannot work, before any data is read."""
        if self.imagenet_val is None:
            raise InputError(
                "pass --imagenet-val DIR: ImageNet's validation pictures in one folder per synset (n01440764/...), as "
                f"described at {LAYOUT}, or any folder of class folders"
            )
        super().check()


if __name__ == "__main__":
    answer_early(Options)  # --help and refused options end here: the imports below take seconds

from eval.base.consoles import plain_console
from eval.base.processes import start
from eval.benchmarks.class_prompts import read_classnames, read_templates
from eval.benchmarks.labelled_images import find_labelled_images
from eval.measures.confusion import check_plot_path, draw_confusion
from eval.measures.zeroshot import classify, zeroshot_figures
from longclip_teacher.atomic_files import write_json


def main() -> None:
    """Run the command."""
    options = read_options(Options)
    assert options.imagenet_val is not None  # check() has seen to it
    if options.plot is not None:
        check_plot_path(options.plot)
    classnames = read_classnames(options.classnames)
    templates = read_templates(options.templates)
    labelled = find_labelled_images(options.imagenet_val, classnames, options.dataset)
    with start(options.device, tf32=False) as runtime:
        answers = classify(options.load(), labelled, templates, options.encoding())
        if not runtime.is_main:
            return
        result = {"checkpoint": options.checkpoint, "precision": options.precision} | zeroshot_figures(answers)
        if options.json is not None:
            write_json(options.json, result)
        if options.plot is not None:
            title = f"{labelled.name}: top-1 {result['top1']:.1f}%, mean per class {result['mean_per_class']:.1f}%"
            draw_confusion(answers.confusion(), labelled.classnames, title, options.plot)
        print_table(result)


def print_table(result: dict[str, Any]) -> None:
    """Print the figures as a table on stdout, and warnings about them on stderr."""
    table = Table(title=f"zero-shot: {result['dataset']}", title_justify="left")
    for column in ("pictures", "classes", "templates", "top-1 %", "top-5 %", "mean per class %"):
        table.add_column(column, justify="right")
    counts = (str(result[key]) for key in ("num_images", "num_classes", "num_templates"))
    table.add_row(*counts, *(f"{result[key]:.1f}" for key in ("top1", "top5", "mean_per_class")))
    plain_console().print(table)
    if result["confusion"]:
        true, answer, count = result["confusion"][0]
        print(f"most frequent mistake: {true}, taken for {answer} {count} times")
    if result["num_unreadable"]:
        print(f"{result['num_unreadable']} unreadable pictures were left out, the first: {result['unreadable'][0]}")
    if result["count_mismatch"]:
        print(f"warning: {result['count_mismatch']}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
