"""What this project takes from inside open_clip.

Only names at the top of open_clip are its interface. Those below may move with any release, so every import of them is
here, and a release that moves one breaks this file alone. pyproject.toml bounds the releases; `make compat` runs the
tests at the lowest, the newest and those of a source checkout.
"""

from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, TextTransformer, VisionTransformer

__all__ = [
    "OPENAI_DATASET_MEAN",
    "OPENAI_DATASET_STD",
    "HFTokenizer",
    "PreprocessCfg",
    "QuickGELU",
    "ResidualAttentionBlock",
    "SimpleTokenizer",
    "TextTransformer",
    "VisionTransformer",
    "image_transform_v2",
]
