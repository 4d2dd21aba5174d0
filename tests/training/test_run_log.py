"""What TensorBoard shows of a run besides its curves: the configuration as text, and pictures with captions found."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from training.main import main
from training.record.run_log import _code_block
from training.settings.tree import parse_config


def test_tensorboard_has_configuration_and_examples(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout)
    out_dir = tmp_path / "run"
    args = ["--run.max_steps", "2", "--run.eval_every", "1", "--run.global_batch_size", "36", "--data.num_workers", "0"]
    args += ["--teacher.checkpoint", "None", "--data.tests", "--data.zeroshot", "None", "--run.out_dir", str(out_dir)]
    monkeypatch.setattr(sys, "argv", ["training/main.py", *args])
    main()
    board = EventAccumulator(str(out_dir / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    (text,) = board.Tensors("config/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert shown == _code_block((out_dir / "config.toml").read_text())
    images = board.Images("val/pictures and the captions found")
    assert [image.step for image in images] == [1, 2]
    assert images[0].width == 160 + 760 + 3 * 16 and images[0].height >= 4 * (160 + 2 * 16)


def test_the_configuration_is_no_markup() -> None:
    config = parse_config(["--run.out_dir", "runs/``` <script>alert(1)</script> **a** [b](http://c)"])
    text = _code_block(f'out_dir = "{config.run.out_dir}"\n\n```\n# a heading\n')
    page = markdown_to_safe_html(text)
    assert page.count("<pre>") == page.count("<code>") == 1
    assert "&lt;script&gt;" in page and "```\n# a heading" in page
    assert not any(tag in page for tag in ("<script", "<strong", "<a ", "<h1"))
