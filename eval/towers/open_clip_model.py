"""Any CLIP of open_clip behind our models' interface: published names, weight files, hub and local folders.

    open_clip:ViT-B-32/laion2b_s34b_b79k     an architecture and a published set of weights, fetched on first use
    open_clip:ViT-B-32/weights.safetensors   an architecture and a file that holds its weights
    hf-hub:timm/ViT-B-16-SigLIP              a hub repository with open_clip_config.json
    local-dir:models/mine                    a folder with open_clip_config.json and open_clip_model.safetensors

Shapes: B images or captions, R image side, N captions, L tokens, D embedding width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from jaxtyping import Float, Int
from PIL.Image import Image
from torch import Tensor, nn

from longclip_teacher.errors import InputError
from longclip_teacher.open_clip_parts import HFTokenizer, PreprocessCfg, SimpleTokenizer, image_transform_v2
from longclip_teacher.text import CaptionTokenizer
from longclip_teacher.weights_file import read_weights

__all__ = [
    "OPEN_CLIP_CONFIG",
    "OpenClipModel",
    "OpenClipTokenizer",
    "is_open_clip_name",
    "load_open_clip",
    "open_clip_weights_file",
]

OPEN_CLIP_CONFIG = "open_clip_config.json"
_BUILT_IN, _LOCAL_DIR, _HUB = "open_clip:", "local-dir:", "hf-hub:"
# In open_clip's order of preference, so that we check the file that it reads
_LOCAL_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
# Options that a configuration may set for its tokenizer. Others would reach transformers, which can run code for some
_TOKENIZER_OPTIONS = {"clean", "strip_sep_token", "tokenizer_mode", "language", "additional_special_tokens"}
_TOWERS = ("vision", "text")
_MOST_LAYERS, _LARGEST_SIZE = 1000, 1 << 20  # no real size comes near these
_FEWEST_WEIGHTS_SHARE = (
    0.5  # share of the weights that the configuration asks for; with fewer, the configuration is false
)
_POSITION_TABLES = ("positional_embedding", "text.positional_embedding", "visual.positional_embedding")


class OpenClipTokenizer:
    """open_clip's tokenizer for a model; it also counts a caption's tokens before the cut.

    CLIP's own byte pairs go through `CaptionTokenizer`, which gives the same ids faster.
    """

    def __init__(self, tokenizer: SimpleTokenizer | HFTokenizer, *, is_plain_clip: bool) -> None:
        self.context_length: int = tokenizer.context_length
        """Tokens, start and end included, to which every caption is cut or padded."""
        self._tokenizer = CaptionTokenizer(self.context_length) if is_plain_clip else tokenizer

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Int[Tensor, "N L"]:
        """Token ids as int64, cut or padded to the context length as the model was trained with."""
        return self._tokenizer([texts] if isinstance(texts, str) else list(texts), context_length)

    def count_tokens(self, text: str) -> int:
        """The caption's length in tokens before any truncation, with those that the tokenizer adds."""
        tokenizer = self._tokenizer
        if isinstance(tokenizer, CaptionTokenizer):
            return tokenizer.count_tokens(text)
        if isinstance(tokenizer, SimpleTokenizer):
            return len(tokenizer.encode(text)) + 2  # start and end
        # verbose=False: no warning about long captions
        if tokenizer.tokenizer_mode == "clips":
            own = tokenizer.tokenizer(tokenizer.clean_fn(text), add_special_tokens=False, verbose=False)
            return len(own.input_ids) + 3  # start, end and class
        return len(tokenizer.tokenizer(tokenizer.clean_fn(text), verbose=False).input_ids)


class OpenClipModel(nn.Module):
    """An unchanged open_clip model: features come from its own `encode_image` and `encode_text`."""

    def __init__(self, clip: Any, tokenizer: OpenClipTokenizer, embed_dim: int) -> None:
        super().__init__()
        self.clip = clip
        if isinstance(clip, open_clip.CoCa):
            del self.clip.text_decoder  # it writes captions and plays no part in the features
        self.tokenizer = tokenizer
        self.embed_dim = embed_dim
        self.preprocess_cfg = PreprocessCfg(**self.visual.preprocess_cfg)
        size = self.preprocess_cfg.size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if sides[0] != sides[1]:
            raise InputError(
                f"the model reads pictures of {sides[0]} x {sides[1]} pixels: only square ones are supported"
            )
        self.image_size: int = sides[0]

    def encode_image(self, images: Float[Tensor, "B 3 R R"], normalize: bool = False) -> Float[Tensor, "B D"]:
        """Features of images that `preprocess` has normalised."""
        return self.clip.encode_image(images, normalize=normalize)

    def encode_text(self, tokens: Int[Tensor, "B L"], normalize: bool = False) -> Float[Tensor, "B D"]:
        """Features of captions that `tokenizer` has padded to the context length."""
        return self.clip.encode_text(tokens, normalize=normalize)

    @property
    def visual(self) -> Any:
        """The image tower: open_clip's transformer or ResNet, or one of timm's."""
        return self.clip.visual

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of the factor on cosine similarities."""
        return self.clip.logit_scale

    @property
    def context_length(self) -> int:
        """Longest caption in tokens; the rest is cut."""
        return self.tokenizer.context_length

    @property
    def preprocess(self) -> Callable[[Image], Tensor]:
        """The evaluation transform: a PIL picture to a normalised [3, R, R] tensor."""
        return image_transform_v2(self.preprocess_cfg, is_train=False)


def is_open_clip_name(name: str) -> bool:
    """Whether this is a name for `load_open_clip`."""
    return name.startswith((_BUILT_IN, _LOCAL_DIR, _HUB))


def load_open_clip(name: str, device: str | torch.device = "cpu") -> OpenClipModel:
    """The open_clip model `name` (forms above) in eval mode, float32.

    Random weights are never evaluated: missing weights, weights that do not fit, and weights that cannot be fetched
    raise InputError in one line. So do files whose positions do not fit, which open_clip would resample. Weights that
    were trained with QuickGELU get it, also where open_clip's configuration of that name has GELU.
    """
    if name.startswith(_BUILT_IN):
        architecture, weights = _split(name)
        path = _weights_path(architecture, weights)
        tag = open_clip.get_pretrained_cfg(architecture, weights) if path is None else {}
        is_quickgelu = bool(tag.get("quick_gelu"))
    else:
        architecture, weights, is_quickgelu = name, None, False
        path = open_clip_weights_file(name)
    with _one_line_errors(name):
        config = open_clip.get_model_config(architecture)
    if config is None:
        raise InputError(f"{name}: open_clip has no architecture {architecture}; see open_clip.list_models()")
    _check_config(name, config)
    if path is not None:
        _check_weights(name, architecture, path)
    with _one_line_errors(name):
        clip = open_clip.create_model(
            architecture,
            pretrained=weights if path is None else str(path),
            force_quick_gelu=is_quickgelu,
            require_pretrained=True,
            weights_only=True,
        )
        tokenizer = open_clip.get_tokenizer(architecture)
    is_plain_clip = isinstance(tokenizer, SimpleTokenizer) and not config["text_cfg"].get("tokenizer_kwargs")
    model = OpenClipModel(clip, OpenClipTokenizer(tokenizer, is_plain_clip=is_plain_clip), config["embed_dim"])
    return model.to(device).eval()  # not frozen: torch would choose other kernels, and the last bits would differ


def open_clip_weights_file(name: str) -> Path | None:
    """The weight file on this machine that `name` means; None if it is fetched from the hub."""
    if name.startswith(_BUILT_IN):
        return _weights_path(*_split(name))
    if name.startswith(_HUB):
        return None
    folder = Path(name.removeprefix(_LOCAL_DIR)).expanduser()
    if not (folder / OPEN_CLIP_CONFIG).is_file():
        raise InputError(f"{name}: the folder has no {OPEN_CLIP_CONFIG}, which open_clip writes when it saves a model")
    for file in _LOCAL_WEIGHTS:
        if (folder / file).is_file():
            return folder / file
    raise InputError(f"{name}: the folder has no weights: put {_LOCAL_WEIGHTS[0]} beside {OPEN_CLIP_CONFIG}")


def _split(name: str) -> tuple[str, str]:
    architecture, _, weights = name.removeprefix(_BUILT_IN).partition("/")
    if not architecture or not weights:
        raise InputError(
            f"{name} names no weights, and random ones are not evaluated: write open_clip:ARCHITECTURE/TAG or "
            f"open_clip:ARCHITECTURE/FILE.safetensors; {_known_tags(architecture)}"
        )
    return architecture, weights


def _weights_path(architecture: str, weights: str) -> Path | None:
    """The file that `weights` means; None if it is the tag of published weights."""
    if open_clip.get_pretrained_cfg(architecture, weights):
        return None
    path = Path(weights).expanduser()
    if not path.is_file():
        raise InputError(f"{weights} is neither a file nor a tag of {architecture}: {_known_tags(architecture)}")
    if path.suffix not in _WEIGHT_SUFFIXES:
        raise InputError(f"{path} is no weight file: {', '.join(_WEIGHT_SUFFIXES)} can be read")
    return path


def _known_tags(architecture: str) -> str:
    if architecture not in open_clip.list_models():
        return f"open_clip has no architecture {architecture!r}, see open_clip.list_models()"
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    return f"{architecture} has the weights {', '.join(tags)}" if tags else f"{architecture} has no published weights"


def _check_config(name: str, config: Any) -> None:
    """Check a configuration, which comes with the weights and is as untrusted as they are."""
    is_complete = isinstance(config, dict) and all(isinstance(config.get(f"{way}_cfg"), dict) for way in _TOWERS)
    if not is_complete or not isinstance(config.get("embed_dim"), int):
        raise InputError(f"{name}: its configuration lacks embed_dim, vision_cfg or text_cfg")
    foreign = set(config["text_cfg"].get("tokenizer_kwargs") or {}) - _TOKENIZER_OPTIONS
    if foreign:
        raise InputError(f"{name}: its configuration sets {', '.join(sorted(foreign))} for the tokenizer: not allowed")
    for key, value in _numbers(config):
        if value > (_MOST_LAYERS if key == "layers" else _LARGEST_SIZE):
            raise InputError(f"{name}: its configuration asks for {key} = {value}")


def _numbers(config: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)):
                yield key, number


def _check_weights(name: str, architecture: str, path: Path) -> None:
    """Raise InputError if the file is damaged or holds code, or if open_clip would change its weights."""
    tensors = read_weights(path).tensors
    with _one_line_errors(name), torch.device("meta"):  # shapes only: a false configuration takes no memory
        clip = open_clip.create_model(architecture, load_weights=False, pretrained_text=False, device="meta")
    wanted = clip.state_dict()
    num_wanted = sum(value.numel() for value in wanted.values())
    if sum(value.numel() for value in tensors.values()) < _FEWEST_WEIGHTS_SHARE * num_wanted:
        raise InputError(f"{name}: {path} holds far fewer weights than {architecture} has")
    # The layouts differ only in the prefix of the text tower
    tables = {key.removeprefix("text."): tensors[key] for key in _POSITION_TABLES if key in tensors}
    for key in _POSITION_TABLES:
        table = tables.get(key.removeprefix("text."))
        if key in wanted and table is not None and table.shape != wanted[key].shape:
            raise InputError(
                f"{name}: {key} is {tuple(table.shape)} in {path}, not {tuple(wanted[key].shape)}: "
                "another architecture, or a longer context, which teachers' files have (give the file alone)"
            )


@contextmanager
def _one_line_errors(name: str) -> Iterator[None]:
    """Turn any error of open_clip, transformers and the hub client into an InputError, with their logs off."""
    was_disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(f"{name} needs another package: pip install {error.name}") from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"open_clip cannot load {name}: {reason[:300]}") from None
    finally:
        logging.disable(was_disabled)
