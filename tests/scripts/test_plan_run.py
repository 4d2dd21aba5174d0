"""The planner: its bytes are those of a written sidecar, its hours plain arithmetic, and its rates name their
source."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import plan_run
from longclip_teacher.config import TEACHERS
from longclip_teacher.errors import InputError
from plan_rates import Rate, Rates, find_rates
from plan_run import Options, break_even_epochs, plan, sidecar_bytes_per_sample
from training.cache.sidecar import CaptionRows, SampleEntry, write_sidecar
from training.data.transforms import Augmentation

RATES = Rates(Rate(100.0, ""), Rate(50.0, ""), Rate(10.0, ""))


@pytest.mark.parametrize(
    ("views", "num_ops", "embed_dim", "captions", "sentences"),
    [(1, 0, 512, 2, 0), (5, 2, 768, 6, 0), (0, 0, 128, 2, 0), (1, 0, 64, 2, 7)],
)
def test_the_bytes_are_those_of_a_written_sidecar(
    tmp_path: Path, views: int, num_ops: int, embed_dim: int, captions: int, sentences: int
) -> None:
    num_samples, stored, generator = 300, max(views, 1), np.random.default_rng(0)
    lengths = [*generator.integers(5, 115, num_samples * captions), *generator.integers(5, 25, num_samples * sentences)]
    tokens = [np.arange(length, dtype=np.uint16) for length in lengths]
    augmentation = Augmentation((0, 0, 9, 9), (("Rotate", 9.0),) * num_ops)
    entries = []
    for number in range(num_samples):
        rows = list(range(number * captions, (number + 1) * captions))
        half, first = captions // 2, num_samples * captions + number * sentences
        entries.append(
            SampleEntry(
                f"{number:012d}",
                (9, 9),
                1,
                [augmentation] * stored,
                long=rows[:half],
                short=rows[half:],
                sentences=[list(range(first, first + sentences))] if sentences else [],
            )
        )
    image_features = np.zeros((num_samples, stored, embed_dim), np.float16)
    features = CaptionRows(np.zeros((len(tokens), embed_dim), np.float16), tokens)
    write_sidecar(tmp_path / "a.safetensors", entries, num_ops, image_features, features)
    mean_tokens = float(np.mean(lengths[: num_samples * captions]))
    of_sentences = (sentences, float(np.mean(lengths[num_samples * captions :]))) if sentences else ()
    planned = num_samples * sidecar_bytes_per_sample(embed_dim, views, captions, mean_tokens, num_ops, *of_sentences)
    header = int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little") + 8
    # after the last sample, three or four offsets more, and the offset of what comes after the last caption
    assert (tmp_path / "a.safetensors").stat().st_size - header == pytest.approx(planned, abs=8 * 4 + 1)


def test_datacompdrs_bytes_are_the_published_ones() -> None:
    assert plan(Options(), RATES, 1000).datacompdr_bytes == 110_592_000


def test_hours_are_plain_arithmetic() -> None:
    options = Options(views=4, captions=3.0, epochs=6.0, gpus=2)
    one = plan(options, RATES, 3600)
    assert one.teacher_hours_cache == pytest.approx(4 / 100 + 3 / 50)
    assert one.teacher_hours_online == pytest.approx(6 * (1 / 100 + 2 / 50))
    assert one.training_hours == pytest.approx(6 / 10)
    assert one.total_hours_cache == pytest.approx(0.7) and one.total_hours_online == pytest.approx(0.9)
    assert one.days_cache == pytest.approx(0.7 / 2 / 24) and one.days_online == pytest.approx(0.9 / 2 / 24)


def test_sampled_captions_are_priced_as_captions_in_place_of_the_short_one() -> None:
    plain, sampled = (plan(Options(captions=captions), RATES, 3600) for captions in (2.0, 5.0))
    views = plan(Options(caption_views=4), RATES, 3600)
    assert views == sampled
    assert views.teacher_hours_cache - plain.teacher_hours_cache == pytest.approx(3 / 50)
    assert views.teacher_hours_online == plain.teacher_hours_online, "a step reads one of them"


def test_sentences_are_priced_by_their_tokens() -> None:
    """A sample of 120 tokens: a long caption of 101.4, whose 6 sentences have 18.6 with their start and end, and a
    short one of 18.6."""
    options = Options(sentences=6.0)
    assert options.sentence_tokens == pytest.approx(130 / 7)
    assert options.sentence_tokens + (6 * (options.sentence_tokens - 2) + 2) == pytest.approx(2 * 60)
    plain, sentences = (
        plan(Options(epochs=4.0), RATES, 3600),
        plan(dataclasses.replace(options, epochs=4.0), RATES, 3600),
    )
    of_a_sentence = 130 / 7 / 60 / 50
    assert sentences.teacher_hours_cache - plain.teacher_hours_cache == pytest.approx(6 * of_a_sentence)
    assert sentences.teacher_hours_online - plain.teacher_hours_online == pytest.approx(4 * 3 * of_a_sentence)
    width = TEACHERS["b16"].embed_dim
    more = 6 * (2 * width + 2 * 130 / 7 + 16) + 8
    assert sentences.cache_bytes - plain.cache_bytes == pytest.approx(3600 * more)
    slower = find_rates(Options(teacher="tiny", student="tiny", sentences=6.0))
    assert (
        slower.student_samples.per_second
        < find_rates(Options(teacher="tiny", student="tiny")).student_samples.per_second
    )


@pytest.mark.parametrize("views", [0, 1, 7])
def test_at_the_break_even_both_cost_the_same(views: int) -> None:
    options = Options(views=views, captions=5.0)
    at_break_even = dataclasses.replace(options, epochs=break_even_epochs(options, RATES))
    one = plan(at_break_even, RATES, 12345)
    assert one.total_hours_cache == pytest.approx(one.total_hours_online)
    later = plan(dataclasses.replace(at_break_even, epochs=at_break_even.epochs + 1), RATES, 12345)
    assert later.total_hours_cache < later.total_hours_online


def test_rates_without_a_measurement_come_from_flops_and_say_so() -> None:
    options = Options(teacher="tiny", student="tiny", gpu_tflops=1.0, teacher_utilisation=0.5, student_utilisation=0.25)
    rates = find_rates(options)
    config = TEACHERS["tiny"]
    tower, tokens = config.image, (config.image.size // config.image.patch) ** 2 + 1
    # 12 width^2 weights per block, each one multiplication and one addition per token; attention's two products are
    # extra
    blocks = tower.layers * tokens * (2 * 12 * tower.width**2 + 4 * tokens * tower.width)
    flops = 0.5e12 / rates.teacher_images.per_second
    assert blocks < flops < 1.6 * blocks  # the convolutional stem and the projection come on top
    assert "50% of 1 TFLOP/s" in rates.teacher_images.origin
    longer = find_rates(dataclasses.replace(options, mean_caption_tokens=120.0))
    assert 1.9 < rates.teacher_captions.per_second / longer.teacher_captions.per_second < 2.5
    assert rates.student_samples.per_second > longer.student_samples.per_second
    faster = find_rates(dataclasses.replace(options, gpu_tflops=2.0))
    assert faster.student_samples.per_second == pytest.approx(2 * rates.student_samples.per_second)


def test_the_pass_is_priced_for_several_kinds_of_gpu() -> None:
    options = Options(teacher="tiny", student="tiny", samples=3600.0)
    by_gpu = plan_run.hours_by_gpu(options, [plan(options, find_rates(options), 3600)])
    for kind, tflops in {"A100": 312.0, "L4": 121.0}.items():
        alone = dataclasses.replace(options, gpu_tflops=tflops)
        assert by_gpu[kind] == pytest.approx([plan(alone, find_rates(alone), 3600).teacher_hours_cache])
    given = dataclasses.replace(options, teacher_images_per_second="7")
    assert plan_run.hours_by_gpu(given, [plan(given, RATES, 3600)]) == {}


def write_bench(path: Path, **changes: object) -> Path:
    rows = [
        {"case": "mean 12 tokens", "unit": "captions/s", "ours": 900.0},
        {"case": "mean 56 tokens", "unit": "captions/s", "ours": 200.0},
        {"case": "mean 56 tokens, whole", "unit": "s", "ours": 3.0},
    ]
    path.write_text(json.dumps({"bench": "teacher-text", "rows": rows, **changes}))
    return path


def test_rates_are_read_from_a_benchs_json(tmp_path: Path) -> None:
    bench = write_bench(tmp_path / "text.json")
    options = Options(
        teacher_images_per_second="1e3",
        teacher_captions_per_second=f"{bench}:mean 56",
        student_samples_per_second="7",
    )
    rates = find_rates(options)
    assert rates.teacher_images == Rate(1000.0, "given")
    assert rates.teacher_captions == Rate(200.0, "measured: text.json, mean 56 tokens")
    one_row = [{"case": "x", "unit": "samples/s", "ours": 5}]
    single = write_bench(tmp_path / "one.json", rows=one_row)
    rates = find_rates(dataclasses.replace(options, student_samples_per_second=str(single)))
    assert rates.student_samples == Rate(5.0, "measured: one.json, x")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("fast", "give a number, or FILE.json:CASE"),
        ("0", "must be positive"),
        ("nan", "must be positive"),
        ("{folder}/gone.json", "cannot read"),
        ("{folder}/text.json:mean", "has 2 rates whose case contains 'mean': mean 12 tokens"),
        ("{folder}/text.json:whole", "has 0 rates "),
        ("{folder}/other.json:x", "was not written by scripts/bench.py"),
    ],
)
def test_a_rate_that_cannot_be_read_is_one_line(tmp_path: Path, value: str, message: str) -> None:
    write_bench(tmp_path / "text.json")
    write_bench(tmp_path / "other.json", rows=7)
    options = Options(teacher_images_per_second=value.format(folder=tmp_path))
    with pytest.raises(InputError, match=rf"\A--teacher-images-per-second[^\n]*{message}[^\n]*\Z"):
        find_rates(options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "b32"}, "--teacher b32: choose one of tiny, small, b16, l14"),
        ({"student": "s9"}, "--student s9: choose one of"),
        ({"views": -1}, "--views"),
        ({"caption_views": -1}, "--caption-views"),
        ({"caption_views": 3, "captions": 1.0}, "--caption-views 3 takes the place of a short caption"),
        ({"sentences": 0.5}, "--sentences 0.5: give 1 or more, or 0 to store none"),
        ({"sentences": float("nan")}, "--sentences nan"),
        ({"samples": 0}, "--samples 0"),
        ({"samples": 10.5}, "--samples 10.5: give a whole number"),
        ({"epochs": float("nan")}, "--epochs nan"),
        ({"gpu_tflops": 0.0}, "--gpu-tflops"),
        ({"mean_caption_tokens": 500.0}, "--mean-caption-tokens"),
        ({"student_utilisation": 1.5}, "utilisation"),
    ],
)
def test_options_that_mean_nothing_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(Options(), **changes).check()


def test_the_command_prints_and_writes_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = "--teacher-images-per-second 1000 --teacher-captions-per-second 4000 --student-samples-per-second 500"
    arguments = f"--teacher l14 --views 2 --epochs 5 {rates} --json {tmp_path}/plan.json"
    monkeypatch.setattr("sys.argv", ["plan_run.py", *arguments.split()])
    plan_run.main()
    printed = capsys.readouterr().out
    for text in ("1.2 million", "12 million", "1.28 billion", "500 samples/s per GPU, student (given)", "1.67 epochs"):
        assert text in printed
    assert "2 stored views for 5 epochs" in printed
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert [one["samples"] for one in figures["plans"]] == [1_200_000, 12_000_000, 1_280_000_000]
    assert figures["break_even_epochs"] == pytest.approx((2 / 1000 + 2 / 4000) / (1 / 1000 + 2 / 4000))
    assert figures["rates"]["student_samples"] == {"per_second": 500.0, "origin": "given"}
    monkeypatch.setattr("sys.argv", ["plan_run.py", *arguments.split(), "--samples", "1e3"])
    plan_run.main()
    assert [one["samples"] for one in json.loads((tmp_path / "plan.json").read_text())["plans"]] == [1000]
