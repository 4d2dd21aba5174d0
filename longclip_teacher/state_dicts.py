"""The state dict inside what a trainer saved: wrappers around it, and prefixes that wrappers of the model left on keys.

{"state_dict": ...}, {"model": ...}, {"model_state_dict": ...}, nested        the dictionary inside
{"state_dict_ema": ...}, {"model_ema": ...}, {"ema": ...} beside them         the averaged copy is preferred, as in timm
module.KEY (DDP), _orig_mod.KEY (torch.compile), model.KEY (Lightning)        KEY
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from longclip_teacher.errors import InputError

__all__ = ["bare_keys", "find_state_dict"]

_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "ema")
_PLAIN = ("state_dict", "model_state_dict", "model", "module", "net")
_MOST_WRAPPERS = 4
_ANYWHERE = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_DDP, _LIGHTNING = "module.", "model."
_NUM_AVERAGED = "n_averaged"  # the counter that torch's AveragedModel keeps beside the weights
_OWN_CHECKPOINT = {"distiller", "optimizer"}


def find_state_dict(content: object, path: Path) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a torch file's content by their bare keys, and where they were: `state_dict_ema (an
    averaged copy, preferred to state_dict)`, or "" if the file is the state dict itself.

    Raise InputError for anything else, and for one of our training checkpoints, beside which its weights lie.
    """
    if isinstance(content, dict) and content.keys() >= _OWN_CHECKPOINT:
        raise InputError(f"{path} is a training checkpoint: give the best.safetensors or last.safetensors beside it")
    found = _search(content, _MOST_WRAPPERS)
    if found is None:
        raise InputError(f"{path} holds no state dict (a mapping from names to tensors)")
    tensors, place = found
    names = bare_keys(tensors)
    if any(key.startswith(_DDP) for key in tensors):
        names.pop(_NUM_AVERAGED, None)
    bare = {name: tensors[key] for key, name in names.items()}
    if len(bare) != len(names):
        raise InputError(f"{path} holds weights twice, with and without a prefix such as module. or _orig_mod.")
    return bare, ".".join(place) + _remark(content, place)


def bare_keys(keys: Iterable[str]) -> dict[str, str]:
    """Return each key without the prefixes of DDP, torch.compile and FSDP, in any order, and without Lightning's where
    all keys have it."""
    names = {key: _ANYWHERE.sub("", key) for key in keys}
    while any(name.startswith(_DDP) for name in names.values()):
        names = {key: name.removeprefix(_DDP) for key, name in names.items()}
    if names and all(name.startswith(_LIGHTNING) for name in names.values()):
        names = {key: name.removeprefix(_LIGHTNING) for key, name in names.items()}
    return names


def _search(content: object, most_wrappers: int) -> tuple[dict[str, Tensor], tuple[str, ...]] | None:
    if not isinstance(content, dict) or not content:
        return None
    if all(isinstance(value, Tensor) for value in content.values()):
        return {str(key): value for key, value in content.items()}, ()
    for name in (*_AVERAGED, *_PLAIN) if most_wrappers else ():
        if (found := _search(content.get(name), most_wrappers - 1)) is not None:
            return found[0], (name, *found[1])
    return None


def _remark(content: object, place: tuple[str, ...]) -> str:
    if not set(place) & set(_AVERAGED):
        return ""
    others = [name for name in _PLAIN if isinstance(content, dict) and isinstance(content.get(name), dict)]
    preferred = f", preferred to {' and '.join(others)}" if others and place[0] in _AVERAGED else ""
    return f" (an averaged copy{preferred})"
