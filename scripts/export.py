"""Write a trained model as files that other programs load, and check them before they are kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from eval.base.arguments import answer_early, read_options
from longclip_teacher.ancestry import describe_terms
from longclip_teacher.errors import InputError, run_command
from longclip_teacher.packages import ONNX, missing_packages

PACKAGES = (*ONNX, "tokenizers")
MOBILE_PACKAGES = {"executorch": "executorch", "coreml": "coremltools"}  # by option
OPENVINO = "openvino"


@dataclass
class Options:
    """Write a student or a teacher as a folder for ONNX Runtime, transformers.js and the hub.

    python scripts/export.py runs/quickstart/distilled --out model

    The folder holds both towers as ONNX graphs in float32 and with weights in half precision, the tokenizer, the
    preprocessing, the PyTorch weights, a model card and the sha256 of every file. Each graph is compared with the model
    at every length and several batch sizes. If one differs, the command fails and nothing is left.

    With --int8 it also holds graphs in int8, whose R@1 on pairs of pictures and captions may be one point below that of
    the float32 graphs. A run is judged by its validation set and calibrated by its training shards. A weight file needs
    --pairs and --calibration.
    """

    source: Annotated[str, tyro.conf.Positional]
    """A run folder, a weight file or a hub name."""
    out: Path
    """Folder to write. It must not exist, or be empty."""
    immich: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also write the files that immich's machine learning reads: textual/ and visual/."""

    open_clip: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also write a folder open_clip/ for open_clip. Its text towers are causal, or see their padding."""
    executorch: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also write the towers for telephones, executorch/*.pte for XNNPACK, compared with the model."""
    coreml: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also write coreml/*.mlpackage. Core ML runs on Apple's systems alone, so these are not compared."""

    int8: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also write graphs in int8, *_quantized.onnx, with as much in int8 as R@1 allows."""
    calibration: Path | None = None
    """With --int8: folder of pictures like those of its use, from which ranges are taken. By default, the run's
    training pictures."""
    pairs: Annotated[str | None, tyro.conf.arg(metavar="PROTOCOL:DIR")] = None
    """With --int8: retrieval set to judge it by, such as urban1k:data/Urban1k, of which the first 1,000 pictures count.
    By default, the run's validation set."""
    openvino: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also write the graphs as OpenVINO reads them: openvino/."""

    def check(self) -> None:
        """Raise InputError for a folder that is in use and for missing packages, before any work."""
        if self.out.is_file() or (self.out.is_dir() and any(self.out.iterdir())):
            raise InputError(f"--out {self.out} exists: name a new folder, or delete it")
        if missing := missing_packages(PACKAGES):
            raise InputError(f"export needs {', '.join(missing)}: pip install 'compact-longclip[export]'")
        for option, package in MOBILE_PACKAGES.items():
            if getattr(self, option) and missing_packages([package]):
                raise InputError(
                    f"--{option} needs {package}, best in an environment of its own (docs/deployment.md): "
                    f"pip install {package}"
                )
        if self.openvino and missing_packages([OPENVINO]):
            raise InputError(f"--openvino needs {OPENVINO}: pip install 'compact-longclip[export,openvino]'")
        for name in ("calibration", "pairs"):
            if getattr(self, name) is not None and not self.int8:
                raise InputError(f"--{name} is for int8 files: add --int8, or leave it out")


if __name__ == "__main__":
    answer_early(Options)  # --help and refused options end here: the imports below take seconds

import onnx
import torch
from rich import box
from rich.table import Table

from eval.base.consoles import plain_console
from exporting.card import model_card
from exporting.checks import FULL, HALF, Written, check_file
from exporting.folder import STEMS, write_manifest, write_settings
from exporting.half_weights import with_half_weights
from exporting.immich import write_immich
from exporting.int8_files import write_int8
from exporting.judged_pairs import Judge, calibration_pixels, judged_pairs
from exporting.measured import Measured, kind_of, measure, record_of_run, record_with_run, teacher_beside
from exporting.mobile_files import write_core_ml, write_executorch
from exporting.open_clip_folder import refuse_what_open_clip_cannot_say, write_open_clip
from exporting.openvino_files import write_openvino
from exporting.runtimes import num_bytes, runtime_encoder
from exporting.sources import Exported, load_source
from longclip_teacher.atomic_files import atomic_folder
from mobileclip_student import MobileCLIP
from mobileclip_student.onnx_graphs import image_graph, text_graph

_TABLE_WIDTH = 120
console = plain_console(stderr=True, soft_wrap=True)


def main() -> None:
    """Export, check, report."""
    options = read_options(Options)
    torch.set_num_threads(1)  # the milliseconds are those of one thread
    model = load_source(options.source)
    if options.open_clip:
        refuse_what_open_clip_cannot_say(model, options.source)
    pairs = judged_pairs(model, options.pairs) if options.int8 else None
    pixels = calibration_pixels(model, options.calibration) if options.int8 else None
    with atomic_folder(options.out) as folder:
        written = write_graphs(model, folder)
        if pairs is not None and pixels is not None:
            console.print(f"int8: judging by R@1 on {len(pairs.images)} pictures and their captions")
            encoders = (runtime_encoder(folder / f"onnx/{stem}.onnx") for stem in STEMS.values())
            judge = Judge(model, pairs, *encoders)
            written = [*judge.with_r1(written), *write_int8(model, folder, judge, pixels)]
        if options.openvino:
            console.print("comparing what OpenVINO makes of them with the model")
            written += write_openvino(model, folder, pairs)
        teacher = teacher_beside(model, console.print)
        console.print("timing, in turns with the PyTorch model")
        measured = measure(model, folder, written, teacher)
        record = record_of_run(model, measured, console.print)
        rows = table_rows(measured, folder, written)
        rows += mobile_rows(model, folder, options, list(rows[0]))
        write_settings(model, folder)
        if options.immich:
            write_immich(model, folder)
        if isinstance(model.unfused, MobileCLIP) and options.open_clip:
            console.print("comparing what open_clip loads with the model")
            write_open_clip(model.unfused, folder / "open_clip")
        card = model_card(model, rows, [f"`{one.name}`: {one.form}." for one in written if one.form], pairs)
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_manifest(folder)
    if record is not None:
        record_with_run(model, record, console.print)
    print_table([*rows, *teacher_rows(measured, list(rows[0]))])
    say = plain_console(soft_wrap=True).print
    say(f"Terms: {describe_terms(model.model.ancestry)}")
    say(f"Exported: {options.out}")


def write_graphs(model: Exported, folder: Path) -> list[Written]:
    """Write both towers in float32 and with half weights, each checked."""
    (folder / "onnx").mkdir()
    image_tower, text_tower = model.towers
    written = []
    for tower, stem in STEMS.items():
        console.print(f"exporting the {tower} tower and comparing it with the model")
        if tower == "image":
            graph = image_graph(image_tower, model.image_size)
        else:
            graph = text_graph(text_tower, model.context_length)
        for suffix, stored, bounds in (("", graph, FULL), ("_fp16", with_half_weights(graph), HALF)):
            path = folder / "onnx" / f"{stem}{suffix}.onnx"
            onnx.save(stored, path)
            onnx.checker.check_model(str(path))
            written.append(Written(f"onnx/{path.name}", tower, check_file(model, tower, path, bounds)))
    return written


def table_rows(measured: Measured, folder: Path, written: list[Written]) -> list[dict[str, str]]:
    """The table of files, each with its agreement and its milliseconds, beside the PyTorch model's."""
    has_r1 = any(one.r1 for one in written)
    rows = []
    for one in written:
        rows.append(
            {
                "file": one.name,
                "bytes": str(num_bytes(folder / one.name)),
                "cosine": f"{one.agreement.cosine:.7f}",
                "max diff": f"{one.agreement.difference:.1e}",
                **({"R@1 %": one.r1} if has_r1 else {}),
                "ms": f"{measured.costs[kind_of(one)][f'{one.tower}_ms']:.2f}",
                "torch ms": f"{measured.torch_cost[f'{one.tower}_ms']:.2f}",
            }
        )
    return rows


def teacher_rows(measured: Measured, columns: list[str]) -> list[dict[str, str]]:
    """The teacher's towers as they are once exported, in the same runtime."""
    if measured.teacher is None:
        return []
    return [
        dict.fromkeys(columns, "")
        | {
            "file": f"(the teacher's {tower} tower, ONNX)",
            "bytes": str(num_bytes),
            "ms": f"{measured.teacher_cost[f'{tower}_ms']:.2f}",
        }
        for tower, num_bytes in measured.teacher.tower_bytes.items()
    ]


def mobile_rows(model: Exported, folder: Path, options: Options, columns: list[str]) -> list[dict[str, str]]:
    """Write the files for telephones, and return their rows of the table."""
    rows = []
    if options.executorch:
        console.print("writing ExecuTorch files and comparing them with the model")
        rows += write_executorch(model, folder)
    if options.coreml:
        console.print("writing Core ML packages")
        rows += write_core_ml(model, folder)
    return [dict.fromkeys(columns, "") | row for row in rows]


def print_table(rows: list[dict[str, str]]) -> None:
    """Print the table on stdout."""
    caption = "ms: batch 1, one CPU thread, captions of 100 tokens, medians, called in turns"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=caption, caption_justify="left")
    for number, head in enumerate(rows[0]):
        table.add_column(head, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    wide = plain_console()
    wide.width = max(wide.width, _TABLE_WIDTH)  # a narrower terminal breaks the lines instead of losing figures
    wide.print(table)


if __name__ == "__main__":
    run_command(main)
