"""DataCompDR shards: files of the public generator are read, broken ones have a cause, and our exports read back."""

from __future__ import annotations

import functools
import gzip
import http.server
import io
import json
import pickle
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from longclip_teacher.ancestry import DATACOMPDR
from longclip_teacher.errors import InputError
from training.cache.datacompdr import DataCompDRStore, datacompdr_teacher_info
from training.data.index import RawSample, ShardIndex
from training.data.samples import BadSample
from training.data.store import TeacherInfo, choose_captions, choose_view
from training.data.stream import read_remote_shard
from training.data.transforms import Augmentation

NUM_VIEWS, WIDTH = 6, 24
SYNTHETIC = [f"synthetic caption {number}" for number in range(5)]
GROUND_TRUTH = "what the page said"


def jpeg(number: int = 0) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def unit(rows: int, width: int = WIDTH, teachers: int = 1, seed: int = 0) -> np.ndarray:
    """Return features as a teacher gives them: float32, with unit norm in each teacher's part."""
    parts = np.random.default_rng(seed).standard_normal((rows, teachers, width // teachers)).astype(np.float32)
    return (parts / np.linalg.norm(parts, axis=2, keepdims=True)).reshape(rows, width)


PAUG = [
    [[0, 0, 40, 60], [[0, 0.0], [13, 0.0]]],
    [[1, 2, 30, 31], [[1, -0.09], [4, 31.5]]],
    [[3, 4, 20, 21], None],  # RandAugment skipped
    [[5, 6, 10, 11], [[11, 178.5], [10, 6]]],
    [[7, 8, 12, 13], [[6, 0.27], [7, -0.27]]],
    [[9, 0, 14, 15], [[5, -9.0], [12, 0.0]]],
]  # fmt: skip
AUGMENTATIONS = [  # their meaning: (left, top, right, bottom) and torchvision's names
    ((0, 0, 60, 40), (("Identity", 0.0), ("Equalize", 0.0))),
    ((2, 1, 33, 31), (("ShearX", -0.09), ("TranslateY", 31.5))),
    ((4, 3, 25, 23), ()),
    ((6, 5, 17, 15), (("Solarize", 178.5), ("Posterize", 6.0))),
    ((8, 7, 21, 19), (("Brightness", 0.27), ("Color", -0.27))),
    ((0, 9, 15, 23), (("Rotate", -9.0), ("AutoContrast", 0.0))),
]


def sample(
    *, as_string: bool = False, member: str = "npz", separate: bool = False, width: int = WIDTH, teachers: int = 1
) -> dict[str, Any]:
    """Return the members of a sample as Apple's generator hands them to webdataset's TarWriter."""
    image, text = unit(NUM_VIEWS, width, teachers), unit(6, width, teachers, seed=1)
    arrays = {"image_emb": image, "text_emb": text}
    if separate:
        arrays = {"image_emb": image, "text_emb": text[:1], "syn_text_emb": text[1:]}
    features = arrays if member == "npz" else {k: torch.tensor(v, dtype=torch.bfloat16) for k, v in arrays.items()}
    return {
        "url.txt": "https://example.org/1.jpg",
        "jpg": jpeg(),
        "txt": GROUND_TRUTH,
        "syn.json": json.dumps({"syn_text": SYNTHETIC}),
        "paug.json": json.dumps({"param_aug": json.dumps(PAUG) if as_string else PAUG}),
        member: features,
        "json": json.dumps({"sha256": "0"}),
    }


def write(path: Path, *samples: dict[str, Any]) -> ShardIndex:
    with webdataset.TarWriter(str(path)) as sink:
        for number, members in enumerate(samples):
            sink.write({"__key__": f"{number:04x}", **members})
    return ShardIndex([path])


def raw_of(**members: bytes | None) -> RawSample:
    """Return a sample of plain bytes in one width. Keywords replace members, or remove them with None."""
    buffer = io.BytesIO()
    np.savez(buffer, image_emb=unit(NUM_VIEWS), text_emb=unit(6, seed=1))
    good: dict[str, bytes | None] = {
        "syn.json": json.dumps({"syn_text": SYNTHETIC}).encode(),
        "paug.json": json.dumps({"param_aug": PAUG}).encode(),
        "npz": buffer.getvalue(),
        "txt": GROUND_TRUTH.encode(),
    }
    merged = {**good, **{name.replace("__", "."): data for name, data in members.items()}}
    txt = merged.pop("txt")
    return RawSample("k", jpeg(), None, txt, {name: data for name, data in merged.items() if data is not None})


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


STORE = DataCompDRStore(TeacherInfo((WIDTH,), None, 77))


# --- files of the public generator ---------------------------------------------------------------------------------


@pytest.mark.parametrize("as_string", [False, True])
@pytest.mark.parametrize("member", ["npz", "pth.gz"])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize(("width", "teachers"), [(WIDTH, 1), (1536, 2)])
def test_the_generators_layout_is_read(
    tmp_path: Path, as_string: bool, member: str, separate: bool, width: int, teachers: int
) -> None:
    index = write(
        tmp_path / "a.tar",
        sample(as_string=as_string, member=member, separate=separate, width=width, teachers=teachers),
    )
    teacher_info = datacompdr_teacher_info([tmp_path / "a.tar"])
    assert teacher_info == TeacherInfo((768, 768) if teachers == 2 else (WIDTH,), None, 77, DATACOMPDR)
    store = pickle.loads(pickle.dumps(DataCompDRStore(teacher_info)))  # noqa: S301 -- as loader workers get it
    raw = index.read(0)
    assert raw.txt == GROUND_TRUTH.encode()  # not the url.txt
    image, text = unit(NUM_VIEWS, width, teachers), unit(6, width, teachers, seed=1)
    tolerance = 1e-6 if member == "npz" else 2**-8 / width**0.5 * 8  # bfloat16: 8 bits of a feature
    seen = set()
    for epoch in range(2 * NUM_VIEWS):
        key = (epoch, 0)
        draw = store.draw(raw, 3, key)
        view, (long, _) = choose_view(NUM_VIEWS, 3, key), choose_captions(5, 1, 3, key)
        box, ops = AUGMENTATIONS[view]
        assert draw.augmentation == Augmentation(box, ops=ops, ops_size=224, flip=False)
        assert (draw.caption_long, draw.caption_short) == (SYNTHETIC[long], GROUND_TRUTH)
        for ours, expected in ((draw.image, image[view]), (draw.long, text[1 + long]), (draw.short, text[0])):
            assert ours.dtype == np.float32 and np.abs(ours - expected).max() < tolerance
            for part in np.split(ours, teachers):
                assert abs(np.linalg.norm(part) - 1) < 1e-6
        seen.add((view, draw.caption_long))
    assert len({view for view, _ in seen}) == NUM_VIEWS and len({caption for _, caption in seen}) == 5


def test_npz_is_preferred_and_bfloat16_in_npz_is_understood() -> None:
    image, text = unit(NUM_VIEWS), unit(6, seed=1)
    other = gzip.compress(torch_bytes({"image_emb": torch.zeros(6, WIDTH), "text_emb": torch.zeros(6, WIDTH)}))
    expected = STORE.draw(raw_of(), 0, (0, 0))
    assert (STORE.draw(raw_of(pth__gz=other), 0, (0, 0)).image == expected.image).all()
    bits = {
        name: torch.from_numpy(rows).bfloat16().view(torch.int16).numpy().view(np.uint16)
        for name, rows in (("image_emb", image), ("text_emb", text))
    }
    for stored in (bits, {name: rows.view("V2") for name, rows in bits.items()}):
        draw = STORE.draw(raw_of(npz=npz(**stored)), 0, (0, 0))
        assert 0 < np.abs(draw.image - expected.image).max() < 2**-8
    half = STORE.draw(raw_of(npz=npz(image_emb=image.astype(np.float16), text_emb=text.astype(np.float16))), 0, (0, 0))
    assert 0 < np.abs(half.long - expected.long).max() < 2**-11


def test_several_lists_of_synthetic_captions_are_drawn_from_together() -> None:
    rows = unit(4, seed=2)
    syn = json.dumps({"syn_text": ["a", " "], "syn_text_x": ["b", "c"], "syn_text_none": ["d"], "coca_captions": ["e"]})
    arrays = {"image_emb": unit(NUM_VIEWS), "text_emb": unit(1), "syn_text_emb": rows[:2], "syn_text_x_emb": rows[2:]}
    draws = [STORE.draw(raw_of(syn__json=syn.encode(), npz=npz(**arrays)), 0, (epoch, 0)) for epoch in range(40)]
    assert {draw.caption_long for draw in draws} == {"a", "b", "c"}  # neither the empty one, nor those not encoded
    for draw in draws:
        assert np.abs(draw.long - rows[{"a": 0, "b": 2, "c": 3}[draw.caption_long]]).max() < 1e-6


@pytest.mark.parametrize("txt", [None, b"", b" \n"])
def test_without_a_ground_truth_the_short_caption_is_a_synthetic_one(txt: bytes | None) -> None:
    text = unit(6, seed=1)
    draws = [STORE.draw(raw_of(txt=txt), 0, (epoch, 0)) for epoch in range(40)]
    assert {draw.caption_short for draw in draws} == set(SYNTHETIC)
    assert any(draw.caption_short != draw.caption_long for draw in draws)
    for draw in draws:
        assert np.abs(draw.short - text[1 + SYNTHETIC.index(draw.caption_short)]).max() < 1e-6


@pytest.mark.parametrize(
    ("entry", "flip", "ops"),
    [
        ([[1, 2, 3, 4]], False, ()),
        ([[1, 2, 3, 4], True], True, ()),
        ([[1, 2, 3, 4], True, [[9, 0.5]]], True, (("Sharpness", 0.5),)),
        ([[1, 2, 3, 4], False, None], False, ()),
    ],
)
def test_every_recipe_of_crop_flip_and_operations_is_read(entry: Any, flip: bool, ops: Any) -> None:
    paug = json.dumps({"param_aug": [entry] * NUM_VIEWS}).encode()
    drawn = STORE.draw(raw_of(paug__json=paug), 0, (0, 0)).augmentation
    assert drawn == Augmentation((2, 1, 6, 4), ops=ops, ops_size=224, flip=flip)


def test_a_remote_shard_holds_the_same(tmp_path: Path) -> None:
    index = write(tmp_path / "a.tar", sample(), sample(member="pth.gz"))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))) as httpd:
        threading.Thread(target=httpd.serve_forever).start()
        url = f"http://127.0.0.1:{httpd.server_port}"
        try:
            assert list(read_remote_shard(f"{url}/a.tar")) == [index.read(0), index.read(1)]
            assert datacompdr_teacher_info([f"{url}/a.tar"]) == datacompdr_teacher_info([tmp_path / "a.tar"])
            with pytest.raises(InputError, match=r"\Acannot read [^\n]*gone\.tar[^\n]*\Z"):
                datacompdr_teacher_info([f"{url}/gone.tar"])
        finally:
            httpd.shutdown()
    assert set(index.read(0).extra) == {"syn.json", "paug.json", "npz"} and "pth.gz" in index.read(1).extra


# --- broken files ---------------------------------------------------------------------------------------------------


def torch_bytes(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


def zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image_emb.npy", bytes((16 << 20) + 1))
    return buffer.getvalue()


def one_augmentation(entry: Any) -> dict[str, bytes]:
    return {"paug__json": json.dumps({"param_aug": [entry] * NUM_VIEWS}).encode()}


def features(image: np.ndarray, text: np.ndarray | None = None) -> dict[str, bytes]:
    return {"npz": npz(image_emb=image, text_emb=unit(6) if text is None else text)}


CROP = [0, 0, 4, 4]
BROKEN: list[tuple[dict[str, bytes | None], str]] = [
    ({"syn__json": None}, "no syn.json, or one of more than 4 MB"),
    ({"syn__json": b"{"}, "syn.json is damaged"),
    ({"syn__json": b"[" * 100_000}, "syn.json is damaged"),
    ({"syn__json": b"[]"}, "syn.json is not an object"),
    ({"syn__json": b'{"syn_text": "x"}'}, "syn.json holds no lists of captions"),
    ({"syn__json": b'{"syn_text": [1]}'}, "syn.json holds no lists of captions"),
    ({"syn__json": b'{"syn_text": ["x"]}'}, "syn.json and text_emb have different lengths"),
    ({"syn__json": b'{"syn_text": ["", "", "", "", " "]}'}, "no synthetic caption"),
    ({"txt": b"\xff"}, "txt is not UTF-8"),
    ({"paug__json": b'{"param_aug": "["}'}, "paug.json is damaged"),
    ({"paug__json": b'{"param_aug": {}}'}, "paug.json holds no list of augmentations"),
    ({"paug__json": b'{"param_aug": []}'}, "paug.json and image_emb have different lengths, or none"),
    ({"paug__json": json.dumps({"param_aug": PAUG[:-1]}).encode()}, "paug.json and image_emb have different lengths, "),
    (one_augmentation([]), "an augmentation is not"),
    (one_augmentation([CROP, True, None, None]), "an augmentation is not"),
    (one_augmentation([CROP, None, None]), "an augmentation is not"),
    (one_augmentation([[0, 0, 4], None]), "an augmentation is not"),
    (one_augmentation([[0, -1, 4, 4], None]), "an augmentation is not"),
    (one_augmentation([[0, 0.5, 4, 4], None]), "an augmentation is not"),
    (one_augmentation([[0, True, 4, 4], None]), "an augmentation is not"),
    (one_augmentation([[0, 0, 4, 10**30], None]), "an augmentation is not"),
    (one_augmentation([[0, 0, 4, 0], None]), "a stored crop is empty"),
    (one_augmentation([CROP, [[14, 0.0]]]), "stored operations are not a list"),
    (one_augmentation([CROP, [[-1, 0.0]]]), "stored operations are not a list"),
    (one_augmentation([CROP, [["Rotate", 0.0]]]), "stored operations are not a list"),
    (one_augmentation([CROP, [[1, 0.0]] * 17]), "stored operations are not a list"),
    (one_augmentation([CROP, [[1, float("nan")]]]), "a stored operation cannot have its magnitude"),
    (one_augmentation([CROP, [[1, float("inf")]]]), "a stored operation cannot have its magnitude"),
    (one_augmentation([CROP, [[1, 10**400]]]), "a stored magnitude is not a number"),
    (one_augmentation([CROP, [[10, -1]]]), "a stored operation cannot have its magnitude"),
    (one_augmentation([CROP, [[1, "2"]]]), "a stored magnitude is not a number"),
    ({"npz": None}, "no npz or pth.gz, or one of more than 4 MB"),
    ({"npz": b"PK\x03\x04 no zip"}, "npz is damaged"),
    ({"npz": npz(image_emb=unit(6), text_emb=unit(6))[:-200]}, "npz is damaged"),
    ({"npz": npz(image_emb=np.array([Bomb()], dtype=object), text_emb=unit(6))}, "npz is damaged"),
    ({"npz": zip_bomb()}, "npz is damaged"),
    ({"npz": npz(image_emb=unit(6))}, "no text_emb among the features"),
    (features(unit(1)[0]), "image_emb is not two-dimensional"),
    (features(unit(6), unit(0)), "syn.json and text_emb have different lengths"),
    (features(unit(6, 12), unit(6, 12)), "the width of the features differs from the first sample's"),
    (features(np.full((6, WIDTH), np.nan, np.float32)), "features are not finite"),
    (features(np.full((6, WIDTH), np.inf, np.float32)), "features are not finite"),
    (features(np.zeros((6, WIDTH), np.float32)), "features are zero"),
    ({"npz": None, "pth__gz": b"no gzip"}, "pth.gz is damaged"),
    ({"npz": None, "pth__gz": gzip.compress(bytes((16 << 20) + 1))}, "pth.gz is damaged"),
    ({"npz": None, "pth__gz": gzip.compress(pickle.dumps(Bomb()))}, "pth.gz is damaged"),
    ({"npz": None, "pth__gz": gzip.compress(torch_bytes({"image_emb": Bomb()}))}, "pth.gz is damaged"),
    ({"npz": None, "pth__gz": gzip.compress(torch_bytes([torch.zeros(3)]))}, "pth.gz is damaged"),
    ({"npz": None, "pth__gz": gzip.compress(torch_bytes({"image_emb": torch.zeros(6, 4)},
                                                        _use_new_zipfile_serialization=False))}, "pth.gz is damaged"),
]  # fmt: skip


@pytest.mark.parametrize(("members", "cause"), BROKEN)
def test_a_broken_member_is_a_bad_sample_with_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: dict[str, bytes | None], cause: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadSample) as caught:
        STORE.draw(raw_of(**members), 0, (0, 0))
    assert str(caught.value).startswith(cause)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 1024), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-5, 24), }",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (6, 24), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': " + b"(" * 900,
        b"\xff\x00 no header",
    ],
)
def test_a_header_that_lies_is_refused_before_anything_is_allocated(header: bytes) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        start = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        archive.writestr("image_emb.npy", start + bytes(64))
    with pytest.raises(BadSample, match="npz is damaged"):
        STORE.draw(raw_of(npz=buffer.getvalue()), 0, (0, 0))


# --- the teacher of the first samples ---------------------------------------------------------------------------------


def test_shards_without_stored_teacher_are_refused_in_one_line(tmp_path: Path) -> None:
    write(tmp_path / "plain.tar", {"jpg": jpeg(), "txt": "a cat"})
    with pytest.raises(
        InputError, match=r"\A[^\n]*plain\.tar: .* no syn\.json, no paug\.json, no npz or pth\.gz; [^\n]*\Z"
    ):
        datacompdr_teacher_info([tmp_path / "plain.tar"])
    half = sample()
    del half["paug.json"]
    write(tmp_path / "half.tar", half)
    with pytest.raises(InputError, match=r"no paug\.json; "):
        datacompdr_teacher_info([tmp_path / "half.tar"])


def test_widths_must_add_up_and_one_bad_sample_at_the_start_does_not_matter(tmp_path: Path) -> None:
    broken = {**sample(), "paug.json": "{}"}
    write(tmp_path / "a.tar", broken, sample())
    assert datacompdr_teacher_info([tmp_path / "a.tar"]).widths == (WIDTH,)
    assert datacompdr_teacher_info([tmp_path / "a.tar"], (10, 14)).widths == (10, 14)
    with pytest.raises(InputError, match=r"paug\.json|width 24, not 10 \+ 10"):
        datacompdr_teacher_info([tmp_path / "a.tar"], (10, 10))
    write(tmp_path / "b.tar", sample())
    with pytest.raises(InputError, match=r"width 24, not 10 \+ 10: set --teacher\.stored_widths"):
        datacompdr_teacher_info([tmp_path / "b.tar"], (10, 10))
    write(tmp_path / "c.tar", broken)
    with pytest.raises(InputError, match=r"holds no usable teacher features: paug\.json holds no list"):
        datacompdr_teacher_info([tmp_path / "c.tar"])
