"""Sampled captions in a teacher cache: what is stored, which one an epoch reads, and what a run must agree with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from cache_teacher import Options, cache
from eval.base.processes import Runtime
from eval.base.sentences import split_sentences
from longclip_teacher import create_teacher, load_teacher, save_teacher
from longclip_teacher.errors import InputError
from longclip_teacher.text import CaptionTokenizer
from shard_files import jpeg
from training.cache.freshness import has_caption
from training.cache.manifest import CACHE_MANIFEST, cache_sha256, read_cache
from training.cache.reader import TeacherCacheStore, open_cache
from training.cache.sidecar import Sidecar
from training.data.caption_sampling import sample_caption
from training.data.index import ShardIndex
from training.data.randomness import sample_generator
from training.data.samples import BadSample, SampleDecoder
from training.data.transforms import ViewSpec
from training.data.writer import caption_member, write_manifest, write_shard
from training.settings.augment import AugmentConfig
from training.settings.captions import NO_SAMPLING, CaptionOptions

AUGMENT = AugmentConfig()
SAMPLED = CaptionOptions("sampled", drop_first=0.5, keep=(0.2, 0.8), shuffle=True)
VIEWS, SEED = 3, 7
LONG: list[list[str]] = [
    [" ".join(f"Picture {i} shows thing {k}." for k in range(6)), f"Other text of {i}. It is red. It is wet."]
    for i in range(6)
]
LONG += [["One sentence alone"], ["一只狗坐着。它是红色的。天空很蓝。"], []]  # the last has no caption
NO_CAPTION = 8


def write_shards(folder: Path, captions: list[list[str]] = LONG) -> Path:
    folder.mkdir()
    members = [
        (f"{i:03d}", {"jpg": jpeg(i), "json": caption_member(long, ["given"])} if long else {"jpg": jpeg(i)})
        for i, long in enumerate(captions)
    ]
    write_manifest(folder, [write_shard(folder / "a.tar", members)], {})
    return folder


def make(
    shards: Path,
    teacher: Path,
    out: Path,
    captions: CaptionOptions = SAMPLED,
    views: int = VIEWS,
    *,
    sentences: bool = False,
) -> Path:
    wanted = Options((str(shards),), str(teacher), out, seed=SEED, num_workers=0, device="cpu")
    wanted = replace(wanted, captions=captions, caption_views=views, sentences=sentences)
    wanted.check()
    cache(wanted, Runtime(0, 1, torch.device("cpu")))
    return out


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_teacher(create_teacher("tiny"), path)
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, shards: Path, teacher: Path) -> Path:
    return make(shards, teacher, tmp_path_factory.mktemp("cache"))


def opened(
    shards: Path, folder: Path, captions: CaptionOptions | None = SAMPLED, sub_captions: int = 0
) -> TeacherCacheStore:
    index = ShardIndex([shards / "a.tar"])
    return open_cache(folder, index, AUGMENT, None, captions=captions, sub_captions=sub_captions)


def stored_texts(number: int, long: int) -> list[str]:
    """The sampled captions of a long caption, by the rule that the documents state."""
    name = zlib.crc32(b"a.tar")
    draws = [sample_generator(SEED, name, number, long, view, 1) for view in range(VIEWS)]
    return [sample_caption(LONG[number][long], SAMPLED, draw) for draw in draws]


def test_a_sampled_caption_is_stored_with_the_teachers_feature_and_read_in_turn(
    shards: Path, made: Path, teacher: Path
) -> None:
    store, model = opened(shards, made), load_teacher(teacher)
    for number in range(NO_CAPTION):
        raw = store.index.read(number)
        seen: dict[int, list[str]] = {}
        for epoch in range(2 * VIEWS):
            draw = store.draw(raw, 0, (epoch, number))
            long = next(
                place
                for place, text in enumerate(LONG[number])
                if np.array_equal(CaptionTokenizer()([text])[0, : len(draw.caption_long)], draw.caption_long)
            )
            tokens = torch.from_numpy(np.asarray(draw.caption_short, np.int64))[None]
            text = next(
                text
                for text in stored_texts(number, long)
                if torch.equal(CaptionTokenizer()([text])[:, : tokens.shape[1]], tokens)
            )
            expected = model.encode_text(tokens, normalize=True)[0].numpy()
            assert np.abs(expected - draw.short).max() < 1e-3
            seen.setdefault(epoch % VIEWS, []).append(text)
            wanted = [stored_texts(number, long)[view] for view in range(VIEWS)]
            start = int(sample_generator(0, number, 6).integers(VIEWS))
            assert text == wanted[(start + epoch) % VIEWS], "all in turn"
        if len(LONG[number]) == 1:
            assert all(len(set(texts)) == 1 for texts in seen.values()), "a pass later, the same again"
    assert any(len(set(stored_texts(number, 0))) > 1 for number in range(NO_CAPTION))
    with pytest.raises(BadSample):
        store.draw(store.index.read(NO_CAPTION), 0, (0, NO_CAPTION))
    record = read_cache(made)[1]["a.tar"]
    texts = {text for i in range(NO_CAPTION) for j, long in enumerate(LONG[i]) for text in (long, *stored_texts(i, j))}
    assert record.num_captions == sum(map(len, LONG)) * (1 + VIEWS) and record.num_distinct_captions == len(texts)


def test_the_first_sentence_is_stored_with_its_full_stop(shards: Path, teacher: Path, tmp_path: Path) -> None:
    store = opened(shards, make(shards, teacher, tmp_path, CaptionOptions("first"), 1), CaptionOptions("first"))
    draw = store.draw(store.index.read(7), 0, (0, 7))
    assert draw.caption_short.tolist() == CaptionTokenizer()(["一只狗坐着。"])[0, : len(draw.caption_short)].tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("captions", "field"),
    [
        (NO_SAMPLING, r"captions\.short is sampled there and given here"),
        (replace(SAMPLED, drop_first=1.0), r"captions\.drop_first is 0\.5 there and 1\.0 here"),
        (replace(SAMPLED, keep=(0.0, 0.8)), r"captions\.keep is \(0\.2, 0\.8\) there and \(0\.0, 0\.8\) here"),
        (replace(SAMPLED, shuffle=False), r"captions\.shuffle is True there and False here"),
    ],
)
def test_other_captions_are_refused_by_field(shards: Path, made: Path, captions: CaptionOptions, field: str) -> None:
    with pytest.raises(InputError, match=rf"\Ateacher cache [^\n]* does not fit: {field}; [^\n]*\Z"):
        opened(shards, made, captions)
    opened(shards, made, replace(SAMPLED, max_shift=9, target="full"))  # which no text depends on
    opened(shards, made, None)


def test_a_cache_from_before_is_as_valid_as_it_was(shards: Path, teacher: Path, tmp_path: Path) -> None:
    folder = make(shards, teacher, tmp_path / "cache", NO_SAMPLING, 1)
    path = folder / CACHE_MANIFEST
    content = json.loads(path.read_text())
    assert content["settings"].pop("captions") and content["settings"].pop("caption_views") == 1
    assert content["settings"].pop("sentences") is False and len(content.pop("sha256")) == 64
    path.write_text(json.dumps(content))
    opened(shards, folder, NO_SAMPLING).draw(ShardIndex([shards / "a.tar"]).read(0), 0, (0, 0))
    with pytest.raises(InputError, match=r"captions\.short is given there and sampled here"):
        opened(shards, folder)
    settings, records = read_cache(folder)
    before = {name: value for name, value in dataclasses.asdict(settings).items() if name in content["settings"]}
    del before["teacher"], before["libraries"], before["ancestry"]
    digest = hashlib.sha256(json.dumps([before, [records["a.tar"].sha256]]).encode()).hexdigest()
    assert cache_sha256(folder, ["a.tar"]) == digest, "a run that began from it can be resumed"
    sidecar = (folder / "a.safetensors").read_bytes()
    make(shards, teacher, folder, NO_SAMPLING, 1)
    assert (folder / "a.safetensors").read_bytes() == sidecar


def test_a_caption_that_was_changed_is_named_and_its_sidecar_made_again(
    shards: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_shards(tmp_path / "shards")
    folder = make(data, teacher, tmp_path / "cache")
    before = (folder / "a.safetensors").read_bytes()
    changed = [[text.replace("thing 4", "thing 9") for text in texts] for texts in LONG]
    for path in data.iterdir():
        path.unlink()
    data.rmdir()
    write_shards(data, changed)
    with pytest.raises(InputError, match="shard sha256 is"):
        opened(data, folder)
    raw = replace(ShardIndex([shards / "a.tar"]).read(0), json=caption_member(changed[0], ["given"]))
    store = opened(shards, make(shards, teacher, tmp_path / "other"))
    with pytest.raises(InputError, match=r"captions of 000 are not those .* which makes a\.safetensors anew"):
        for epoch in range(VIEWS):
            store.draw(raw, 0, (epoch, 0))
    make(data, teacher, folder)
    assert (folder / "a.safetensors").read_bytes() != before
    opened(data, folder).draw(ShardIndex([data / "a.tar"]).read(0), 0, (0, 0))


# --- single sentences ---


@pytest.fixture(scope="module")
def with_sentences(tmp_path_factory: pytest.TempPathFactory, shards: Path, teacher: Path) -> Path:
    return make(shards, teacher, tmp_path_factory.mktemp("sentences"), sentences=True)


def test_the_drawn_sentences_come_with_the_teachers_features(
    shards: Path, with_sentences: Path, made: Path, teacher: Path
) -> None:
    store, model, plain = opened(shards, with_sentences, sub_captions=3), load_teacher(teacher), opened(shards, made)
    decoder = SampleDecoder((ViewSpec(48, "bicubic"),), AUGMENT, 0, store=store, sub_captions=3, captions=SAMPLED)
    longs = set()
    for number in range(NO_CAPTION):
        raw = store.index.read(number)
        for epoch in range(3):
            sample = decoder.decode(raw, epoch, number)
            assert sample.teacher is not None and len(sample.sub_captions) == 3
            with torch.no_grad():
                expected = model.encode_text(CaptionTokenizer()(sample.sub_captions), normalize=True).numpy()
            assert np.abs(expected - sample.teacher["sub"]).max() < 1e-3
            long = next(i for i, text in enumerate(LONG[number]) if all(s in text for s in sample.sub_captions))
            longs.add((number, long))
            draw, without = store.draw(raw, 0, (epoch, number)), plain.draw(raw, 0, (epoch, number))
            assert without.sub is None and np.array_equal(draw.long, without.long), "nothing else changes"
            assert np.array_equal(draw.short, without.short)
    assert len(longs) > NO_CAPTION, "sentences of first and of second captions"


def test_a_draw_reads_the_sentences_that_it_draws(
    shards: Path, with_sentences: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, read = opened(shards, with_sentences, sub_captions=2), []
    monkeypatch.setattr("training.cache.reader.has_caption", lambda *call: read.append(call[3]) or has_caption(*call))
    decoder = SampleDecoder((ViewSpec(48, "bicubic"),), AUGMENT, 0, sub_captions=2)
    raw = store.index.read(0)
    wanted = decoder.decode(raw, 0, 0).sub_captions
    monkeypatch.setattr("training.data.samples.split_sentences", lambda text: pytest.fail("split once more"))
    assert replace(decoder, store=store).decode(raw, 0, 0).sub_captions == wanted
    assert len(read) == 4, "the long caption, the short one, and two sentences of six"


def test_a_cache_without_sentences_is_refused_and_not_mixed(shards: Path, made: Path, teacher: Path) -> None:
    with pytest.raises(InputError, match=r"\Ateacher cache [^\n]* has no features of single sentences[^\n]*\Z"):
        opened(shards, made, sub_captions=3)
    with pytest.raises(InputError, match="sentences is False there and True now"):
        make(shards, teacher, made, sentences=True)


def test_sentences_that_were_changed_or_damaged_are_named(
    shards: Path, with_sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(with_sentences, tmp_path / "cache"))
    store = opened(shards, folder, sub_captions=3)
    raw = store.index.read(0)
    # another version of the code may split captions elsewhere
    with monkeypatch.context() as patch:
        patch.setattr("training.cache.reader.split_sentences", lambda text: [text])
        with pytest.raises(InputError, match=r"the sentences of 000 are not .* which makes a\.safetensors anew"):
            store.draw(raw, 0, (0, 0))
    with monkeypatch.context() as patch:
        patch.setattr(
            "training.cache.reader.split_sentences", lambda text: [f"{one} No" for one in split_sentences(text)]
        )
        with pytest.raises(InputError, match=r"the sentences of 000 are not .* which makes a\.safetensors anew"):
            store.draw(raw, 0, (0, 0))
    assert not list(Sidecar(folder / "a.safetensors").damage())
    arrays = load_file(folder / "a.safetensors")
    for name in ("sentence_rows", "sentence_offsets"):
        damaged = {key: value.copy() for key, value in arrays.items()}
        damaged[name][1] += 1
        save_file(damaged, folder / "a.safetensors", {"format": "compact-longclip sidecar, version 1"})
        assert list(Sidecar(folder / "a.safetensors").damage()), name
        damaged[name] = damaged[name][:-9]
        save_file(damaged, folder / "a.safetensors", {"format": "compact-longclip sidecar, version 1"})
        assert list(Sidecar(folder / "a.safetensors").damage()), name
