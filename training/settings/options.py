"""The options of a run by section, except the losses: what a preset or the command line can set.

The docstrings under the fields are the texts of --help. Its overview shows their first sentences.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from longclip_teacher.errors import InputError

__all__ = [
    "DATACOMPDR",
    "EMBEDDED_CACHE",
    "EMBEDDED_DATA",
    "EMBEDDED_TEACHER",
    "REMOTE_SHUFFLE_SHARDS",
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
REMOTE_SHUFFLE_SHARDS = 4  # the default of data.shuffle_shards for remote shards
DATACOMPDR = "datacompdr"  # as teacher.cache: the shards hold the features themselves


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where the run is written and how it is executed."""

    out_dir: Path = Path("runs/distill")
    """Folder for the configuration, log, checkpoints, weights and report of the run."""
    train: Literal["student", "teacher"] = "student"
    """The model to train: a student, with or without distillation, or a Long-CLIP teacher."""
    stage: Literal["both", "image", "text"] = "both"
    """both trains the two towers together. image or text trains one tower of the student, which learns the teacher's
    features from pictures without captions or captions without pictures. Only that tower of the teacher is loaded."""
    resume: str = "never"
    """never refuses an out_dir that holds a run, auto continues from its last checkpoint, and a file name continues
    from that checkpoint. A finished run continues if max_steps is larger than before."""
    seed: int = 0
    """Seed of the initial weights, the sample order, the augmentations and drop path."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast precision of the towers; losses and PCA always run in float32. fp16 scales the gradient (GradScaler)."""
    tf32: bool = True
    """Let a GPU round the inputs of the towers' float32 products to TF32. Losses and PCA never do."""
    global_batch_size: int = 128
    """Pairs per step, summed over all processes; the contrastive losses compare all of them."""
    accumulation: int = 1
    """Number of chunks into which each process splits its share of the batch. More chunks need less memory and one
    extra forward pass; the gradient is the same."""
    epochs: float = 1.0
    """Passes over the data; ignored when max_steps is given."""
    max_steps: int | None = None
    """Total number of steps; overrides epochs."""
    sync_bn: bool = False
    """Compute BatchNorm statistics over all processes (GPU only). By default each process computes its own."""
    log_every: int = 10
    """Steps between entries in metrics.jsonl, TensorBoard and the console."""
    eval_every: int = 0
    """Steps between evaluations on data.val; 0 evaluates only at the end."""
    save_every: int = 500
    """Steps between updates of the last checkpoint."""
    save_minutes: float = 0.0
    """Minutes after which the last checkpoint is updated, whatever save_every says; 0 leaves it to save_every."""
    keep_every: int = 0
    """Steps between checkpoints that are kept (checkpoints/step_N.pt); 0 keeps only the last and the best."""
    collective_timeout: float = 600.0
    """Seconds without progress on any process, in data, step, evaluation or save, after which the run ends. A line says
    after one minute, or half that time, which process stands still, and where."""

    def __post_init__(self) -> None:
        require(self.save_minutes >= 0, f"--run.save_minutes must not be negative, got {self.save_minutes}")
        require(self.collective_timeout > 0, f"--run.collective_timeout is in seconds, got {self.collective_timeout}")
        for name in ("global_batch_size", "accumulation", "log_every", "save_every"):
            require(getattr(self, name) >= 1, f"--run.{name} must be at least 1, got {getattr(self, name)}")
        require(
            self.max_steps is None or self.max_steps >= 1, f"--run.max_steps must be at least 1, got {self.max_steps}"
        )
        require(self.epochs > 0, f"--run.epochs must be positive, got {self.epochs}")


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Training data, and the sets that evaluate the run."""

    shards: tuple[str, ...] = (f"{EMBEDDED_DATA}/train/*.tar",)
    """Patterns of the training shards: local paths with * or {000..123}, https://, s3:// and gs:// URLs."""
    images: Path | None = None
    """With run.stage image: a folder of pictures to train on instead of shards. Its subfolders are searched too;
    captions are not needed."""
    captions: tuple[str, ...] = ()
    """With run.stage text: caption files, or patterns of them, to train on instead of shards. They are COCO captions or
    ShareGPT4V (.json), Conceptual Captions (.tsv), or text with one caption per line (.txt)."""
    val: Path | None = EMBEDDED_DATA / "val_twins"
    """Retrieval set of the periodic evaluation. The best checkpoint has the highest mean of its I2T and T2I R@1. With
    training data of your own, this set, tests and zeroshot default to none."""
    val_protocol: str = "folder"
    """Protocol of data.val; `python eval/retrieval.py --protocol list` explains the protocols."""
    tests: tuple[str, ...] = (f"twins=folder:{EMBEDDED_DATA}/twins", f"random=folder:{EMBEDDED_DATA}/random")
    """Retrieval sets to evaluate once at the end, each NAME=PROTOCOL:FOLDER."""
    zeroshot: Path | None = EMBEDDED_DATA / "digits/val"
    """Folder with one folder of pictures per class, for zero-shot classification at every evaluation."""
    zeroshot_classnames: Path | None = EMBEDDED_DATA / "digits/classnames.txt"
    """File of class names, one per line, in the sorted order of the class folders. None uses the folders' names."""
    zeroshot_templates: str = f"{EMBEDDED_DATA}/digits/templates.txt"
    """Prompt templates: openai (80), simple (7), a file with one per line, or one such as "a photo of a {}."."""
    num_workers: int = 2
    """Loader processes per training process; 0 loads in the training process itself."""
    max_bad_share: float = 0.01
    """Largest share of unreadable samples; above it the run stops."""
    shuffle_shards: int = 64
    """Number of shards whose samples are permuted together. More shards mix better, fewer read more locally. Remote
    shards default to 4."""
    cache_dir: Path | None = None
    """Folder on this node for remote shards that have a manifest. None: ~/.cache/compact-longclip/shards. The processes
    of a node share it."""
    cache_gb: float = 50.0
    """The most gigabytes (10^9 bytes) that data.cache_dir may hold. It must hold two times data.shuffle_shards
    shards."""
    epoch_samples: int | None = None
    """Samples per epoch. Remote shards without a manifest need it, because they are streamed; otherwise it shortens the
    epoch."""


@dataclasses.dataclass(frozen=True)
class TeacherOptions:
    """The frozen teacher, or the teacher to train with run.train teacher."""

    checkpoint: str | None = EMBEDDED_TEACHER
    """Frozen teacher to distil from: a weight file, run folder or hub name (longclip-b, longclip-l). None trains
    without distillation. With training data of your own it must be given."""
    activation: Literal["gelu", "quickgelu"] | None = None
    """Activation of a teacher whose weight file does not record it, such as one in open_clip's layout."""
    ensemble: tuple[str, ...] = ()
    """More frozen teachers beside the first. Features are concatenated and distributions averaged."""
    short: str | None = None
    """Another frozen teacher for short captions and their pictures, such as the CLIP from which Long-CLIP was made. It
    reads 77 tokens and its features are not PCA'd. None: the first teacher reads both."""
    variant: str = "tiny"
    """With run.train teacher and no init: the architecture to build from scratch (tiny, small, b16, l14)."""
    init: str | None = None
    """With run.train teacher: CLIP or Long-CLIP weights to start from. 77 positions are stretched to 248."""
    cache: str | None = None
    """Folder of stored teacher features (scripts/cache_teacher.py), or datacompdr where the shards hold them. The
    teacher is then not loaded. teacher.checkpoint None accepts whichever teacher made the cache."""
    stored_features: bool = True
    """With cache: take the stored features. False replays the stored crops and captions but runs the teacher on them,
    to check a cache."""
    stored_widths: tuple[int, ...] | None = None
    """With cache datacompdr: the widths of the teachers whose features are concatenated. None: one teacher, or two of
    768 where the width is 1536."""


@dataclasses.dataclass(frozen=True)
class StudentOptions:
    """The student's architecture and the weights it starts from."""

    variant: str = "tiny"
    """Architecture: s0, s1, s2, b, mobileclip2_s0/s2/s3/s4/b/l14, vit_s, vit_b, small, tiny or vit_tiny. The options
    below change parts of it."""
    init: str | None = None
    """Weights to start from: an official MobileCLIP file, a hub name, or a student of this project. Apple's weights are
    for research only."""
    context_length: int = 248
    """Tokens that the student reads. Longer captions are cut; their end token is kept."""
    pad_mask: bool = True
    """Hide padding from attention, convolution and BatchNorm. False: padding counts, as in the published MobileCLIP."""
    embed_dim: int | None = None
    """Width of the features. None takes the width of init.image or init.text where one is given, the teacher's with
    run.stage image or text, so that the two towers fit together later, and the variant's otherwise."""
    image_size: int | None = None
    """Side of the pictures in pixels. None, here and below, keeps the variant's value."""
    image_patch: int | None = None
    """ViT: side of a patch in pixels."""
    image_width: int | None = None
    """ViT: channels of a token."""
    image_layers: int | None = None
    """ViT: transformer blocks."""
    image_heads: int | None = None
    """ViT: attention heads."""
    distillation_token: bool | None = None
    """ViT: add a second class token that learns from the teacher alone (DeiT). Inference averages the two features."""
    drop_path: float | None = None
    """Share of the image tower's residual branches to drop in training. It rises with depth."""
    text_tower: Literal["hybrid", "base", "causal", "longclip"] | None = None
    """hybrid: RepMixer, attention, RepMixer. base: attention in both directions. causal: attention to earlier tokens
    only. longclip: Long-CLIP's own text tower; init.text gives it Long-CLIP's weights."""
    text_width: int | None = None
    """Text tower: channels of a token."""
    text_layers: int | None = None
    """Text tower: attention layers."""
    text_heads: int | None = None
    """Text tower: attention heads."""

    @property
    def shape(self) -> dict[str, Any]:
        """The fields that change the variant's shape, by the names that mobileclip_student's override has for them."""
        others = ("variant", "init", "context_length", "pad_mask")
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in others}


@dataclasses.dataclass(frozen=True)
class InitOptions:
    """Where each tower of the student starts when student.init does not give weights for both."""

    image: str | None = None
    """Source of the image tower: a student (file, run folder, hub name), or timm for the weights that timm has of this
    architecture (DeiT's, trained on ImageNet, for a ViT; MobileCLIP's or a CLIP's for a published tower)."""
    text: str | None = None
    """Source of the text tower: a student, or a Long-CLIP for a base, causal or longclip text tower of its width."""
    freeze_image: bool = False
    """Do not train the image tower."""
    freeze_text: bool = False
    """Do not train the text tower."""
    truncated_normal: bool = False
    """From scratch: draw linear layers and embeddings from a normal distribution with standard deviation 0.02,
    truncated at two standard deviations."""


@dataclasses.dataclass(frozen=True)
class OptimOptions:
    """AdamW, its learning-rate schedule, and the average of the weights."""

    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.2
    """Weight decay of matrices, token embeddings and convolutions. Biases, norms, layer scales, positions, class tokens
    and logit scales have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's beta1 and beta2."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    warmup_steps: int = 1000
    """Steps of linear warm-up, at most a tenth of the run."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up. cosine falls until the end; constant stays at the peak until the cool-down, then
    falls linearly."""
    cooldown_share: float = 0.2
    """With schedule constant: share of the run that the cool-down takes."""
    layer_decay: float = 1.0
    """Factor by which the learning rate falls from each block of a tower to the one before it; 1 gives all blocks the
    same rate."""
    image_lr_share: float = 1.0
    """Learning rate of the image tower relative to lr."""
    text_lr_share: float = 1.0
    """Learning rate of the text tower relative to lr."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, which is then evaluated and saved. None keeps no
    average."""
    min_lr_share: float = 0.0
    """Learning rate at the end relative to the peak."""
    clip_grad_norm: float | None = 1.0
    """Largest norm of the gradient over all parameters; None does not clip."""
    max_bad_steps: int = 0
    """Steps that may have a loss or a gradient that is not finite before the run stops. Such a step changes nothing."""

    def __post_init__(self) -> None:
        require(self.max_bad_steps >= 0, f"--optim.max_bad_steps must not be negative, got {self.max_bad_steps}")
        require(self.lr > 0, f"--optim.lr must be positive, got {self.lr}")
        require(self.ema is None or 0 < self.ema < 1, f"--optim.ema must lie between 0 and 1, got {self.ema}")
        require(0 < self.layer_decay <= 1, f"--optim.layer_decay must lie in 0..1, got {self.layer_decay}")
        require(0 <= self.cooldown_share <= 1, f"--optim.cooldown_share is a share, got {self.cooldown_share}")


@dataclasses.dataclass(frozen=True)
class MixOptions:
    """Changes to the pictures of a batch: erasing, mixup, cutmix."""

    erase: float = 0.0
    """Probability of erasing a rectangle of the student's picture (random erasing). The teacher sees the whole
    picture."""
    mixup: float = 0.0
    """With run.stage image: alpha of mixup; 0 is off. The teacher must run, since it sees the mixed pictures too."""
    cutmix: float = 0.0
    """With run.stage image: alpha of cutmix; 0 is off. With both on, each batch takes one of them."""

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
    """How the same results are computed: fast, or the plain way as a reference."""

    reference: bool = False
    """Compute everything the plain way: PIL decodes, open_clip's SimpleTokenizer reads captions, both text towers
    compute padding up to 248 tokens, losses hold full matrices, pictures keep the contiguous memory format, AdamW runs
    operation by operation, and freed memory goes back to the system. Losses agree with the fast way to 1e-4, and to
    1e-2 where the decoders' pixels differ."""
    compile: bool = False
    """Run torch.compile on the towers. Compilation takes minutes at the start, more on a CPU; it is meant for GPUs.
    Features and gradients agree to rounding."""

    @property
    def savings(self) -> Savings:
        """Each saving: all on, or with `reference` all off."""
        return Savings(**dict.fromkeys((field.name for field in dataclasses.fields(Savings)), not self.reference))


def require(condition: bool, message: str) -> None:
    """Raise InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)
