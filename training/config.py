"""The configuration of a run: one typed tree, TOML presets, command-line overrides.

A preset is a TOML file with the sections below; it is turned into the same `--section.field value` arguments that a
user may type after it, so presets and command line are read by one parser and later values win.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_type_hints

import tomli_w
import tyro

from longclip_teacher.errors import InputError
from training.transforms import AugmentConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "PRESETS",
    "DataOptions",
    "LossOptions",
    "OptimOptions",
    "RunOptions",
    "SpeedOptions",
    "StudentOptions",
    "TeacherOptions",
    "TrainConfig",
    "config_from_toml",
    "config_to_toml",
    "parse_config",
]

PRESETS = Path(__file__).parent / "presets"
DEFAULT_PRESET = "digit_scenes"
EMBEDDED_DATA = Path("data/digit_scenes")
EMBEDDED_TEACHER = "runs/tiny_teacher"


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where the run lives and how it is executed."""

    out_dir: Path = Path("runs/distill")
    """Folder of the run: configuration, log, checkpoints, weights, report."""
    train: Literal["student", "teacher"] = "student"
    """Which model is trained: the student (with or without distillation) or a Long-CLIP teacher."""
    resume: str = "never"
    """never: refuse a folder that holds a run. auto: go on from its last checkpoint if there is one. Or a checkpoint
    file."""
    seed: int = 0
    """Seed of the initial weights, the order of the samples, the augmentations and drop path."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast of the towers; losses and PCA are float32 always. fp16 scales the gradient (GradScaler)."""
    global_batch_size: int = 128
    """Pairs a step over all processes; the contrastive losses compare all of them."""
    accumulation: int = 1
    """Chunks in which a process runs its share of the batch: less memory, one extra forward pass, the same gradient."""
    epochs: float = 1.0
    """Passes over the data, when max_steps is not given."""
    max_steps: int | None = None
    """Steps in all; overrides epochs."""
    sync_bn: bool = False
    """Compute BatchNorm statistics over all processes (GPU only); otherwise each process has its own."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl, TensorBoard and the console."""
    eval_every: int = 0
    """Steps between evaluations on data.val; 0: at the end alone."""
    save_every: int = 500
    """Steps between writes of the last checkpoint."""
    keep_every: int = 0
    """Steps between checkpoints that are kept (checkpoints/step_N.pt); 0: none but last and best."""

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "accumulation", "log_every", "save_every"):
            _require(getattr(self, name) >= 1, f"--run.{name} must be at least 1, got {getattr(self, name)}")
        _require(
            self.max_steps is None or self.max_steps >= 1, f"--run.max_steps must be at least 1, got {self.max_steps}"
        )
        _require(self.epochs > 0, f"--run.epochs must be positive, got {self.epochs}")


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Training shards and the sets on which the run is judged."""

    shards: tuple[str, ...] = (f"{EMBEDDED_DATA}/train/*.tar",)
    """Shard patterns: local paths with * or {000..123}, https:// and s3:// URLs."""
    val: Path | None = EMBEDDED_DATA / "val_twins"
    """Retrieval set for the periodic evaluation; the best checkpoint has the best mean of its I2T and T2I R@1."""
    val_protocol: str = "folder"
    """Protocol of data.val (python eval/retrieval.py --protocol list)."""
    tests: tuple[str, ...] = (f"twins=folder:{EMBEDDED_DATA}/twins", f"random=folder:{EMBEDDED_DATA}/random")
    """Retrieval sets evaluated once at the end, as NAME=PROTOCOL:FOLDER."""
    zeroshot: Path | None = EMBEDDED_DATA / "digits/val"
    """Folder of one folder of pictures a class, classified with text at every evaluation."""
    zeroshot_classnames: Path | None = EMBEDDED_DATA / "digits/classnames.txt"
    """Class names, a line each in the sorted order of the class folders; without it the folders' names."""
    zeroshot_templates: str = f"{EMBEDDED_DATA}/digits/templates.txt"
    """Prompts: openai (80), simple (7), a file with a line each, or one template such as "a photo of a {}."."""
    num_workers: int = 2
    """Loader processes for each training process; 0 loads in the training process."""
    max_bad_share: float = 0.01
    """Share of samples that may be unreadable before the run stops."""
    shuffle_shards: int = 64
    """Shards whose samples are permuted together: more mixes better, fewer reads more locally."""
    epoch_samples: int | None = None
    """Samples that count as an epoch: needed when shards are streamed from a URL; shortens an epoch otherwise."""


@dataclasses.dataclass(frozen=True)
class TeacherOptions:
    """The frozen teacher, or with run.train = teacher the teacher to be trained."""

    checkpoint: str | None = EMBEDDED_TEACHER
    """Frozen teacher to distil from: weight file, run folder or hub name (longclip-b, longclip-l). None: no
    distillation."""
    activation: Literal["gelu", "quickgelu"] | None = None
    """Activation of open_clip-layout weights, which do not record it."""
    variant: str = "tiny"
    """With run.train = teacher and no init: architecture built from scratch (tiny, small, b16, l14)."""
    init: str | None = None
    """With run.train = teacher: CLIP or Long-CLIP weights to start from; 77 positions are stretched to 248."""
    cache: str | None = None
    """Stored teacher features (scripts/cache_teacher.py): the folder of the sidecars, or "datacompdr" where the shards
    themselves hold them. The teacher is then not loaded; checkpoint None accepts the cache's, whichever it is."""
    stored_features: bool = True
    """With cache. False: replay the stored crops and captions but run the teacher on them, to check a cache."""
    stored_widths: tuple[int, ...] | None = None
    """With cache datacompdr: widths of the teachers whose features stand side by side; None: one teacher, or two of 768
    in 1536."""


@dataclasses.dataclass(frozen=True)
class StudentOptions:
    """The student."""

    variant: str = "tiny"
    """s0, s1, s2, b, mobileclip2_s0/s2/s3/s4/b/l14, small or tiny."""
    init: str | None = None
    """Weights to start from: official MobileCLIP files, hub names, or our own. Apple's weights are for research
    only."""
    context_length: int = 248
    """Tokens the student reads; longer captions are cut, EOT kept."""
    pad_mask: bool = True
    """Make pads invisible to attention, convolution and BatchNorm. False: as MobileCLIP was published."""


@dataclasses.dataclass(frozen=True)
class OptimOptions:
    """AdamW with linear warm-up and cosine decay."""

    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.2
    """Decay of matrices and convolutions; biases, norms, scales, positions and the logit scale have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averaging factors."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    warmup_steps: int = 1000
    """Steps of linear warm-up; never more than a tenth of the run."""
    min_lr_share: float = 0.0
    """Learning rate at the end as a share of the peak."""
    clip_grad_norm: float | None = 1.0
    """Largest norm of the whole gradient; None: no clipping."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"--optim.lr must be positive, got {self.lr}")


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """Weights (0: off) and settings of the losses. "Short" losses use short captions and PCA'd image features."""

    clip_long: float = 0.8
    """ITC of images and long captions."""
    clip_short: float = 0.4
    """ITC of PCA'd images and short captions."""
    crd_long: float = 1.5
    """KL from the teacher's to the student's image-text distributions, long captions."""
    crd_short: float = 0.5
    """The same with short captions; both sides' image features PCA'd on the same batch."""
    fd: float = 0.0
    """Squared distance to the teacher's features (image, long, short), through a learned map where widths differ."""
    label_smoothing: float = 0.1
    """Label smoothing of the ITC losses."""
    teacher_scale: float | None = None
    """Linear logit scale of the teacher's distributions; None: the teacher's own."""
    pca_rank: int = 32
    """Components that PCA keeps."""
    pca_scope: Literal["global", "rank", "off"] = "global"
    """PCA over the global batch, over each process' share (as Long-CLIP published it), or none."""
    share_identical_captions: bool = False
    """Let samples with the same caption share the target of the ITC losses instead of being negatives."""
    init_logit_scale: float | None = None
    """Linear logit scale at the start; None: the model's (1 / 0.07 from scratch)."""

    def __post_init__(self) -> None:
        _require(self.pca_rank >= 1, f"--loss.pca_rank must be at least 1, got {self.pca_rank}")
        weights = (self.clip_long, self.clip_short, self.crd_long, self.crd_short, self.fd)
        _require(
            min(weights) >= 0 and max(weights) > 0,
            "loss weights must not be negative, and one of them must be positive",
        )

    @property
    def distils(self) -> bool:
        """True if any loss needs a teacher."""
        return max(self.crd_long, self.crd_short, self.fd) > 0

    @property
    def uses_short(self) -> bool:
        """True if short captions are encoded at all."""
        return max(self.clip_short, self.crd_short) > 0


@dataclasses.dataclass(frozen=True)
class SpeedOptions:
    """What makes a run faster and leaves its results alone, within the tolerance named. All are on but compile."""

    fast_decode: bool = True
    """Decode and resize JPEGs with torchvision; False: with PIL. Pixels equal to 1 level in 255 (bilinear) or 2
    (bicubic), on average to 0.02."""
    fast_tokenizer: bool = True
    """Remember the tokens of words; False: open_clip's SimpleTokenizer. The ids are the same."""
    trim: bool = True
    """Compute only real tokens; False: captions padded to 248 in both text towers. Features equal to 1e-5."""
    streaming_losses: bool = True
    """Contrastive and KL losses in blocks of rows, shared among the processes; False: full matrices in each. Losses and
    gradients equal to 1e-5."""
    channels_last: bool = True
    """Image tower in channels-last memory format where that is faster. Features equal to rounding."""
    fused_adamw: bool = True
    """AdamW in one kernel. Weights equal to rounding."""
    keep_memory: bool = True
    """On Linux, keep freed memory in the process instead of giving it back after each operation. Changes no figure."""
    compile: bool = False
    """torch.compile of the towers: minutes at the start, on a CPU many; meant for GPUs. Features and gradients equal to
    rounding."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run; saved beside it as config.toml."""

    run: RunOptions = dataclasses.field(default_factory=RunOptions)
    data: DataOptions = dataclasses.field(default_factory=DataOptions)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    teacher: TeacherOptions = dataclasses.field(default_factory=TeacherOptions)
    student: StudentOptions = dataclasses.field(default_factory=StudentOptions)
    optim: OptimOptions = dataclasses.field(default_factory=OptimOptions)
    loss: LossOptions = dataclasses.field(default_factory=LossOptions)
    speed: SpeedOptions = dataclasses.field(default_factory=SpeedOptions)

    @property
    def distils(self) -> bool:
        """True if this run has a teacher, loaded or stored."""
        has_teacher = self.teacher.checkpoint is not None or self.teacher.cache is not None
        return self.run.train == "student" and has_teacher and self.loss.distils

    @property
    def runs_teacher(self) -> bool:
        """True if the frozen teacher itself is run in the training step."""
        return self.distils and not (self.teacher.cache is not None and self.teacher.stored_features)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain values by section and field, paths as strings."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


def parse_config(args: Sequence[str]) -> TrainConfig:
    """Configuration from `[PRESET] [--section.field VALUE ...]`; the preset is a TOML file or the name of one of ours.

    Raises InputError in one line for an unknown preset, key or value. `--help` prints every field and exits.
    """
    args = list(args)
    preset = args.pop(0) if args and not args[0].startswith("-") else DEFAULT_PRESET
    preset_args = _toml_arguments(_preset_path(preset))
    for arg in args:
        if arg.startswith("--") and arg != "--help":
            _check_key(arg[2:].split("=")[0].replace("-", "_"), "the command line")
    return _parse(args, default=_parse(preset_args))


def config_from_toml(path: Path) -> TrainConfig:
    """Configuration of a TOML file alone, such as the config.toml of a finished run."""
    return _parse(_toml_arguments(path))


def config_to_toml(config: TrainConfig) -> str:
    """The whole configuration as a preset that reads back to the same values; None is written as "None"."""
    sections = {
        section: {name: "None" if value is None else value for name, value in fields.items()}
        for section, fields in config.to_dict().items()
    }
    return tomli_w.dumps(sections)


def _parse(args: list[str], default: TrainConfig | None = None) -> TrainConfig:
    errors = io.StringIO()
    description = (
        "Train a student from a teacher, or a teacher. Usage: [torchrun --nproc_per_node=N] training/main.py [PRESET] "
        f"[--section.field VALUE ...]. Presets: {', '.join(sorted(p.stem for p in PRESETS.glob('*.toml')))}, or a "
        f"TOML file; without one, {DEFAULT_PRESET}. Defaults shown below are the preset's."
    )
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                TrainConfig,
                args=args,
                default=default or TrainConfig(),
                prog="training/main.py",
                description=description,
                use_underscores=True,
                config=(tyro.conf.FlagConversionOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        words = re.sub(r"[^\x20-\x7e]+", " ", errors.getvalue())
        raise InputError(f"configuration: {' '.join(words.split())}") from None


def _preset_path(preset: str) -> Path:
    for path in (Path(preset), PRESETS / preset, PRESETS / f"{preset}.toml"):
        if path.is_file():
            return path
    names = sorted(path.stem for path in PRESETS.glob("*.toml"))
    near = difflib.get_close_matches(Path(preset).stem, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InputError(f"no preset {preset}{hint} (a TOML file, or one of {', '.join(names)})")


def _toml_arguments(path: Path) -> list[str]:
    """The values of a TOML preset as command-line arguments."""
    try:
        sections = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}") from None
    args: list[str] = []
    for section, fields in sections.items():
        if not isinstance(fields, dict):
            _check_key(section, str(path))
            raise InputError(f"{path}: {section} is a section, write [{section}] and its fields below")
        for name, value in fields.items():
            _check_key(f"{section}.{name}", str(path))
            values = value if isinstance(value, list) else [value]
            args += [f"--{section}.{name}", *(str(item) for item in values)]
    return args


def _check_key(key: str, where: str) -> None:
    known = list(_keys())
    if key not in known:
        same_name = [other for other in known if other.split(".")[1] == key.split(".")[-1]]
        near = same_name or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        raise InputError(f"{where}: there is no {key}{f'; did you mean {near[0]}?' if near else ''}")


def _keys() -> Iterator[str]:
    for section, kind in get_type_hints(TrainConfig).items():
        for field in dataclasses.fields(kind):
            yield f"{section}.{field.name}"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)
