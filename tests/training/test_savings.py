"""Speed-ups leave the training unchanged: stored features against the teacher online, each switch on and off."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from training.main import main
from training.record.run_log import read_metrics
from training.settings.options import EMBEDDED_DATA, EMBEDDED_TEACHER, Savings, SpeedOptions

STEPS = 3
# Adam's first steps have one size whatever the gradient's: a small rate keeps rounding from becoming a difference
COMMON = [
    "--optim.lr", "1e-4", "--run.max_steps", str(STEPS), "--run.global_batch_size", "48", "--run.log_every", "1",
    "--data.num_workers", "0", "--data.val", "None", "--data.zeroshot", "None", "--data.tests",
    "--loss.crd_long", "4", "--loss.crd_short", "1", "--loss.teacher_scale", "30",
    "--loss.fd_image", "15.6", "--loss.fd_text", "15.6",
]  # fmt: skip
SAMPLED = ["--captions.short", "sampled", "--captions.keep", "0.3", "0.9"]
LOSSES = ("clip_long", "clip_short", "crd_long", "crd_short", "vrd_long", "vrd_short", "fd_image", "fd_text", "loss")


def train(out_dir: Path, *arguments: str) -> list[dict[str, float]]:
    """Return the logged rows of a short run of the default preset, with relational and feature losses beside its
    own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["main.py", "--run.out_dir", str(out_dir), *COMMON, *arguments])
        main()
    rows = read_metrics(out_dir)
    assert len(rows) == STEPS
    return rows


def largest_difference(ours: list[dict[str, float]], reference: list[dict[str, float]]) -> float:
    assert all(set(LOSSES) <= set(row) for row in (*ours, *reference))
    return max(abs(a[name] - b[name]) for a, b in zip(ours, reference, strict=True) for name in LOSSES)


@pytest.fixture(scope="module")
def cache(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(checkout, tmp_path_factory.mktemp("cache") / "two_views")


@pytest.fixture(scope="module")
def cache_of_samples(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with three sampled captions in place of the short one, and with single sentences."""
    more = *SAMPLED, "--caption-views", "3", "--sentences"
    return make_cache(checkout, tmp_path_factory.mktemp("cache") / "sampled", *more)


def make_cache(checkout: Path, folder: Path, *more: str) -> Path:
    import cache_teacher

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(checkout)
        shards = f"{EMBEDDED_DATA}/train/*.tar"
        arguments = ["--shards", shards, "--teacher", EMBEDDED_TEACHER, "--out", str(folder), "--views", "2"]
        patch.setattr(sys, "argv", ["cache_teacher.py", *arguments, "--num-workers", "0", *more])
        cache_teacher.main()
    return folder


@pytest.fixture
def in_checkout(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)


@pytest.mark.usefixtures("in_checkout")
class TestStoredFeatures:
    def test_training_from_the_cache_is_training_with_the_teacher_online(self, cache: Path, tmp_path: Path) -> None:
        stored = train(tmp_path / "stored", "--teacher.cache", str(cache))
        online = train(tmp_path / "online", "--teacher.cache", str(cache), "--teacher.stored_features", "False")
        assert largest_difference(stored, online) < 1e-3
        assert largest_difference(stored[:1], stored[1:2]) > 1e-2, "the steps differ, so that equality means something"

    @pytest.mark.parametrize("target", ["sampled", "full"])
    def test_sampled_captions_train_alike_from_the_cache_and_online(
        self, cache: Path, cache_of_samples: Path, tmp_path: Path, target: str
    ) -> None:
        """The stored variants; or any cache if all that is read of it is the feature of the full caption. Single
        sentences are drawn from the same captions."""
        folder = cache_of_samples if target == "sampled" else cache
        arguments = ["--teacher.cache", str(folder), *SAMPLED, "--captions.target", target, "--captions.max_shift", "9"]
        losses = ["clip_sub", "icl_sub", "vrd_sub"] if target == "sampled" else ["clip_sub"]  # that the cache allows
        for name in losses:
            arguments += [f"--loss.{name}", "1"]
        stored = train(tmp_path / "stored", *arguments)
        online = train(tmp_path / "online", *arguments, "--teacher.stored_features", "False")
        assert largest_difference(stored, online) < 1e-3
        assert all(abs(a[name] - b[name]) < 1e-3 for a, b in zip(stored, online, strict=True) for name in losses)
        given = train(tmp_path / "given", "--teacher.cache", str(cache))
        others = [abs(a["vrd_short"] - b["vrd_short"]) for a, b in zip(stored, given, strict=True)]
        assert max(others) > 1e-2, "short captions say something else"

    def test_the_teacher_is_not_loaded_and_need_not_be_named(self, cache: Path, tmp_path: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("training.build.load_model", lambda *_, **__: pytest.fail("the teacher was loaded"))
            named = train(tmp_path / "named", "--teacher.cache", str(cache))
            unnamed = train(tmp_path / "unnamed", "--teacher.cache", str(cache), "--teacher.checkpoint", "None")
        assert largest_difference(named, unnamed) == 0

    def test_its_features_are_projected_where_widths_differ(self, cache: Path, tmp_path: Path) -> None:
        rows = train(tmp_path / "fd", "--teacher.cache", str(cache), "--student.embed_dim", "64")
        assert rows[0]["fd_image"] > 0

    def test_two_epochs_see_two_views(self, cache: Path, tmp_path: Path) -> None:
        """300 samples are 6 steps of 48, so the seventh step begins the second epoch."""
        arguments = ["--run.max_steps", "7", "--optim.lr", "1e-9", "--data.epoch_samples", "48"]
        with pytest.MonkeyPatch.context() as patch:
            argv = ["main.py", "--run.out_dir", str(tmp_path / "run"), *COMMON, "--teacher.cache", str(cache)]
            patch.setattr(sys, "argv", [*argv, *arguments])
            main()
        losses = [row["crd_long"] for row in read_metrics(tmp_path / "run")]
        assert len(set(losses)) == len(losses)

    def test_the_cache_exported_as_datacompdr_trains_the_same(self, cache: Path, tmp_path: Path) -> None:
        import export_datacompdr

        shards = tmp_path / "dr"
        arguments = ["--shards", f"{EMBEDDED_DATA}/train/*.tar", "--cache", str(cache), "--out", str(shards)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["export_datacompdr.py", *arguments])
            export_datacompdr.main()
        ours = train(tmp_path / "ours", "--teacher.cache", str(cache))
        theirs = train(
            tmp_path / "theirs", "--data.shards", f"{shards}/*.tar", "--teacher.cache", "datacompdr",
            "--teacher.checkpoint", "no_such_teacher",
        )  # fmt: skip
        assert largest_difference(theirs, ours) < 1e-4

    @pytest.mark.parametrize(
        ("arguments", "field"),
        [
            (["--augment.scale", "0.5", "1.0"], "augment.scale"),
            (["--augment.centre", "True"], "augment.centre"),
            (["--teacher.checkpoint", "other.safetensors"], "teacher sha256"),
            (["--captions.short", "sampled"], "captions.short"),
        ],
    )
    def test_a_cache_that_does_not_fit_is_refused_by_field(
        self, cache: Path, tmp_path: Path, arguments: list[str], field: str, checkout: Path
    ) -> None:
        from longclip_teacher import create_teacher, save_teacher
        from longclip_teacher.errors import InputError

        if not (checkout / "other.safetensors").exists():
            save_teacher(create_teacher("tiny"), checkout / "other.safetensors")
        with pytest.raises(InputError, match=field.replace(".", r"\.")):
            train(tmp_path / "run", "--teacher.cache", str(cache), *arguments)


# Largest difference of a loss over the first steps. All entries but the first are rounding, which grows with the loss:
# they are for losses of up to 20, and the sum of all, about 80, may differ as much more as it is larger.
SWITCHES = {
    "fast_decode": 0.01,  # the boards' pixels differ by at most 2 of 255 levels
    "fast_tokenizer": 0.0,
    "trim": 1e-4,
    "streaming_losses": 1e-4,
    "channels_last": 1e-4,
    "fused_adamw": 1e-4,
    "keep_memory": 0.0,
}


def largest_scaled(ours: list[dict[str, float]], reference: list[dict[str, float]]) -> float:
    pairs = [(a[name], b[name]) for a, b in zip(ours, reference, strict=True) for name in LOSSES]
    return max(abs(a - b) / max(1, abs(b) / 20) for a, b in pairs)


@pytest.fixture(scope="module")
def everything_on(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(checkout)
        return train(tmp_path_factory.mktemp("on") / "run")


@pytest.mark.usefixtures("in_checkout")
class TestSwitches:
    @pytest.mark.parametrize("name", SWITCHES)
    def test_on_equals_off(self, name: str, everything_on: list[dict[str, float]], tmp_path: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SpeedOptions, "savings", replace(Savings(), **{name: False}))
            off = train(tmp_path / "off")
        assert largest_scaled(off, everything_on) <= SWITCHES[name]
        saved = json.loads((tmp_path / "off" / "environment.json").read_text())
        assert saved["world_size"] == 1

    def test_every_switch_has_its_test(self) -> None:
        assert {field.name for field in fields(Savings)} == set(SWITCHES)

    def test_the_reference_turns_all_off_and_trains_the_same(
        self, everything_on: list[dict[str, float]], tmp_path: Path
    ) -> None:
        assert asdict(SpeedOptions().savings) == dict.fromkeys(SWITCHES, True)
        assert asdict(SpeedOptions(reference=True).savings) == dict.fromkeys(SWITCHES, False)
        reference = train(tmp_path / "reference", "--speed.reference", "True")
        assert 0 < largest_scaled(reference, everything_on) <= max(SWITCHES.values())
