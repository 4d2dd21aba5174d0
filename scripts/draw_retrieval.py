"""Draw one long caption and the picture that each of several models ranks first for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eval.base.arguments import answer_early, read_options
from longclip_teacher.errors import InputError, run_command


@dataclass
class Options:
    """Draw one long caption and the picture that each of several models ranks first for it.

    python scripts/draw_retrieval.py --models teacher=runs/a student=runs/b --root data/pairs --out found.png

    The figure names the share of all captions for which each model finds the right picture. Without --caption it shows
    the first caption that tells the models apart: the right picture for the first model, a wrong one for the last.
    """

    models: tuple[str, ...]
    """The models, each NAME=CHECKPOINT, as eval/compare.py takes them."""
    root: Path
    """Folder of the retrieval set."""
    out: Path
    """The picture to write: .png, .svg or .pdf."""
    protocol: str = "folder"
    """Protocol of the set (eval/retrieval.py --protocol list)."""
    caption: int | None = None
    """Number of the caption, from 0."""

    def check(self) -> None:
        """Raise InputError for options that cannot be used."""
        if not self.models or any("=" not in model for model in self.models):
            raise InputError("--models takes NAME=CHECKPOINT, once or more")
        if self.out.suffix not in (".png", ".svg", ".pdf"):
            raise InputError(f"--out {self.out}: give a .png, .svg or .pdf")


if __name__ == "__main__":
    answer_early(Options)  # --help and refused options end here: the imports below take seconds

import textwrap

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eval.base.consoles import plain_console
from eval.base.images import open_image
from eval.benchmarks.protocols import load_retrieval_set
from eval.measures.retrieval_set import EncodedSet, encode_retrieval_set
from eval.towers.named_models import parse_models
from longclip_teacher.atomic_files import atomic_file
from longclip_teacher.text import CaptionTokenizer

_RIGHT, _WRONG, _INK, _UNREAD = "#1a7f4b", "#b3372f", "#282c34", "#b3372f"
_WIDTH, _MARGIN, _LINE = 9.0, 0.2, 0.21  # inches
_CHARACTERS = 116  # per line of the caption
_DPI = 150


def main() -> None:
    """Encode the set with each model, choose a caption, draw it."""
    options = read_options(Options)
    found = load_retrieval_set(options.protocol, options.root)
    encoded, contexts = {}, {}
    for name, named in parse_models(options.models).items():
        model = named.settings.load(named.checkpoints[0], "cpu")
        encoded[name], contexts[name] = encode_retrieval_set(model, found), model.context_length
    first = {name: _first_pictures(one) for name, one in encoded.items()}
    (reference, *_) = encoded.values()
    number = options.caption if options.caption is not None else _telling(first, reference)
    if not 0 <= number < len(reference.captions):
        raise InputError(f"--caption {number}: the set has captions 0 to {len(reference.captions) - 1}")
    figure = _draw(number, encoded, first, min(contexts.values()))
    with atomic_file(options.out) as temporary:
        figure.savefig(temporary, dpi=_DPI)
    plain_console(soft_wrap=True).print(f"caption {number} of {len(reference.captions)}: {options.out}")


def _first_pictures(encoded: EncodedSet) -> torch.Tensor:
    """The picture that is ranked first for each caption [M]."""
    return (encoded.text_features @ encoded.image_features.T).argmax(dim=1)


def _telling(first: dict[str, torch.Tensor], encoded: EncodedSet) -> int:
    """The first caption for which every model but the last is right, and the last is wrong."""
    *right, last = (ranked == encoded.caption_image for ranked in first.values())
    told = torch.stack([*right, ~last]).all(dim=0)
    if not told.any():
        raise InputError("no caption tells these models apart: choose one with --caption")
    return int(told.nonzero()[0])


def _draw(number: int, encoded: dict[str, EncodedSet], first: dict[str, torch.Tensor], fewest: int) -> Figure:
    (reference, *_) = encoded.values()
    lines = textwrap.wrap(reference.captions[number], _CHARACTERS)
    side = (_WIDTH - _MARGIN * (len(encoded) + 1)) / len(encoded)
    height = _LINE * (len(lines) + 1) + side + 1.25
    figure = Figure(figsize=(_WIDTH, height))
    _draw_caption(figure, lines, reference.captions[number], fewest)
    for column, (name, one) in enumerate(encoded.items()):
        left = _MARGIN + column * (side + _MARGIN)
        axes = figure.add_axes((left / _WIDTH, 0.4 / height, side / _WIDTH, side / height))
        chosen, own = int(first[name][number]), int(one.caption_image[number])
        share = 100 * float((first[name] == one.caption_image).double().mean())
        _draw_picture(axes, one, chosen, is_right=chosen == own)
        axes.set_title(f"{name}\nright for {share:.1f}% of the captions", fontsize=10, color=_INK, linespacing=1.4)
    return figure


def _draw_caption(figure: Figure, lines: list[str], caption: str, fewest: int) -> None:
    """The caption, with what a model of the fewest tokens does not read in another colour, and a line that says so."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    left, top = _MARGIN / _WIDTH, 1 - _MARGIN / figure.get_figheight()
    read = _characters_read(caption, fewest)
    for number, line in enumerate(lines):
        own = max(0, min(len(line), read))
        read -= len(line) + 1
        y = top - number * _LINE / figure.get_figheight()
        style = {"va": "top", "fontsize": 9.5}
        shown = figure.text(left, y, line[:own], color=_INK, **style)
        end = shown.get_window_extent(renderer).x1 / (figure.get_figwidth() * figure.dpi) if own else left
        figure.text(end, y, line[own:], color=_UNREAD, **style)
    y = top - len(lines) * _LINE / figure.get_figheight()
    if read < 0:
        unread = f"A model that reads {fewest} tokens does not see the words in red."
        figure.text(left, y, unread, color=_UNREAD, va="top", fontsize=8, style="italic")


def _characters_read(caption: str, context_length: int) -> int:
    """How much of the caption the first `context_length` tokens hold, the end token among them."""
    tokenizer = CaptionTokenizer(4 * len(caption) + 2)
    words = caption.split(" ")
    for count in range(len(words), 0, -1):
        if int((tokenizer([" ".join(words[:count])]) != 0).sum()) <= context_length:
            return len(" ".join(words[:count]))
    return 0


def _draw_picture(axes: Axes, encoded: EncodedSet, row: int, *, is_right: bool) -> None:
    axes.imshow(open_image(encoded.images[row]), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    colour = _RIGHT if is_right else _WRONG
    for spine in axes.spines.values():
        spine.set(edgecolor=colour, linewidth=3)
    axes.set_xlabel("right" if is_right else "wrong", color=colour, fontsize=10)


if __name__ == "__main__":
    run_command(main)
