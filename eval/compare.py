"""Compare several models on several tests: one table, one JSON, one page, with confidence intervals.

python eval/compare.py teacher=longclip-b student=runs/distil --protocols urban=urban1k:data/Urban1k --out runs/table
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import tyro

from eval.base.arguments import answer_early, read_options
from eval.towers.encoding_options import EncodingOptions
from longclip_teacher.errors import InputError, run_command


@dataclass
class Options(EncodingOptions):
    """Compare models on the same tests: table.md, results.json and a self-contained report.html in --out.

    python eval/compare.py longclip-b runs/distil --protocols urban=urban1k:data/Urban1k coco=coco2017val:data/coco
    python eval/compare.py teacher=longclip-b student=runs/s0,runs/s1,runs/s2 --protocols urban=urban1k:data/Urban1k
    python eval/compare.py full=runs/s0 cut=runs/s0@context_length=77 --protocols urban=urban1k:data/Urban1k

    NAME=A,B,C are runs of one model with different seeds, and its figures are means. --out keeps every measurement: an
    interrupted comparison resumes, and another model costs only its own time.
    """

    models: tyro.conf.Positional[tuple[str, ...]] = ()
    """Each is a checkpoint (a weight file, a run folder, a hub name, an open_clip name), NAME=CHECKPOINT, or several
    seeds of one model: NAME=CHECKPOINT,CHECKPOINT,... The others are compared with the first. Settings may follow an @,
    for all seeds of the entry: context_length=N, pad_mask=True|False, variant=V (published students) and activation=A
    (CLIP teachers), as in official=mobileclip_s0.pt@variant=s0,context_length=248,pad_mask=True."""
    protocols: tuple[str, ...] = ()
    """Retrieval tests, each NAME=PROTOCOL:FOLDER, such as urban=urban1k:data/Urban1k; `python eval/retrieval.py
    --protocol list` explains the protocols."""
    zeroshot: tuple[str, ...] = ()
    """Classification tests, each NAME=FOLDER of class folders, such as imagenet=data/imagenet/val."""
    out: Path = Path("runs/compare")
    """Folder of the results."""
    teacher: str | None = None
    """Name of one of the models: also report how well the features of the others agree with it."""
    behaviour: bool = False
    """Also measure what the models read of long captions, as eval/long_captions.py does: the page then leads with how
    many tokens each uses and what edits cost it. This takes about as long as 40 passes over the captions."""
    num_failures: int = 2
    """Worst failures shown for each model, test and direction."""

    def check(self) -> None:
        """Raise InputError for options that cannot work, before any data is read."""
        super().check()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError("a comparison runs in one process: leave torchrun out, or share eval/retrieval.py's work")
        if not self.models:
            raise InputError("name at least one model: a checkpoint or NAME=CHECKPOINT")
        if not self.protocols and not self.zeroshot:
            raise InputError("name a test: --protocols NAME=PROTOCOL:FOLDER or --zeroshot NAME=FOLDER")
        if self.num_failures < 0:
            raise InputError(f"--num-failures {self.num_failures}: 0 or more")
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"--out {self.out} is a file: name a folder")


if __name__ == "__main__":
    answer_early(Options)  # --help and refused options end here: the imports below take seconds


from eval.agreement import agreement
from eval.base.consoles import plain_console
from eval.base.environment import environment_record
from eval.benchmarks.labelled_images import find_labelled_images
from eval.benchmarks.named_sets import is_plain_name, parse_sets, set_digest
from eval.benchmarks.protocols import RetrievalSet
from eval.command_line import show_recognised
from eval.measures.behaviour import measure_behaviour
from eval.measures.compare_measures import Kept, measure_retrieval, model_digest
from eval.measures.costs import cost_conditions, measure_costs
from eval.measures.retrieval_set import EncodedSet, encode_retrieval_set
from eval.measures.zeroshot import evaluate_zeroshot
from eval.pages.compare_page import comparison_report
from eval.pages.compare_tables import Comparison, comparison_json, comparison_markdown, summarise
from eval.pages.report import write_report
from eval.towers.feature_cache import FeatureCache
from eval.towers.models import ClipModel, describe_model, weights_file
from eval.towers.named_models import ReadSettings, parse_models
from longclip_teacher.atomic_files import write_json, write_text
from longclip_teacher.folder_lock import folder_lock

console = plain_console(stderr=True, soft_wrap=True)


def main() -> None:
    """Run the command."""
    options = read_options(Options)
    with folder_lock(options.out):
        write_comparison(options)


def write_comparison(options: Options) -> None:
    """Measure, write the files of --out, print the table."""
    comparison = compare(options)
    summary = summarise(comparison)
    markdown = comparison_markdown(comparison, summary)
    write_json(options.out / "results.json", comparison_json(comparison, summary))
    write_text(options.out / "table.md", markdown)
    write_report(options.out / "report.html", comparison_report(comparison, summary))
    plain_console(soft_wrap=True).print(markdown)
    console.print(f"Report: {options.out / 'report.html'}")


def compare(options: Options) -> Comparison:
    """Check everything, then measure. Measurements that --out already has are reused."""
    models = parse_models(options.models)
    if options.teacher is not None and options.teacher not in models:
        raise InputError(f"--teacher {options.teacher} is none of the models: {', '.join(models)}")
    sets = parse_sets(options.protocols, "--protocols")
    folders = parse_folders(options.zeroshot, taken=sets)
    for name in (*models, *sets, *folders):
        if not is_plain_name(name):
            raise InputError(f"{name!r} cannot name a file: use letters, digits, . _ + and -, as in NAME=...")
    console.print("checking every model and set")
    candidates = {
        name: [Candidate(options, checkpoint, model.settings) for checkpoint in model.checkpoints]
        for name, model in models.items()
    }
    for seeds in candidates.values():
        for candidate in seeds:
            candidate.check()
    work = Work(options, sets, folders, candidates)
    measured = {name: [work.measure(name, seed) for seed in range(len(seeds))] for name, seeds in candidates.items()}
    return Comparison(
        checkpoints={name: model.checkpoints for name, model in models.items()},
        settings={name: model.settings.given() for name, model in models.items()},
        read_as={name: seeds[0].read_as for name, seeds in candidates.items()},
        measured=measured,
        sets=sets,
        set_digests=work.digests,
        zeroshot=list(folders),
        costs=work.costs(),
        cost_conditions=cost_conditions(options.torch_device()),
        teacher=options.teacher,
        precision=options.precision,
        environment=environment_record(),
    )


def parse_folders(entries: Sequence[str], taken: Mapping[str, object]) -> dict[str, Path]:
    """Folders of class folders by name. Raises InputError for a folder without pictures."""
    folders: dict[str, Path] = {}
    for entry in entries:
        name, equals, place = entry.partition("=")
        if not (name and equals and place):
            raise InputError(f"--zeroshot {entry}: write NAME=FOLDER, such as imagenet=data/imagenet/val")
        if name in folders or name in taken:
            raise InputError(f"--zeroshot {entry}: {name} is named already, give each test a name of its own")
        find_labelled_images(place)
        folders[name] = Path(place)
    return folders


class Candidate:
    """A checkpoint that is loaded only when it is measured."""

    def __init__(self, options: Options, checkpoint: str, settings: ReadSettings) -> None:
        self.options, self.checkpoint, self.settings = options, checkpoint, settings
        self.digest = self.read_as = ""

    @cached_property
    def model(self) -> ClipModel:
        """The model in eval mode on the device."""
        return self.settings.load(self.checkpoint, self.options.torch_device())

    def check(self) -> None:
        """Load the model once: note its digest and description, or raise InputError if it cannot be loaded."""
        with show_recognised():
            self.digest, self.read_as = model_digest(self.model), describe_model(self.model)
        self.release()

    def release(self) -> None:
        """Free the model's memory."""
        self.__dict__.pop("model", None)


class Work:
    """The measurements, one model and one set at a time."""

    def __init__(
        self,
        options: Options,
        sets: Mapping[str, RetrievalSet],
        folders: Mapping[str, Path],
        candidates: Mapping[str, Sequence[Candidate]],
    ) -> None:
        self.options, self.sets, self.folders, self.candidates = options, sets, folders, candidates
        self.kept = Kept(options.out / "kept")
        self.encoding = replace(options.encoding(), cache=FeatureCache(options.out / "features"))
        self.digests = {name: set_digest(found) for name, found in sets.items()}
        self._teacher_features: dict[str, EncodedSet] = {}

    def measure(self, name: str, seed: int) -> dict[str, Any]:
        """All measurements of one checkpoint, by kind and by test name."""
        candidate = self.candidates[name][seed]
        console.print(f"{name}: {candidate.checkpoint}")
        result: dict[str, Any] = {"retrieval": {}, "zeroshot": {}, "agreement": {}, "behaviour": {}}
        for test in self.sets:
            for kind, measured in self._on_set(candidate, f"{name}.{seed}.{test}", test, name).items():
                result[kind][test] = measured
        for test in self.folders:
            result["zeroshot"][test] = self._on_folder(candidate, f"{name}.{seed}.{test}.zeroshot", test)
        candidate.release()
        return result

    def _on_set(self, candidate: Candidate, stem: str, test: str, name: str) -> dict[str, dict[str, Any]]:
        found, options = self.sets[test], self.options
        inputs: dict[str, Any] = {
            "model": candidate.digest,
            "set": self.digests[test],
            "protocol": found.name,
            "images": [str(path) for path in (found.images[0], found.images[-1])],
            "precision": self.encoding.precision,
        }
        features: list[EncodedSet] = []

        def encoded() -> EncodedSet:
            if not features:
                features.append(encode_retrieval_set(candidate.model, found, self.encoding))
            return features[0]

        def retrieval() -> dict[str, Any]:
            return measure_retrieval(candidate.model, found, encoded(), num_failures=options.num_failures)

        results = {"retrieval": self.kept.get(stem, inputs | {"num_failures": options.num_failures}, retrieval)}
        if options.teacher is not None and name != options.teacher:
            against = {"teacher": self.candidates[options.teacher][0].digest}
            results["agreement"] = self.kept.get(
                f"{stem}.agreement", inputs | against, lambda: agreement(self._teacher(test), encoded())
            )
        if options.behaviour:
            results["behaviour"] = self.kept.get(
                f"{stem}.behaviour", inputs, lambda: measure_behaviour(candidate.model, encoded(), self.encoding)
            )
        return results

    def _on_folder(self, candidate: Candidate, stem: str, test: str) -> dict[str, Any]:
        folder = self.folders[test]
        inputs = {"model": candidate.digest, "folder": str(folder), "precision": self.encoding.precision}
        return self.kept.get(stem, inputs, lambda: evaluate_zeroshot(candidate.model, folder, encoding=self.encoding))

    def _teacher(self, test: str) -> EncodedSet:
        """The teacher's features on a set, computed once."""
        assert self.options.teacher is not None
        if test not in self._teacher_features:
            teacher = self.candidates[self.options.teacher][0]
            self._teacher_features[test] = encode_retrieval_set(teacher.model, self.sets[test], self.encoding)
            teacher.release()
        return self._teacher_features[test]

    def costs(self) -> dict[str, dict[str, Any]]:
        """The cost of each model's first checkpoint. The models take turns, so all are measured together or none."""
        firsts = {name: seeds[0] for name, seeds in self.candidates.items()}
        inputs = {
            "models": {name: candidate.digest for name, candidate in firsts.items()},
            "conditions": cost_conditions(self.options.torch_device()),
        }

        def measure() -> dict[str, Any]:
            console.print("measuring what the models cost")
            files = {name: file for name, first in firsts.items() if (file := weights_file(first.checkpoint))}
            costs = measure_costs({name: candidate.model for name, candidate in firsts.items()}, files)
            for candidate in firsts.values():
                candidate.release()
            return {name: dict(cost) for name, cost in costs.items()}

        return self.kept.get("costs", inputs, measure)


if __name__ == "__main__":
    run_command(main)
