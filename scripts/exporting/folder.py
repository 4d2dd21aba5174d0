"""The files of an exported model, laid out as the hub, transformers.js and ONNX Runtime look for them.

Our weights have a name of their own: beside `model_type: clip`, which transformers.js needs, a model.safetensors would
let transformers build a random CLIP and merely warn.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from exporting.sources import Exported
from exporting.tokenizer_file import clip_tokenizer, tokenizer_settings
from longclip_teacher.atomic_files import write_json
from longclip_teacher.text import EOT, SOT, VOCAB_SIZE
from longclip_teacher.weights_file import file_sha256

__all__ = ["MANIFEST", "STEMS", "WEIGHTS", "write_manifest", "write_settings"]

WEIGHTS = "compact_longclip.safetensors"
MANIFEST = "sha256.json"
STEMS = {"image": "vision_model", "text": "text_model"}
"""Names of the files of each tower, without what tells their kind."""
_MODULE = "compact_longclip"  # of sentence-transformers
_RESAMPLING = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers


def write_settings(model: Exported, folder: Path) -> None:
    """Write weights, configuration, preprocessing and tokenizer."""
    model.save(folder / WEIGHTS)
    write_json(folder / "config.json", _config(model))
    write_json(folder / "preprocessor_config.json", _preprocessing(model))
    write_json(folder / "tokenizer_config.json", tokenizer_settings(model.context_length))
    _write_sentence_transformers(folder)
    clip_tokenizer(model.context_length).save(str(folder / "tokenizer.json"), pretty=False)


def _write_sentence_transformers(folder: Path) -> None:
    """Write the module through which sentence-transformers reads this folder."""
    (folder / f"{_MODULE}.py").write_text(Path(__file__).with_name("folder_module.py").read_text(encoding="utf-8"))
    write_json(folder / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": f"{_MODULE}.CompactLongCLIP"}])
    write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"})


def write_manifest(folder: Path) -> dict[str, str]:
    """Write and return the sha256 of every file by its name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
    write_json(folder / MANIFEST, hashes)
    return hashes


def _config(model: Exported) -> dict[str, Any]:
    """What transformers.js reads of a CLIP, and our own configuration."""
    own = model.model
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": own.embed_dim,
        "logit_scale_init_value": math.log(float(own.linear_logit_scale.detach())),
        "text_config": {
            "model_type": "clip_text_model",
            "max_position_embeddings": own.context_length,
            "vocab_size": VOCAB_SIZE,
            "projection_dim": own.embed_dim,
            "bos_token_id": SOT,
            "eos_token_id": EOT,
            "pad_token_id": EOT,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": own.image_size,
            "projection_dim": own.embed_dim,
        },
        "compact_longclip": {"kind": model.kind, "weights": WEIGHTS, "config": own.config.to_dict()},
    }


def _preprocessing(model: Exported) -> dict[str, Any]:
    """Resize, crop and normalise as `preprocess` does; the graph itself does not normalise."""
    side = model.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": _RESAMPLING[model.model.preprocess_cfg.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.mean),
        "image_std": list(model.std),
    }
