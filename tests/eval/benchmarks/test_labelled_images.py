from __future__ import annotations

import io
import tarfile
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from open_clip import IMAGENET_CLASSNAMES
from PIL import Image

from eval.benchmarks.dataset_names import DatasetName
from eval.benchmarks.imagenet_classes import IMAGENET_SETS, imagenet_synsets
from eval.benchmarks.labelled_images import find_labelled_images
from longclip_teacher.errors import InputError

CIFAR10_NAMES = "airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n"


def make_folders(root: Path, names: list[str]) -> Path:
    """Write one empty `.png` per class. Finding pictures does not open them."""
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "1.png").touch()
    (root / "README.txt").touch()
    return root


def write_cifar10(root: Path, records: list[bytes], name: str = "test_batch.bin") -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "batches.meta.txt").write_text(CIFAR10_NAMES)
    (root / name).write_bytes(b"".join(records))


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_two_hundred_classes_are_timms(name: str) -> None:
    entry, synsets = IMAGENET_SETS[name], imagenet_synsets()
    listed = (files("timm.data") / "_info" / f"{name}_synsets.txt").read_text().split()
    assert entry.folders() == listed and len(set(listed)) == 200
    assert entry.classnames() == [IMAGENET_CLASSNAMES[synsets.index(synset)] for synset in listed]


def test_published_counts() -> None:
    counts = {name: entry.num_images for name, entry in IMAGENET_SETS.items()}
    assert counts == {
        "imagenet": 50_000,
        "imagenet_v2": 10_000,
        "imagenet_a": 7_500,
        "imagenet_r": 30_000,
        "imagenet_sketch": 50_889,
    }


@pytest.mark.parametrize("name", ["imagenet", "imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch"])
def test_a_whole_set_by_name(name: DatasetName, tmp_path: Path) -> None:
    entry = IMAGENET_SETS[name]
    labelled = find_labelled_images(make_folders(tmp_path, entry.folders()), dataset=name)
    assert labelled.name == name and labelled.classnames == entry.classnames()
    assert labelled.files is not None and len(labelled.files) == len(entry.folders())
    for path, number in labelled.files:  # a class is called what its folder's name says
        place = int(path.parent.name) if name == "imagenet_v2" else imagenet_synsets().index(path.parent.name)
        assert labelled.classnames[number] == IMAGENET_CLASSNAMES[place]
    assert labelled.count_mismatch(entry.num_images) is None
    mismatch = labelled.count_mismatch(len(labelled.files))
    assert mismatch is not None and f"{entry.title} has {entry.num_images} pictures" in mismatch


@pytest.mark.parametrize("name", ["imagenet", "imagenet_v2"])
def test_auto_finds_out_what_is_whole(name: str, tmp_path: Path) -> None:
    labelled = find_labelled_images(make_folders(tmp_path, IMAGENET_SETS[name].folders()))
    assert (labelled.name, labelled.num_expected) == (name, IMAGENET_SETS[name].num_images)
    assert labelled.classnames == list(IMAGENET_CLASSNAMES)
    folder = find_labelled_images(tmp_path, dataset="folder")
    assert folder.num_expected is None and folder.classnames == sorted(
        path.name for path in tmp_path.iterdir() if path.is_dir()
    )


def test_numbers_that_are_not_the_thousand_are_ones_own_classes(tmp_path: Path) -> None:
    labelled = find_labelled_images(make_folders(tmp_path, [str(number) for number in range(12)]))
    assert labelled.classnames == sorted(str(number) for number in range(12)) and labelled.num_expected is None


@pytest.mark.parametrize(
    ("folders", "num_names"),
    [(range(12), 12), ([3, 11, 7], 12), (["000", "010", "002"], 1000), ([0], 5)],
)
def test_folders_named_by_numbers_are_called_by_that_line(
    folders: list[object], num_names: int, tmp_path: Path
) -> None:
    names = [f"class {number}" for number in range(num_names)]
    labelled = find_labelled_images(make_folders(tmp_path, list(map(str, folders))), names)
    assert labelled.files is not None and labelled.classnames == names
    assert {path.parent.name: names[number] for path, number in labelled.files} == {
        str(folder): f"class {int(str(folder))}" for folder in folders
    }
    assert labelled.name.endswith("classes' pictures)") == (len(list(folders)) < num_names)


def test_numbers_beyond_the_lines_go_by_their_order(tmp_path: Path) -> None:
    labelled = find_labelled_images(
        make_folders(tmp_path, [str(number) for number in range(1, 13)]), [f"class {number}" for number in range(1, 13)]
    )
    assert labelled.files is not None
    assert all(labelled.classnames[number] == f"class {path.parent.name}" for path, number in labelled.files)
    with pytest.raises(InputError, match="11 class names for the 12 class folders"):
        find_labelled_images(tmp_path, [str(number) for number in range(11)])


@pytest.mark.parametrize(
    ("folders", "given", "proposed"),
    [
        (["train/n01440764", "val/n01440764", "test/n01440764"], ".", "val"),
        (["train/cat", "train/dog", "Test/cat", "Test/dog"], ".", "Test"),
        (["train/cat"], ".", "train"),
        (["train/cat", "val"], ".", "train"),  # val/ itself holds loose pictures
        (["ILSVRC/Data/CLS-LOC/train/n01440764", "ILSVRC/Data/CLS-LOC/val/n01440764"], ".", "ILSVRC/Data/CLS-LOC/val"),
        (["ILSVRC/Data/CLS-LOC/train/n01440764", "ILSVRC/Annotations/x"], "ILSVRC", "ILSVRC/Data/CLS-LOC/train"),
        (["ILSVRC2012/n01440764", "ILSVRC2012/n01443537"], ".", "ILSVRC2012"),
        (["a/n01440764", "b/n01443537"], ".", "a"),
    ],
)
def test_the_folder_above_is_refused_and_the_right_one_named(
    folders: list[str], given: str, proposed: str, tmp_path: Path
) -> None:
    root = make_folders(tmp_path / "set", folders)
    (root / "ILSVRC/Annotations/x/1.png").unlink(missing_ok=True)
    with pytest.raises(InputError, match=f"is a level too high: .*: give {root / proposed}$") as caught:
        find_labelled_images(root / given)
    assert "\n" not in str(caught.value)
    assert find_labelled_images(root / proposed).files
    if "n01440764" in folders[0]:
        with pytest.raises(InputError, match="is a level too high"):
            find_labelled_images(root / given, dataset="imagenet")


def test_shards_in_parts_are_a_level_too_high(tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "0.tar").touch()
    with pytest.raises(InputError, match=f"give {tmp_path / 'val'}$"):
        find_labelled_images(tmp_path)
    assert find_labelled_images(tmp_path / "val").shards


def test_classes_with_folders_of_their_own_and_classes_called_train(tmp_path: Path) -> None:
    make_folders(tmp_path / "nested", ["cat/left", "cat/right", "dog/left"])
    assert find_labelled_images(tmp_path / "nested").classnames == ["cat", "dog"]
    make_folders(tmp_path / "trains", ["car", "train"])
    assert find_labelled_images(tmp_path / "trains").classnames == ["car", "train"]
    make_folders(tmp_path / "parts", ["test", "train"])  # loose pictures: classes only if one says so
    with pytest.raises(InputError, match="is a level too high"):
        find_labelled_images(tmp_path / "parts")
    assert find_labelled_images(tmp_path / "parts", dataset="folder").classnames == ["test", "train"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("imagenet_a", "n01498041", r"is not ImageNet-A: 1 of its 200 .* missing, the first: n01498041 \(stingray\)"),
        ("imagenet_v2", "7", r"is not ImageNet-V2: 1 of its 1000 .* missing, the first: 7 "),
        ("imagenet_r", None, "is not ImageNet-R: 1 folders are not among its 200 classes, the first: n01440765"),
    ],
)
def test_a_folder_that_does_not_fit(name: DatasetName, change: str | None, message: str, tmp_path: Path) -> None:
    folders = [folder for folder in IMAGENET_SETS[name].folders() if folder != change]
    make_folders(tmp_path, folders if change else [*folders, "n01440765"])
    with pytest.raises(InputError, match=message) as caught:
        find_labelled_images(tmp_path, dataset=name)
    assert "\n" not in str(caught.value)


def test_other_names_for_a_known_set(tmp_path: Path) -> None:
    make_folders(tmp_path, IMAGENET_SETS["imagenet_a"].folders())
    names = [f"name {number}" for number in range(200)]
    assert find_labelled_images(tmp_path, names, "imagenet_a").classnames == names
    with pytest.raises(InputError, match="199 class names for the 200 classes of ImageNet-A"):
        find_labelled_images(tmp_path, names[1:], "imagenet_a")


def test_shards_of_a_known_set(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w"):
        pass
    labelled = find_labelled_images(tmp_path, dataset="imagenet_r")
    assert labelled.shards == [tmp_path / "0.tar"] and labelled.classnames == IMAGENET_SETS["imagenet_r"].classnames()
    with pytest.raises(InputError, match="--classnames"):
        find_labelled_images(tmp_path, dataset="folder")


def test_cifar_10_records(tmp_path: Path) -> None:
    """Return pixels of known value: plane, row and column are distinct, and a saved picture looks the same."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    records = [bytes([label]) + planes.tobytes() for label, planes in zip((9, 0, 5), pixels, strict=True)]
    write_cifar10(tmp_path / "cifar-10-batches-bin", records)
    for root in (tmp_path, tmp_path / "cifar-10-batches-bin"):
        labelled = find_labelled_images(root, dataset="cifar10")
        assert labelled.classnames == CIFAR10_NAMES.split() and labelled.num_expected == 10_000
        samples = [labelled.dataset(np.asarray)[index] for index in range(3)]
        assert [label for label, _ in samples] == [9, 0, 5]
        for (_, image), planes in zip(samples, pixels, strict=True):
            assert image[4, 7].tolist() == [planes[0, 4, 7], planes[1, 4, 7], planes[2, 4, 7]]
            np.testing.assert_array_equal(image, planes.transpose(1, 2, 0))
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            np.testing.assert_array_equal(np.asarray(Image.open(buffer)), planes.transpose(1, 2, 0))


def test_the_five_training_files(tmp_path: Path) -> None:
    for number in range(1, 6):
        write_cifar10(tmp_path, [bytes([number]) + bytes(3072)], f"data_batch_{number}.bin")
    labelled = find_labelled_images(tmp_path, dataset="cifar10", split="train")
    assert labelled.cifar is not None and labelled.cifar.targets.tolist() == [1, 2, 3, 4, 5]
    assert labelled.num_expected == 50_000


def test_cifar_100_has_the_fine_class(tmp_path: Path) -> None:
    root = tmp_path / "cifar-100-binary"
    root.mkdir()
    (root / "fine_label_names.txt").write_text("aquarium_fish\n" + "".join(f"c{number}\n" for number in range(99)))
    (root / "test.bin").write_bytes(bytes([7, 0]) + bytes(3072) + bytes([19, 99]) + bytes(3072))
    labelled = find_labelled_images(tmp_path, dataset="cifar100")
    assert labelled.cifar is not None and labelled.cifar.targets.tolist() == [0, 99]
    assert labelled.classnames[0] == "aquarium fish" and len(labelled.classnames) == 100


def test_cifars_python_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"cposix\nsystem\n.")
    for root in (tmp_path, tmp_path / "cifar-10-batches-py"):
        with pytest.raises(InputError, match=r"pickle and can run code: fetch .*cifar-10-binary\.tar\.gz") as caught:
            find_labelled_images(root, dataset="cifar10")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("record", "names", "message"),
    [
        (bytes(3000), CIFAR10_NAMES, "is not a CIFAR-10 file: it has 3000 bytes, not records of 3073"),
        (b"", CIFAR10_NAMES, "is not a CIFAR-10 file: it has 0 bytes"),
        (bytes([10]) + bytes(3072), CIFAR10_NAMES, "picture 0 of the test split has class 10, but CIFAR-10 has 10"),
        (bytes(3073), "cat\ndog\n", "has 2 class names, but CIFAR-10 has 10"),
        (None, CIFAR10_NAMES, r"no test_batch\.bin in .*fetch the binary version"),
    ],
)
def test_a_damaged_cifar(record: bytes | None, names: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "batches.meta.txt").write_text(names)
    if record is not None:
        (tmp_path / "test_batch.bin").write_bytes(record)
    with pytest.raises(InputError, match=message):
        find_labelled_images(tmp_path, dataset="cifar10")
