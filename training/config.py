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
    "FEATURE_LOSSES",
    "LAYER_LOSSES",
    "PAIR_LOSSES",
    "PRESETS",
    "DataOptions",
    "InitOptions",
    "LossOptions",
    "MixOptions",
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
EMBEDDED_CACHE = f"{EMBEDDED_TEACHER}/cache"


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where the run lives and how it is executed."""

    out_dir: Path = Path("runs/distill")
    """Folder of the run: configuration, log, checkpoints, weights, report."""
    train: Literal["student", "teacher"] = "student"
    """Which model is trained: the student (with or without distillation) or a Long-CLIP teacher."""
    stage: Literal["both", "image", "text"] = "both"
    """both: the two towers together. image, text: one tower of the student alone learns the teacher's features, from
    pictures without captions or captions without pictures; only that tower of the teacher is loaded."""
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
    images: Path | None = None
    """With run.stage image: a folder of pictures, searched through, instead of shards. Captions are not needed."""
    captions: tuple[str, ...] = ()
    """With run.stage text: caption files or patterns of them instead of shards: COCO captions or ShareGPT4V (.json),
    Conceptual Captions (.tsv), a caption a line (.txt)."""
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
    ensemble: tuple[str, ...] = ()
    """More frozen teachers beside the first: features side by side, distributions averaged."""
    short: str | None = None
    """Another frozen teacher for short captions (and the pictures they go with), such as the CLIP before it learnt to
    read long ones, at its own 77 tokens and without PCA. None: the first teacher reads both."""
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
    """s0, s1, s2, b, mobileclip2_s0/s2/s3/s4/b/l14, vit_s, vit_b, small, tiny or vit_tiny. Fields below change it."""
    init: str | None = None
    """Weights to start from: official MobileCLIP files, hub names, or our own. Apple's weights are for research
    only."""
    context_length: int = 248
    """Tokens the student reads; longer captions are cut, EOT kept."""
    pad_mask: bool = True
    """Make pads invisible to attention, convolution and BatchNorm. False: as MobileCLIP was published."""
    embed_dim: int | None = None
    """Width of the features. None: the variant's; with run.stage image or text the teacher's, so that each tower
    lives in the teacher's space and the two fit together; that of init.image or init.text where one is given."""
    image_size: int | None = None
    """Side of the pictures in pixels. None, here and below: as the variant has it."""
    image_patch: int | None = None
    """ViT: side of a patch in pixels."""
    image_width: int | None = None
    """ViT: channels of a token."""
    image_layers: int | None = None
    """ViT: transformer blocks."""
    image_heads: int | None = None
    """ViT: attention heads."""
    distillation_token: bool | None = None
    """ViT: a second class token that answers to the teacher alone (DeiT); features are averaged at inference."""
    drop_path: float | None = None
    """Share of residual branches of the image tower that are dropped in training, rising with depth."""
    text_tower: Literal["hybrid", "base", "causal", "longclip"] | None = None
    """hybrid: RepMixer, attention, RepMixer. base: attention both ways. causal: attention to what stands before.
    longclip: Long-CLIP's own text tower (with init.text: its weights)."""
    text_width: int | None = None
    """Channels of a token."""
    text_layers: int | None = None
    """Attention layers."""
    text_heads: int | None = None
    """Attention heads."""


@dataclasses.dataclass(frozen=True)
class InitOptions:
    """Where the towers of the student start, when student.init gives none for the whole."""

    image: str | None = None
    """A student (file, run folder, hub name) whose image tower is taken; or timm: the weights that timm has of this
    tower (of a ViT DeiT's, trained on ImageNet; of a published tower MobileCLIP's or a CLIP's)."""
    text: str | None = None
    """A student whose text tower is taken; or a Long-CLIP, for a base, causal or longclip text tower of its width."""
    freeze_image: bool = False
    """Leave the image tower as it starts."""
    freeze_text: bool = False
    """Leave the text tower as it starts."""
    truncated_normal: bool = False
    """From scratch: linear layers and embeddings drawn from a normal distribution of deviation 0.02 cut at two."""


@dataclasses.dataclass(frozen=True)
class OptimOptions:
    """AdamW with linear warm-up, its decay, and the average of the weights."""

    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.2
    """Decay of matrices and convolutions; biases, norms, positions, class tokens and the logit scale have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averaging factors."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    warmup_steps: int = 1000
    """Steps of linear warm-up; never more than a tenth of the run."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up. cosine: down to the end. constant: at the peak until the cool-down, then linearly down."""
    cooldown_share: float = 0.2
    """Share of the run in which a constant rate cools down."""
    layer_decay: float = 1.0
    """Factor of the learning rate from each block of a tower to the one before it; 1: all learn alike."""
    image_lr_share: float = 1.0
    """Learning rate of the image tower over that of the rest."""
    text_lr_share: float = 1.0
    """Learning rate of the text tower over that of the rest."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, which is then what is evaluated and saved. None: none."""
    min_lr_share: float = 0.0
    """Learning rate at the end as a share of the peak."""
    clip_grad_norm: float | None = 1.0
    """Largest norm of the whole gradient; None: no clipping."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"--optim.lr must be positive, got {self.lr}")
        _require(self.ema is None or 0 < self.ema < 1, f"--optim.ema must lie between 0 and 1, got {self.ema}")
        _require(0 < self.layer_decay <= 1, f"--optim.layer_decay must lie in 0..1, got {self.layer_decay}")
        _require(0 <= self.cooldown_share <= 1, f"--optim.cooldown_share is a share, got {self.cooldown_share}")


@dataclasses.dataclass(frozen=True)
class MixOptions:
    """What is done to the pictures of a whole batch."""

    erase: float = 0.0
    """Probability that a rectangle of the student's picture is erased (random erasing); the teacher sees all of it."""
    mixup: float = 0.0
    """With run.stage image: alpha of mixup; the teacher, which must be run, sees the mixed pictures too. 0 is off."""
    cutmix: float = 0.0
    """With run.stage image: alpha of cutmix, in the same way; with both on, each batch takes one of them."""

    def __post_init__(self) -> None:
        _require(0 <= self.erase <= 1, f"--mix.erase is a probability, 0 to 1, got {self.erase}")
        for name in ("mixup", "cutmix"):
            _require(getattr(self, name) >= 0, f"--mix.{name} must not be negative, got {getattr(self, name)}")


PAIR_LOSSES = ("clip", "crd", "affinity", "icl", "gd", "afd", "vrd", "xrd", "kd", "deit_soft", "deit_hard")
FEATURE_LOSSES = ("fd", "l1", "cos", "kl")
LAYER_LOSSES = ("hidden", "attention", "attention_probs", "value", "embedding")


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """Weights (0: off) and settings of the losses, mixed as you like. "Short" losses use short captions and PCA'd image
    features; "image" and "text" losses compare one tower with the teacher's."""

    clip_long: float = 0.8
    """ITC of images and long captions."""
    clip_short: float = 0.4
    """ITC of PCA'd images and short captions."""
    crd_long: float = 1.5
    """KL between the teacher's and the student's image-text distributions, long captions (CLIP-KD, MobileCLIP)."""
    crd_short: float = 0.5
    """The same with short captions; both sides' image features PCA'd on the same batch."""
    affinity_long: float = 0.0
    """Cross-entropy of the student's image-text distributions with the teacher's as soft targets (TinyCLIP)."""
    affinity_short: float = 0.0
    """The same with short captions."""
    icl_long: float = 0.0
    """Interactive contrastive: student images against teacher texts and the reverse, own learned scale (CLIP-KD)."""
    icl_short: float = 0.0
    """The same with short captions."""
    gd_long: float = 0.0
    """Squared distance of the contrastive loss's gradients at the student's and the teacher's features (CLIP-KD)."""
    gd_short: float = 0.0
    """The same with short captions."""
    afd_long: float = 0.0
    """Augmented features: ITC of learned mixtures of student and teacher features (CLIP-KD)."""
    afd_short: float = 0.0
    """The same with short captions."""
    vrd_long: float = 0.0
    """Vertical relations: the student's two directions follow each other's teacher-student relations (CLIP-RD)."""
    vrd_short: float = 0.0
    """The same with short captions."""
    xrd_long: float = 0.0
    """Cross relations: symmetric KL between the teacher-student distributions of the two modalities (CLIP-RD)."""
    xrd_short: float = 0.0
    """The same with short captions."""
    kd_long: float = 0.0
    """Logit distillation: contrastive cross-entropy plus kd_lambda times 2 T^2 KL at temperature kd_temperature."""
    kd_short: float = 0.0
    """The same with short captions."""
    deit_soft_long: float = 0.0
    """(1 - deit_alpha) cross-entropy + deit_alpha T^2 KL at deit_temperature (DeiT)."""
    deit_soft_short: float = 0.0
    """The same with short captions."""
    deit_hard_long: float = 0.0
    """Mean of the cross-entropy with the true pair and with the teacher's best match (DeiT)."""
    deit_hard_short: float = 0.0
    """The same with short captions."""
    fd_image: float = 0.0
    """Squared distance to the teacher's image features, through a learned map where widths differ (CLIP-KD)."""
    fd_text: float = 0.0
    """The same of text features, the mean of long and short captions."""
    l1_image: float = 0.0
    """L1 distance to the teacher's image features."""
    l1_text: float = 0.0
    """The same of text features."""
    cos_image: float = 0.0
    """1 - cosine with the teacher's image features."""
    cos_text: float = 0.0
    """The same of text features."""
    kl_image: float = 0.0
    """KL between the softmaxes over the channels of teacher and student image features, at kl_temperature."""
    kl_text: float = 0.0
    """The same of text features."""
    masked_fd: float = 0.0
    """fd_image of pictures of which the student sees a part (mask_ratio hidden) and the teacher all."""
    hidden_text: float = 0.0
    """Squared distance of the hidden states of matched layers, through a learned map where widths differ
    (TinyBERT)."""
    hidden_image: float = 0.0
    """The same of the image towers; the student must be a ViT, here and below."""
    attention_text: float = 0.0
    """Squared distance of the attention scores before the softmax, per head (TinyBERT)."""
    attention_image: float = 0.0
    """The same of the image towers."""
    attention_probs_text: float = 0.0
    """KL between the attention probabilities, per head (MiniLM)."""
    attention_probs_image: float = 0.0
    """The same of the image towers."""
    value_text: float = 0.0
    """Difference of the value-value relations (MiniLM), as value_kind says."""
    value_image: float = 0.0
    """The same of the image towers."""
    embedding_text: float = 0.0
    """Squared distance of the token embeddings (TinyBERT)."""
    embedding_image: float = 0.0
    """The same of the patch embeddings."""

    label_smoothing: float = 0.1
    """Label smoothing of the ITC losses."""
    teacher_scale: float | None = None
    """Linear logit scale of the teacher's distributions; None: the teacher's own."""
    pca_rank: int = 32
    """Components that PCA keeps."""
    pca_scope: Literal["global", "rank", "off"] = "global"
    """PCA over the global batch, over each process' share (as Long-CLIP published it), or none."""
    pca_side: Literal["image", "text"] = "image"
    """Which side of the short losses is PCA'd: the image, as Long-CLIP has it, or as an ablation the short text."""
    share_identical_captions: bool = False
    """Let samples with the same caption share the target of the ITC losses instead of being negatives."""
    init_logit_scale: float | None = None
    """Linear logit scale at the start; None: the model's (1 / 0.07 from scratch)."""
    crd_temperature: float = 1.0
    """T of crd and affinity: both sides' logits are divided by it and the loss multiplied by T^2."""
    crd_direction: Literal["forward", "reverse", "symmetric"] = "forward"
    """forward: KL(teacher || student). reverse: KL(student || teacher). symmetric: their mean."""
    kd_temperature: float = 2.0
    """T of kd."""
    kd_lambda: float = 1.0
    """Weight of the KL in kd."""
    kd_direction: Literal["forward", "reverse"] = "forward"
    """Direction of the KL in kd."""
    deit_alpha: float = 0.5
    """Weight of the teacher in deit_soft."""
    deit_temperature: float = 3.0
    """T of deit_soft."""
    fd_scale: float = 1.0
    """Factor of the values of fd and masked_fd."""
    l1_scale: float = 1.0
    """Factor of the values of l1."""
    cos_scale: float = 1.0
    """Factor of the values of cos."""
    kl_scale: float = 1.0
    """Factor of the values of kl."""
    kl_temperature: float = 1.0
    """T of kl."""
    mask_ratio: float = 0.5
    """masked_fd: share of the picture that the student does not see."""
    mask_patch: int = 16
    """masked_fd: side of the hidden squares in pixels."""
    layer_map: str = "uniform"
    """Student layer i and teacher layer i L / M of the layer losses (uniform), the last layers of both (last), or
    pairs counted from 1, as in 1:3,2:6."""
    head_match: Literal["each", "mean"] = "each"
    """Attention losses head by head (counts must agree) or on the mean over heads."""
    value_kind: Literal["kl", "mse"] = "kl"
    """value: KL of the softmaxed relations (MiniLM) or their squared difference."""
    embedding_positions: bool = True
    """embedding: with the positional embeddings added, or the tokens' alone."""

    def __post_init__(self) -> None:
        _require(self.pca_rank >= 1, f"--loss.pca_rank must be at least 1, got {self.pca_rank}")
        weights = self.weights
        _require(
            min(weights.values()) >= 0 and max(weights.values()) > 0,
            "loss weights must not be negative, and one of them must be positive",
        )
        for name in ("crd_temperature", "kd_temperature", "deit_temperature", "kl_temperature"):
            _require(getattr(self, name) > 0, f"--loss.{name} must be positive, got {getattr(self, name)}")
        for name in ("deit_alpha", "mask_ratio"):
            _require(0 <= getattr(self, name) <= 1, f"--loss.{name} is a share, 0 to 1, got {getattr(self, name)}")

    @property
    def weights(self) -> dict[str, float]:
        """Weight of every loss by its name, those that are off included."""
        names = [f"{name}_{length}" for name in PAIR_LOSSES for length in ("long", "short")]
        names += [f"{name}_{tower}" for name in (*FEATURE_LOSSES, *LAYER_LOSSES) for tower in ("image", "text")]
        return {name: getattr(self, name) for name in (*names, "masked_fd")}

    @property
    def active(self) -> set[str]:
        """Names of the losses of positive weight."""
        return {name for name, weight in self.weights.items() if weight > 0}

    @property
    def distils(self) -> bool:
        """True if any loss needs a teacher."""
        return bool(self.active - {"clip_long", "clip_short"})

    @property
    def uses_short(self) -> bool:
        """True if short captions are encoded at all."""
        return any(name.endswith("_short") for name in self.active)

    @property
    def layer_losses(self) -> dict[str, set[str]]:
        """Names of the active layer losses by tower (image, text)."""
        return {
            tower: {name for name in LAYER_LOSSES if f"{name}_{tower}" in self.active} for tower in ("image", "text")
        }


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
    mix: MixOptions = dataclasses.field(default_factory=MixOptions)
    teacher: TeacherOptions = dataclasses.field(default_factory=TeacherOptions)
    student: StudentOptions = dataclasses.field(default_factory=StudentOptions)
    init: InitOptions = dataclasses.field(default_factory=InitOptions)
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
