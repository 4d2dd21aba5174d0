"""Our exports in DataCompDR's layout read back, and what the layout cannot hold is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longclip_teacher.ancestry import Ancestor
from longclip_teacher.errors import InputError
from shard_files import jpeg
from training.cache.datacompdr import DataCompDRStore, datacompdr_teacher_info, write_datacompdr_sample
from training.data.index import ShardIndex
from training.data.store import TeacherInfo, choose_view
from training.data.transforms import Augmentation
from training.data.writer import write_shard

AUGMENTATIONS = [  # (left, top, right, bottom) and torchvision's names
    ((0, 0, 60, 40), (("Identity", 0.0), ("Equalize", 0.0))),
    ((2, 1, 33, 31), (("ShearX", -0.09), ("TranslateY", 31.5))),
    ((4, 3, 25, 23), ()),
    ((6, 5, 17, 15), (("Solarize", 178.5), ("Posterize", 6.0))),
    ((8, 7, 21, 19), (("Brightness", 0.27), ("Color", -0.27))),
    ((0, 9, 15, 23), (("Rotate", -9.0), ("AutoContrast", 0.0))),
]


def features(rows: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, 24)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.mark.parametrize("flip", [False, True])
def test_what_we_write_reads_back(tmp_path: Path, flip: bool) -> None:
    augmentations = [
        Augmentation(box, ops=ops, ops_size=224, flip=flip and number == 1)
        for number, (box, ops) in enumerate(AUGMENTATIONS)
    ]
    image, text = features(len(AUGMENTATIONS)).astype(np.float16), features(6, seed=1).astype(np.float16)
    teacher_info = TeacherInfo((10, 14), 55.0, 248, (Ancestor("a/name", "mit", "12"),))
    members = write_datacompdr_sample(
        jpeg(0), image_features=image, text_features=text, captions=list("abcde"), ground_truth="f",
        augmentations=augmentations, teacher_info=teacher_info,
    )  # fmt: skip
    write_shard(tmp_path / "a.tar", [("k", members)])
    assert datacompdr_teacher_info([tmp_path / "a.tar"]) == teacher_info
    raw = ShardIndex([tmp_path / "a.tar"]).read(0)
    assert raw.image == jpeg(0)
    store = DataCompDRStore(teacher_info)
    for epoch in range(len(AUGMENTATIONS)):
        draw, view = store.draw(raw, 0, (epoch, 0)), choose_view(len(AUGMENTATIONS), 0, (epoch, 0))
        assert draw.augmentation == augmentations[view]
        parts = np.split(image[view].astype(np.float32), [10])
        expected = np.concatenate([part / np.linalg.norm(part) for part in parts])
        assert np.abs(draw.image - expected).max() < 1e-6


def test_what_datacompdr_cannot_hold_is_an_error() -> None:
    def attempt(**changes: Any) -> None:
        options: dict[str, Any] = {
            "image_features": features(1), "text_features": features(2), "captions": ["x"], "ground_truth": "y",
            "augmentations": [Augmentation((0, 0, 4, 4), ops=(("Rotate", 9.0),), ops_size=224)],
            "teacher_info": TeacherInfo((24,), None, 248),
        }  # fmt: skip
        write_datacompdr_sample(jpeg(0), **{**options, **changes})

    attempt()
    with pytest.raises(InputError, match="drawn at 336 pixels"):
        attempt(augmentations=[Augmentation((0, 0, 4, 4), ops=(("Rotate", 9.0),), ops_size=336)])
    for changes in ({"captions": []}, {"augmentations": []}):
        with pytest.raises(InputError, match="give one row of features"):
            attempt(**changes)
