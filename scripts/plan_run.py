"""Plan a distillation run: the size of the teacher cache, GPU-hours with and without it, and when it pays off."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from eval.base.arguments import answer_early, read_options
from longclip_teacher.errors import InputError, run_command
from training.settings.captions import NO_SAMPLING

_DRAWN_SENTENCES = NO_SAMPLING.sub_captions


@dataclass
class Options:
    """Estimate what a teacher cache and the run that uses it cost, before you start either.

    python scripts/plan_run.py --teacher b16 --student s0 --views 1 --epochs 30 --gpus 8
    python scripts/plan_run.py --samples 1.28e9
    python scripts/plan_run.py --teacher l14 --samples 12000000 --views 5 --epochs 10 --json plan.json \\
        --teacher-images-per-second 2100 --teacher-captions-per-second text.json:'mean 56' \\
        --student-samples-per-second step.json:L/14

    The three rates are per GPU. Give a number, or FILE.json:CASE for the row whose case contains CASE in a file that
    scripts/bench.py wrote (--json). A missing rate is computed from the model's FLOPs, --gpu-tflops and an assumed
    utilisation, which is printed. Measure before you trust it.

    The table shows the size of the cache (and of DataCompDR's, which keeps 30 views and two teachers), GPU-hours of the
    teacher's pass and of the training, with the cache and with the teacher online, and the number of epochs at which
    both cost the same. Further runs from the same cache pay nothing for their teacher. A second table shows the hours
    of the teacher's pass on GPUs of several kinds, unless a rate of the teacher is given.
    """

    teacher: str = "b16"
    """tiny, small, b16 or l14."""
    student: str = "s0"
    """s0, s1, s2, b, mobileclip2_s0/s2/s3/s4/b/l14, small or tiny."""
    samples: float | None = None
    """Samples in the data set, such as 1.28e9. Default: 1.2 million, 12 million and 1.28 billion."""
    views: int = 1
    """A, the crops stored per picture; 0 is the centre crop."""
    epochs: float = 10.0
    """Passes over the data."""
    gpus: int = 1
    """GPUs, for the days of wall-clock time."""
    captions: float = 2.0
    """Distinct captions stored per sample, long and short together."""
    caption_views: int = 0
    """V, the sampled captions stored per sample in place of its short one; 0 stores the short one itself."""
    sentences: float = 0.0
    """Sentences of long captions stored one by one per sample (cache_teacher.py --sentences), such as 6; 0 stores
    none."""
    mean_caption_tokens: float = 60.0
    """Mean length of a caption in tokens, including start and end."""
    rand_augment_ops: int = 0
    """RandAugment operations per view."""
    teacher_images_per_second: str | None = None
    """Pictures per second that the teacher encodes: a number or FILE.json:CASE."""
    teacher_captions_per_second: str | None = None
    """Captions per second that the teacher encodes, without padding."""
    student_samples_per_second: str | None = None
    """Samples per second that the student trains on with stored features."""
    gpu_tflops: float = 312.0
    """Peak of one GPU in 1e12 operations per second: 312 for an A100 in bfloat16, 989 for an H100."""
    teacher_utilisation: float = 0.15
    """Assumed share of the peak that the teacher's forward pass reaches: that of B/16 in bf16 on one H200."""
    student_utilisation: float = 0.02
    """Assumed share of the peak in training: that of S0 in bf16 on one H200. Small convolutions do not fill it."""
    json: Path | None = None
    """Write all figures to this file as JSON."""

    @property
    def stored_captions(self) -> float:
        """Distinct captions stored per sample. Sampled ones that happen to be alike are counted as if they were not."""
        return self.captions - 1 + self.caption_views if self.caption_views else self.captions

    @property
    def sentence_tokens(self) -> float:
        """Mean length of a sentence in tokens, including start and end.

        The sentences of a sample have the words of its long caption. Its other captions are taken as as long as one of
        them. Together they have `mean_caption_tokens` per caption.
        """
        others = max(self.captions - 1, 0)
        return ((1 + others) * self.mean_caption_tokens + 2 * self.sentences - 2) / (self.sentences + others)

    def in_captions(self, sentences: float) -> float:
        """Return how many captions of the mean length have as many tokens as so many sentences."""
        return sentences * self.sentence_tokens / self.mean_caption_tokens if sentences else 0.0

    @property
    def drawn_captions(self) -> float:
        """Captions that a step reads per sample, in captions of the mean length: a long one, a short one, and the
        sentences that losses of sub-captions draw."""
        return 2 + self.in_captions(_DRAWN_SENTENCES if self.sentences else 0)

    def check(self) -> None:
        """Raise InputError for impossible options."""
        if min(self.views, self.caption_views, self.rand_augment_ops) < 0:
            raise InputError("--views, --caption-views and --rand-augment-ops must be 0 or more")
        if self.caption_views and self.captions < 2:
            raise InputError(f"--caption-views {self.caption_views} takes the place of a short caption: --captions 2")
        if self.sentences and not 1 <= self.sentences < math.inf:
            raise InputError(f"--sentences {self.sentences}: give 1 or more, or 0 to store none")
        for name in ("samples", "epochs", "gpus", "captions", "gpu_tflops"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"--{name.replace('_', '-')} {value}: give a positive number")
        if self.samples is not None and self.samples % 1:
            raise InputError(f"--samples {self.samples}: give a whole number")
        if not (0 < self.teacher_utilisation <= 1 and 0 < self.student_utilisation <= 1):
            raise InputError("--teacher-utilisation and --student-utilisation are shares, above 0 and up to 1")
        from longclip_teacher.config import TEACHERS
        from longclip_teacher.text import CONTEXT_LENGTH
        from mobileclip_student import VARIANTS

        if not 2 <= self.mean_caption_tokens <= CONTEXT_LENGTH:
            raise InputError(f"--mean-caption-tokens {self.mean_caption_tokens}: 2 (start and end) to {CONTEXT_LENGTH}")
        for name, value, known in (("teacher", self.teacher, TEACHERS), ("student", self.student, VARIANTS)):
            if value not in known:
                raise InputError(f"--{name} {value}: choose one of {', '.join(known)}")


if __name__ == "__main__":
    answer_early(Options)  # --help and refused options end here: the imports below take seconds

from eval.base.consoles import plain_console
from longclip_teacher.atomic_files import write_json
from longclip_teacher.config import TEACHERS
from plan_rates import Rates, find_rates

_SAMPLES = (1_200_000, 12_000_000, 1_280_000_000)  # ShareGPT4V, DataCompDR-12M, DataCompDR-1B
_DATACOMPDR_BYTES = (30 + 1 + 5) * 1536 * 2  # 30 views, 1 + 5 captions, two teachers of 768, bfloat16
_GPUS = {"T4": 65, "L4": 121, "RTX 4090": 165, "L40S": 362, "A100": 312, "H100, H200": 989}
"""Peaks in 1e12 operations per second by the makers' data sheets: bfloat16, float16 on a T4, without sparsity."""
_KEY_BYTES = 12  # length of a sample's key


@dataclass(frozen=True)
class Plan:
    """The figures for one data set size; hours are GPU-hours."""

    samples: int
    cache_bytes: float
    datacompdr_bytes: float
    teacher_hours_cache: float
    teacher_hours_online: float
    training_hours: float
    total_hours_cache: float
    total_hours_online: float
    days_cache: float
    """Wall-clock days on all GPUs."""
    days_online: float


def sidecar_bytes_per_sample(
    embed_dim: int,
    views: int,
    captions: float,
    mean_tokens: float,
    num_ops: int = 0,
    sentences: float = 0.0,
    sentence_tokens: float = 0.0,
    key_bytes: float = _KEY_BYTES,
) -> float:
    """Return the bytes per sample in a sidecar (training/cache/sidecar.py), without its header.

    A view has its features (float16), crop, flip, operations and checksum; a distinct caption or sentence its features,
    tokens, row numbers, offset and checksum; a sample its key, picture's size and checksum, two flags and two offsets,
    or three with sentences.
    """
    of_a_view = 2 * embed_dim + 4 * 4 + 1 + (1 + 4) * num_ops + 4
    of_a_caption = 2 * embed_dim + 4 + 8 + 4  # without its tokens
    texts = (captions + sentences) * of_a_caption + 2 * (captions * mean_tokens + sentences * sentence_tokens)
    return max(views, 1) * of_a_view + texts + key_bytes + 8 + 4 + 1 + 1 + 2 * 8 + 8 * bool(sentences)


def break_even_epochs(options: Options, rates: Rates) -> float:
    """Return the number of epochs after which making the cache has cost as much as the teacher online."""
    return _cache_seconds(options, rates) / _online_seconds(options, rates)


def plan(options: Options, rates: Rates, samples: int) -> Plan:
    """Compute the figures for `samples` samples."""
    of_a_sample = sidecar_bytes_per_sample(
        TEACHERS[options.teacher].embed_dim,
        options.views,
        options.stored_captions,
        options.mean_caption_tokens,
        options.rand_augment_ops,
        options.sentences,
        options.sentence_tokens if options.sentences else 0.0,
    )
    teacher_cache = samples * _cache_seconds(options, rates) / 3600
    teacher_online = options.epochs * samples * _online_seconds(options, rates) / 3600
    training = options.epochs * samples / rates.student_samples.per_second / 3600
    return Plan(
        samples=samples,
        cache_bytes=samples * of_a_sample,
        datacompdr_bytes=float(samples * _DATACOMPDR_BYTES),
        teacher_hours_cache=teacher_cache,
        teacher_hours_online=teacher_online,
        training_hours=training,
        total_hours_cache=teacher_cache + training,
        total_hours_online=teacher_online + training,
        days_cache=(teacher_cache + training) / options.gpus / 24,
        days_online=(teacher_online + training) / options.gpus / 24,
    )


def hours_by_gpu(options: Options, plans: list[Plan]) -> dict[str, list[float]]:
    """Return the hours of the teacher's pass on one GPU of each kind, for each plan. Empty if a rate was given, which
    holds for one kind alone."""
    if options.teacher_images_per_second is not None or options.teacher_captions_per_second is not None:
        return {}
    return {
        kind: [one.teacher_hours_cache * options.gpu_tflops / tflops for one in plans] for kind, tflops in _GPUS.items()
    }


def _cache_seconds(options: Options, rates: Rates) -> float:
    """Return the seconds of one GPU per cached sample."""
    captions = options.stored_captions + options.in_captions(options.sentences)
    return max(options.views, 1) / rates.teacher_images.per_second + captions / rates.teacher_captions.per_second


def _online_seconds(options: Options, rates: Rates) -> float:
    """Return the seconds of one GPU per sample and epoch."""
    return 1 / rates.teacher_images.per_second + options.drawn_captions / rates.teacher_captions.per_second


# --- output -----------------------------------------------------------------------------------------------------------


def print_plans(options: Options, rates: Rates, plans: list[Plan]) -> None:
    """Print the table, one column per data set size, and the assumptions below it."""
    console = plain_console()
    title = f"teacher {options.teacher}, student {options.student}, A = {options.views}, {options.epochs:g} epochs"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for one in plans:
        table.add_column(_count_text(one.samples), justify="right")
    cells: list[tuple[str, Callable[[Plan], str]]] = [
        ("cache, bytes per sample", lambda one: f"{one.cache_bytes / one.samples:,.0f}"),
        ("cache", lambda one: _bytes_text(one.cache_bytes)),
        ("DataCompDR (30 views, bf16)", lambda one: _bytes_text(one.datacompdr_bytes)),
        ("teacher pass, GPU-hours", lambda one: _hours_text(one.teacher_hours_cache)),
        ("teacher online, GPU-hours", lambda one: _hours_text(one.teacher_hours_online)),
        ("training, GPU-hours", lambda one: _hours_text(one.training_hours)),
        ("total with the cache, GPU-hours", lambda one: _hours_text(one.total_hours_cache)),
        ("total online, GPU-hours", lambda one: _hours_text(one.total_hours_online)),
        (f"days on {options.gpus} GPUs with the cache", lambda one: f"{one.days_cache:,.2f}"),
        (f"days on {options.gpus} GPUs online", lambda one: f"{one.days_online:,.2f}"),
    ]
    for label, cell in cells:
        table.add_row(label, *(cell(one) for one in plans))
    console.print(table)
    by_gpu = hours_by_gpu(options, plans)
    if by_gpu:
        title = f"teacher pass, hours of one GPU at {options.teacher_utilisation:.0%} of its peak (assumed)"
        table = Table(title=title, title_justify="left")
        table.add_column("")
        for one in plans:
            table.add_column(_count_text(one.samples), justify="right")
        for kind, hours in by_gpu.items():
            table.add_row(f"{kind} ({_GPUS[kind]} TFLOP/s)", *map(_hours_text, hours))
        table.add_row("bytes written", *(_bytes_text(one.cache_bytes) for one in plans))
        console.print(table)
    for line in (
        f"cache and online cost the same at {break_even_epochs(options, rates):.2f} epochs",
        *_basis(options, rates),
    ):
        console.print(line, soft_wrap=True)


def _basis(options: Options, rates: Rates) -> list[str]:
    """Return the assumptions, one per line."""
    lines = [
        f"{rates.teacher_images.per_second:,.0f} pictures/s per GPU, teacher ({rates.teacher_images.origin})",
        f"{rates.teacher_captions.per_second:,.0f} captions/s per GPU, teacher ({rates.teacher_captions.origin})",
        f"{rates.student_samples.per_second:,.0f} samples/s per GPU, student ({rates.student_samples.origin})",
        f"{options.stored_captions:g} distinct captions of {options.mean_caption_tokens:g} tokens per sample",
    ]
    drawn = ""
    if options.sentences:
        lines.append(
            f"{options.sentences:g} sentences of {options.sentence_tokens:.1f} tokens per sample, which make up its "
            "long caption if a short one is as long as a sentence; the teacher's time goes by tokens"
        )
        drawn = f", and {_DRAWN_SENTENCES} sentences"
    lines += [
        "GPU-hours count only arithmetic: no loading, evaluation or restarts, and linear scaling over GPUs",
        f"an online teacher encodes one view and two captions{drawn} of each sample per epoch, on the same GPUs",
        f"a step of the student reads one view, one long and one short caption{drawn} per sample",
    ]
    if options.epochs > max(options.views, 1):
        lines.append(f"{max(options.views, 1)} stored views for {options.epochs:g} epochs: training repeats them")
    if options.epochs > options.caption_views > 0:
        lines.append(f"{options.caption_views} sampled captions for {options.epochs:g} epochs: training repeats them")
    return lines


def _count_text(samples: int) -> str:
    for size, name in ((10**9, "billion"), (10**6, "million")):
        if samples >= size:
            return f"{samples / size:.4g} {name}"
    return f"{samples:,}"


def _bytes_text(num_bytes: float) -> str:
    for size, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {name}"
    return f"{num_bytes / 1e3:.3g} kB"


def _hours_text(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def main() -> None:
    """Run the command."""
    options = read_options(Options)
    rates = find_rates(options)
    plans = [plan(options, rates, samples) for samples in ((int(options.samples),) if options.samples else _SAMPLES)]
    if options.json is not None:
        figures = {
            "options": {name: value for name, value in asdict(options).items() if name != "json"},
            "rates": asdict(rates),
            "bytes_per_sample": plans[0].cache_bytes / plans[0].samples,
            "datacompdr_bytes_per_sample": _DATACOMPDR_BYTES,
            "break_even_epochs": break_even_epochs(options, rates),
            "assumptions": _basis(options, rates),
            "plans": [asdict(one) for one in plans],
            "pass_hours_by_gpu": hours_by_gpu(options, plans),
        }
        write_json(options.json, figures)
    print_plans(options, rates, plans)


if __name__ == "__main__":
    run_command(main)
