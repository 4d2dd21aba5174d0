"""The options of a run by section, all but the losses': what can be set in a preset and on the command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from longclip_teacher.errors import InputError

__all__ = [
    "EMBEDDED_CACHE",
    "EMBEDDED_DATA",
    "EMBEDDED_TEACHER",
    "DataOptions",
    "InitOptions",
    "MixOptions",
    "OptimOptions",
    "RunOptions",
    "Savings",
    "SpeedOptions",
    "StudentOptions",
    "TeacherOptions",
    "require",
]

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
            require(getattr(self, name) >= 1, f"--run.{name} must be at least 1, got {getattr(self, name)}")
        require(
            self.max_steps is None or self.max_steps >= 1, f"--run.max_steps must be at least 1, got {self.max_steps}"
        )
        require(self.epochs > 0, f"--run.epochs must be positive, got {self.epochs}")


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

    @property
    def shape(self) -> dict[str, Any]:
        """The fields that change the variant's shape, by the names that mobileclip_student's override has for them."""
        others = ("variant", "init", "context_length", "pad_mask")
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in others}


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
        require(self.lr > 0, f"--optim.lr must be positive, got {self.lr}")
        require(self.ema is None or 0 < self.ema < 1, f"--optim.ema must lie between 0 and 1, got {self.ema}")
        require(0 < self.layer_decay <= 1, f"--optim.layer_decay must lie in 0..1, got {self.layer_decay}")
        require(0 <= self.cooldown_share <= 1, f"--optim.cooldown_share is a share, got {self.cooldown_share}")


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
        require(0 <= self.erase <= 1, f"--mix.erase is a probability, 0 to 1, got {self.erase}")
        for name in ("mixup", "cutmix"):
            require(getattr(self, name) >= 0, f"--mix.{name} must not be negative, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Savings:
    """What makes a run faster and leaves its results alone, within the tolerance named. --speed.reference True turns
    all of them off; tests turn them off one by one."""

    fast_decode: bool = True
    """Decode and resize JPEGs with torchvision; off: with PIL. Pixels equal to 1 level in 255 (bilinear) or 2
    (bicubic), on average to 0.02."""
    fast_tokenizer: bool = True
    """Remember the tokens of words; off: open_clip's SimpleTokenizer. The ids are the same."""
    trim: bool = True
    """Compute only real tokens; off: captions padded to 248 in both text towers. Features equal to 1e-5."""
    streaming_losses: bool = True
    """Contrastive and KL losses in blocks of rows, shared among the processes; off: full matrices in each process.
    Losses and gradients equal to 1e-5."""
    channels_last: bool = True
    """Run the image tower in channels-last memory format where that is faster. Features equal to rounding."""
    fused_adamw: bool = True
    """AdamW in one kernel. Weights equal to rounding."""
    keep_memory: bool = True
    """On Linux, keep freed memory in the process instead of giving it back after each operation. Changes no figure."""


@dataclasses.dataclass(frozen=True)
class SpeedOptions:
    """How the same results are computed: fast, or in the plain way that the fast one is checked and timed against."""

    reference: bool = False
    """Compute everything the plain way: PIL decodes, open_clip's SimpleTokenizer reads captions, both text towers
    compute padding up to 248 tokens, losses hold full matrices, pictures keep the contiguous memory format, AdamW runs
    operation by operation, and freed memory goes back to the system. Losses agree with the fast way to 1e-4, and to
    1e-2 where the decoders' pixels differ."""
    compile: bool = False
    """Run torch.compile on the towers. Compilation takes minutes at the start, on a CPU many; it is meant for GPUs.
    Features and gradients agree to rounding."""

    @property
    def savings(self) -> Savings:
        """Each saving: all on, or with `reference` all off."""
        return Savings(**dict.fromkeys((field.name for field in dataclasses.fields(Savings)), not self.reference))


def require(condition: bool, message: str) -> None:
    """Raise InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)
