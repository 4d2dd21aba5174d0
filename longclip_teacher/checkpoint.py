"""Read the published Long-CLIP files, CLIP ViT checkpoints and our own safetensors into a LongCLIP, and write ours.

A file goes through three steps: its keys become ours (`key_layouts`), the tower shapes are read from the weights (our
own files hold a configuration instead), and the table of positions is stretched or cut, and split, to fit.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import Tensor

from longclip_teacher.activation import Activation
from longclip_teacher.ancestry import NOT_RECORDED, ancestry_to_json, hub_ancestry, recorded, unrecorded
from longclip_teacher.config import ImageTowerConfig, TeacherConfig, TextTowerConfig
from longclip_teacher.errors import InputError
from longclip_teacher.key_layouts import FROZEN_POSITIONS, POSITIONS, to_our_keys
from longclip_teacher.model import LongCLIP
from longclip_teacher.positions import NUM_KEPT_POSITIONS, stretch_positions
from longclip_teacher.text import CONTEXT_LENGTH
from longclip_teacher.weights_file import (
    RECOGNISED,
    WeightsFile,
    load_strictly,
    read_weights,
    run_weights,
    write_weights,
)

__all__ = ["HUB_NAMES", "export_official", "load_teacher", "save_teacher", "teacher_file"]

logger = logging.getLogger(__name__)
_FORMAT, _KIND = "compact-longclip", "teacher"
_CLIP_CONTEXT_LENGTH = 77
_HEAD_WIDTH = 64  # the same in every CLIP ViT; it cannot be read from any weight's shape


# name: repository and its weight files, of which the first that exists is read; all are QuickGELU models
_HUB_FILES = {
    "longclip-b": ("BeichenZhang/LongCLIP-B", ["longclip-B.pt"]),
    "longclip-l": ("BeichenZhang/LongCLIP-L", ["longclip-L.pt"]),
    "openai/clip-vit-base-patch16": ("openai/clip-vit-base-patch16", ["model.safetensors", "pytorch_model.bin"]),
    "openai/clip-vit-large-patch14": ("openai/clip-vit-large-patch14", ["model.safetensors", "pytorch_model.bin"]),
}
HUB_NAMES = tuple(_HUB_FILES)


def load_teacher(
    source: str | Path | WeightsFile,
    device: str | torch.device = "cpu",
    *,
    context_length: int | None = None,
    activation: Activation | None = None,
) -> LongCLIP:
    """A frozen teacher in eval mode, from a weight file, a run folder (its best weights) or a hub name (`HUB_NAMES`).

    Files: the published `longclip-*.pt`; a CLIP ViT as safetensors or state dict with the keys of OpenAI, open_clip or
    transformers, also as trainers wrap them (`state_dicts`); what `save_teacher` wrote; or what `read_weights` has read
    of one of these. `context_length` defaults to the file's own, except that a CLIP of 77 positions is stretched to
    248. `activation` must be given for a CLIP file that is not evidently OpenAI's, because the weights do not show it.
    The log names the sha256 of the file or its contents and, for files that are not ours, the model that was
    recognised. Anything that does not fit raises InputError in one line.
    """
    if isinstance(source, WeightsFile):
        file, name = source, str(source.path)
    else:
        file, name = read_weights(teacher_file(source)), str(source)
        if not Path(source).exists():  # from the hub
            activation = activation or "quickgelu"
    path = file.path
    if file.metadata.get("format") == _FORMAT:
        model = _build(_config_inside(file), _own_tensors(file), context_length, path)
        model.ancestry = recorded(file.ancestry, _KIND, file.content_sha256)
        logger.info("%s: %s", name, model.config.describe())
    else:
        tensors, is_quickgelu = to_our_keys(file.tensors, path)
        config = _config_from_weights(tensors, "quickgelu" if is_quickgelu else activation, path)
        if context_length is None and config.text.context_length == _CLIP_CONTEXT_LENGTH:
            context_length = CONTEXT_LENGTH
        model = _build(config, tensors, context_length, path)
        stretched = model.context_length > config.text.context_length
        origin = f" (stretched from {config.text.context_length})" if stretched else ""
        RECOGNISED.info("%s: %s%s%s", name, model.config.describe(), origin, file.remark)
        if isinstance(source, WeightsFile) or Path(source).exists():
            model.ancestry = unrecorded(f"{path.name} ({model.config.describe()})", file.sha256)
        else:
            model.ancestry = hub_ancestry(_HUB_FILES[name][0], file.sha256)
    if activation is not None and activation != model.config.activation:
        raise InputError(f"{path} is a {model.config.activation} model: leave out activation={activation!r}")
    return model.to(device).eval().requires_grad_(False)


def teacher_file(name_or_path: str | Path) -> Path:
    """The weight file that `load_teacher` reads: the file itself, the best weights of a run folder, or the file that
    the hub gives for a name of `HUB_NAMES`.

    Raises InputError where there is none of these.
    """
    path = Path(name_or_path)
    if path.exists():
        return run_weights(path)
    if str(name_or_path) not in _HUB_FILES:
        raise InputError(f"no weight file or run folder at {path}, and the known hub names are {', '.join(HUB_NAMES)}")
    return _download(*_HUB_FILES[str(name_or_path)])


def save_teacher(model: LongCLIP, path: str | Path) -> None:
    """Write the weights, with the configuration and the ancestors inside, to a `.safetensors` file, atomically."""
    if Path(path).suffix != ".safetensors":
        raise InputError(f"a teacher is saved as safetensors: name the file {Path(path).with_suffix('.safetensors')}")
    metadata = {"format": _FORMAT, "kind": _KIND, "config": json.dumps(model.config.to_dict())}
    ancestry = "" if model.ancestry == NOT_RECORDED else json.dumps(ancestry_to_json(model.ancestry))
    write_weights(path, model.state_dict(), metadata, ancestry)


def export_official(model: LongCLIP) -> dict[str, Tensor]:
    """The state dict in the published Long-CLIP layout, for `torch.save` and the published code.

    Both position tables hold all rows. Raises InputError for a model that the published code cannot build, because its
    stem, activation, head width or context length differs from Long-CLIP's.
    """
    config = model.config
    has_clip_heads = all(tower.width == _HEAD_WIDTH * tower.heads for tower in (config.image, config.text))
    is_clip_vit = config.image.stem == "patch" and config.activation == "quickgelu" and has_clip_heads
    if not is_clip_vit or config.text.context_length != CONTEXT_LENGTH:
        raise InputError(
            "the published layout holds only a CLIP ViT with QuickGELU, heads of 64 channels and 248 tokens: "
            "save this model with save_teacher"
        )
    tensors = {key.removeprefix("text."): value.detach().clone() for key, value in model.state_dict().items()}
    del tensors[FROZEN_POSITIONS.removeprefix("text.")]
    table = model.text.position_table.detach()
    return {**tensors, "positional_embedding": table.clone(), "positional_embedding_res": table.clone()}


def _download(repository: str, filenames: list[str]) -> Path:
    filename, *others = filenames
    try:
        return Path(huggingface_hub.hf_hub_download(repository, filename))
    except Exception as error:  # the client's errors differ between its versions and their HTTP libraries
        is_absent = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if is_absent and others:
            return _download(repository, others)
        problem = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise InputError(
            f"cannot get {filename} of {repository} from the hub ({problem[:200]}): "
            "fetch it elsewhere and give its path"
        ) from None


def _config_inside(file: WeightsFile) -> TeacherConfig:
    if file.metadata.get("kind") != _KIND:
        raise InputError(f"{file.path} holds a {file.metadata.get('kind')}, not a teacher: load it with load_student")
    try:
        values = json.loads(file.metadata.get("config", ""))
    except json.JSONDecodeError:
        values = None
    if not isinstance(values, dict):
        raise InputError(f"{file.path} has no readable configuration in its metadata: save the model again")
    try:
        return TeacherConfig.from_dict(values)
    except InputError as error:
        raise InputError(f"{file.path}: {error}") from None


def _own_tensors(file: WeightsFile) -> dict[str, Tensor]:
    """The tensors of our file with one whole table of positions, as `to_our_keys` returns for the other layouts."""
    tensors = dict(file.tensors)
    parts = []
    for key in (FROZEN_POSITIONS, POSITIONS):
        if key not in tensors or tensors[key].ndim != 2:
            raise InputError(f"{file.path} does not fit the model: 1 missing keys ({key})")
        parts.append(tensors.pop(key))
    if parts[0].shape[1] != parts[1].shape[1]:
        raise InputError(f"{file.path}: {FROZEN_POSITIONS} and {POSITIONS} differ in width")
    tensors[POSITIONS] = torch.cat(parts)
    return tensors


def _config_from_weights(tensors: dict[str, Tensor], activation: Activation | None, path: Path) -> TeacherConfig:
    def shape(key: str, num_dims: int) -> torch.Size:
        if key not in tensors:
            raise InputError(f"{path} holds no CLIP ViT: it lacks {key}")
        if tensors[key].ndim != num_dims:
            raise InputError(
                f"{path}: {key} has the shape {tuple(tensors[key].shape)} instead of {num_dims} dimensions"
            )
        return tensors[key].shape

    def layers(tower: str) -> int:
        prefix = f"{tower}.transformer.resblocks."
        return len({key[len(prefix) :].split(".")[0] for key in tensors if key.startswith(prefix)})

    image_width, _, patch, _ = shape("visual.conv1.weight", 4)
    grid = round(max(shape("visual.positional_embedding", 2)[0] - 1, 0) ** 0.5)
    vocab_size, text_width = shape("text.token_embedding.weight", 2)
    embed_dim = shape("text.text_projection", 2)[1]
    num_positions = shape(POSITIONS, 2)[0]
    for tower, width in (("image", image_width), ("text", text_width)):
        if width % _HEAD_WIDTH:
            raise InputError(
                f"{path}: the {tower} tower is {width} wide, which is not a multiple of CLIP's head width {_HEAD_WIDTH}"
            )
    if activation is None:
        raise InputError(
            f"{path} lacks its activation: give activation='quickgelu' (OpenAI's weights) or 'gelu' (most others)"
        )
    try:
        return TeacherConfig(
            embed_dim=embed_dim,
            image=ImageTowerConfig(patch * grid, patch, image_width, layers("visual"), image_width // _HEAD_WIDTH),
            text=TextTowerConfig(text_width, text_width // _HEAD_WIDTH, layers("text"), num_positions, vocab_size),
            activation=activation,
            num_frozen_positions=min(NUM_KEPT_POSITIONS, num_positions),
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _build(config: TeacherConfig, tensors: dict[str, Tensor], context_length: int | None, path: Path) -> LongCLIP:
    """A model of `config` with exactly `tensors`; `context_length` None keeps the configuration's."""
    table = tensors[POSITIONS].float()
    if len(table) != config.text.context_length:
        raise InputError(
            f"{path} holds {len(table)} text positions, but its configuration says {config.text.context_length}"
        )
    if context_length is not None:
        table = stretch_positions(table, context_length)
        num_frozen = min(config.num_frozen_positions, context_length)
        text = replace(config.text, context_length=context_length)
        config = replace(config, text=text, num_frozen_positions=num_frozen)
    tensors = {
        **tensors,
        FROZEN_POSITIONS: table[: config.num_frozen_positions],
        POSITIONS: table[config.num_frozen_positions :],
    }
    with torch.device("meta"):  # shapes only: saves drawing random weights, and a false configuration takes no memory
        model = LongCLIP(config)
    num_wanted = sum(value.numel() for value in model.state_dict().values())
    if num_wanted > 2 * sum(value.numel() for value in tensors.values()):
        raise InputError(f"{path} holds far fewer weights than its configuration needs")
    model.to_empty(device="cpu")
    load_strictly(model, tensors, path)
    return model
