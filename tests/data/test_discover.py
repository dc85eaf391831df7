"""Every layout gives the right labels, or an error that says what to do."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from pathlib import Path

import pytest

from finetune.data.dataset import Dataset, Sample, Split
from finetune.data.discover import discover
from finetune.data.split import SplitConfig
from finetune.errors import DataError, ExitCode


def tree(root: Path, *paths: str) -> Path:
    """Make files (empty: discovery looks at names alone) and, for paths ending in ``/``, folders."""
    for path in paths:
        place = root / path
        if path.endswith("/"):
            place.mkdir(parents=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
    return root


def ants_and_bees(root: Path, split: str, number: int = 4) -> Path:
    return tree(root, *(f"{split}{name}/{n}.jpg" for name in ("ant", "bee") for n in range(number)))


def table(root: Path, text: str, *images: str) -> Path:
    tree(root, *images)
    (root / "labels.csv").write_text(text, encoding="utf-8")
    return root / "labels.csv"


def found(data: Path, fraction: float = 0.25, seed: int = 0) -> Dataset:
    return discover(data, SplitConfig(fraction, seed))


def refused(data: Path) -> DataError:
    with pytest.raises(DataError) as error:
        found(data)
    assert error.value.exit_code == ExitCode.DATA
    assert error.value.asked.startswith("--data ")
    assert error.value.fix.endswith((".", "?"))
    str(error.value).encode()  # any terminal can print it
    return error.value


def paths(dataset: Dataset, split: Split = "train") -> list[str]:
    return [sample.path for sample in dataset.of(split)]


# Layouts


def test_a_folder_with_all_three_splits(tmp_path: Path) -> None:
    for split in ("train/", "val/", "test/"):
        ants_and_bees(tmp_path, split, 2)
    dataset = found(tmp_path)
    assert dataset.classes == ("ant", "bee")
    assert dataset.root == tmp_path
    assert [(s.split, s.path, s.label) for s in dataset.samples] == [
        (split, f"{split}/{name}/{n}.jpg", label)
        for split in ("train", "val", "test")
        for label, name in enumerate(("ant", "bee"))
        for n in range(2)
    ]
    assert dataset.warnings == ()
    assert dataset.file(dataset.samples[0]) == tmp_path / "train/ant/0.jpg"


@pytest.mark.parametrize("alias", ["val", "valid", "validation", "Val", "VALID"])
def test_names_of_the_validation_split(tmp_path: Path, alias: str) -> None:
    ants_and_bees(tmp_path, "train/")
    ants_and_bees(tmp_path, f"{alias}/", 2)
    assert paths(found(tmp_path), "val") == [
        f"{alias}/{name}/{n}.jpg" for name in ("ant", "bee") for n in range(2)
    ]


def test_train_alone_is_split_by_class(tmp_path: Path) -> None:
    dataset = found(ants_and_bees(tmp_path, "train/", 8))
    assert dataset.counts("train") == [6, 6] and dataset.counts("val") == [2, 2]
    assert dataset.counts("test") == [0, 0]


def test_flat_folder_is_split_by_class(tmp_path: Path) -> None:
    dataset = found(ants_and_bees(tmp_path, "", 8))
    assert dataset.counts("train") == [6, 6] and dataset.counts("val") == [2, 2]
    assert not set(paths(dataset)) & set(paths(dataset, "val"))


def test_the_test_split_is_not_drawn_from(tmp_path: Path) -> None:
    ants_and_bees(tmp_path, "train/", 8)
    ants_and_bees(tmp_path, "test/", 3)
    dataset = found(tmp_path)
    assert dataset.counts("test") == [3, 3]
    assert all(path.startswith("train/") for path in paths(dataset, "val"))


def test_seed_and_fraction_reach_the_split(tmp_path: Path) -> None:
    ants_and_bees(tmp_path, "", 40)
    assert found(tmp_path, 0.5).counts("val") == [20, 20]
    assert paths(found(tmp_path, seed=0), "val") != paths(found(tmp_path, seed=1), "val")


def test_listing_order_of_the_file_system_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ants_and_bees(tmp_path, "", 12)
    before, scandir = found(tmp_path), os.scandir

    class Reversed:
        def __init__(self, path: Path) -> None:
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(os, "scandir", Reversed)
    assert found(tmp_path) == before


def test_nothing_is_written(tmp_path: Path) -> None:
    ants_and_bees(tmp_path, "", 4)

    def state() -> list[tuple[str, int]]:
        return [(str(path), path.stat().st_mtime_ns) for path in sorted(tmp_path.rglob("*"))]

    before = state()
    found(tmp_path)
    assert state() == before


def test_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ants_and_bees(tmp_path / "pics", "")
    monkeypatch.chdir(tmp_path)
    dataset = found(Path("pics"))
    assert dataset.root == tmp_path / "pics"
    monkeypatch.chdir("/")
    assert all(dataset.file(sample).is_file() for sample in dataset.samples)


# Which files


def test_every_extension_in_any_letter_case(tmp_path: Path) -> None:
    names = ["a.jpg", "b.JPG", "c.jpeg", "d.webp", "e.PNG", "f.bmp", "g.tif", "h.TIFF", "i.Gif"]
    tree(tmp_path, *(f"train/{c}/{n}" for c in ("ant", "bee") for n in names))
    ants_and_bees(tmp_path, "val/")
    assert found(tmp_path).counts("train") == [9, 9]


def test_hidden_things_and_junk_are_not_images(tmp_path: Path) -> None:
    ants_and_bees(tmp_path, "train/", 3)
    ants_and_bees(tmp_path, "val/", 3)
    before = found(tmp_path)
    tree(
        tmp_path,
        "train/ant/.ipynb_checkpoints/0-checkpoint.jpg",
        "train/.ipynb_checkpoints/0.jpg",
        "train/__MACOSX/ant/._0.jpg",
        "__MACOSX/train/ant/0.jpg",
        "train/ant/__MACOSX/0.jpg",
        "train/ant/Thumbs.db",
        "val/.DS_Store",
        ".git/0.jpg",
        "@eaDir/0.jpg",
        "train/@eaDir/ant/0.jpg",
        "train/$RECYCLE.BIN/0.jpg",
        "train/lost+found/",
        "val/System Volume Information/0.jpg",
    )
    assert found(tmp_path) == before


def test_images_in_sub_folders_belong_to_the_top_folder(tmp_path: Path) -> None:
    tree(tmp_path, "red/car/0.jpg", "red/bus/deep/0.jpg", "blue/car/0.jpg", "blue/1.jpg")
    dataset = found(tmp_path)
    assert dataset.classes == ("blue", "red")
    assert sorted(sample.path for sample in dataset.samples if sample.label == 1) == [
        "red/bus/deep/0.jpg",
        "red/car/0.jpg",
    ]


def test_a_folder_named_like_an_image_is_a_folder(tmp_path: Path) -> None:
    ants_and_bees(tmp_path, "", 3)
    tree(tmp_path, "ant/x.jpg/inside.png")
    every = [sample.path for sample in found(tmp_path).samples]
    assert "ant/x.jpg/inside.png" in every and "ant/x.jpg" not in every


def linked(root: Path) -> Path:
    """A data folder whose class folders are links to a store beside it."""
    ants_and_bees(root / "store", "", 3)
    (root / "data").mkdir()
    for name in ("ant", "bee"):
        (root / "data" / name).symlink_to(root / "store" / name)
    return root / "data"


def test_linked_folders_are_followed_where_that_is_allowed(tmp_path: Path) -> None:
    dataset = discover(linked(tmp_path), SplitConfig(0.25, 0), follow_links=True)
    assert len(dataset.samples) == 6
    assert {path.split("/")[0] for path in paths(dataset)} == {"ant", "bee"}


def test_linked_folders_out_of_the_data_are_refused_by_name(tmp_path: Path) -> None:
    error = refused(linked(tmp_path))
    assert error.found == (
        f"2 links lead out of the folder: 'ant' -> '{tmp_path}/store/ant', 'bee' -> '{tmp_path}/store/bee'"
    )
    assert error.fix == "Copy the files there, or add --set data.follow_links=true."


@pytest.mark.parametrize(
    "place", ["train", "val", "train/ant", "val/bee", "train/ant/deep", "train/ant/0.jpg"]
)
def test_a_link_out_of_the_data_is_refused_wherever_it_is(tmp_path: Path, place: str) -> None:
    for split in ("train/", "val/"):
        ants_and_bees(tmp_path / "data", split, 3)
    link = tmp_path / "data" / place
    if link.exists():
        link.rename(tmp_path / "moved")
    elif not link.suffix:
        tree(tmp_path / "moved", "9.jpg")
    link.symlink_to(tmp_path / "moved")
    error = refused(tmp_path / "data")
    assert error.found == f"1 link leads out of the folder: {place!r} -> '{tmp_path}/moved'"
    assert discover(tmp_path / "data", SplitConfig(0.25, 0), follow_links=True).num_classes == 2


def test_many_links_out_are_counted_and_the_first_named(tmp_path: Path) -> None:
    ants_and_bees(tmp_path, "", 3)
    for number in range(8):
        (tmp_path / f"ant/x{number}.jpg").symlink_to("/etc/passwd")
    error = refused(tmp_path)
    assert error.found.startswith("8 links lead out of the folder: 'ant/x0.jpg' -> '/etc/passwd', ")
    assert error.found.count("passwd") == 5 and error.found.endswith(" and 3 more")


def test_links_that_double_with_each_level_end_the_walk(tmp_path: Path) -> None:
    ants_and_bees(tmp_path, "", 3)
    for level in range(26):  # 2 ** 26 ways to the last
        folder = tmp_path / f"ant/{level}"
        folder.mkdir()
        for name in ("x", "y"):
            (folder / name).symlink_to(f"../{level + 1}")
    tree(tmp_path / "ant/26", "last.jpg")
    assert "in more than 100 ways" in refused(tmp_path).found


def test_nothing_behind_a_link_out_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, scandir, seen = linked(tmp_path), os.scandir, []

    def recorded(path: Path) -> object:
        seen.append(Path(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", recorded)
    refused(data)
    assert seen == [data]


def test_a_link_by_way_of_another_link_and_a_dead_link_out(tmp_path: Path) -> None:
    ants_and_bees(tmp_path / "data", "", 3)
    (tmp_path / "data/hop").symlink_to("..")  # a class folder, refused itself
    (tmp_path / "data/ant/x.jpg").symlink_to("../hop/elsewhere/x.jpg")
    assert refused(tmp_path / "data").found == (
        f"2 links lead out of the folder: 'ant/x.jpg' -> '{tmp_path}/elsewhere/x.jpg', 'hop' -> '{tmp_path}'"
    )


def test_a_folder_whose_name_begins_like_the_data_is_not_the_data(tmp_path: Path) -> None:
    ants_and_bees(tmp_path / "data", "", 3)
    tree(tmp_path / "data-secret", "0.jpg")
    (tmp_path / "data/ant/x.jpg").symlink_to(tmp_path / "data-secret/0.jpg")
    assert "data-secret" in refused(tmp_path / "data").found


def test_links_that_stay_inside_are_fine(tmp_path: Path) -> None:
    ants_and_bees(tmp_path / "real", "train/", 3)
    (tmp_path / "real/train/ant/again.jpg").symlink_to("../bee/0.jpg")
    (tmp_path / "real/train/cat").symlink_to(tmp_path / "real/train/bee")
    (tmp_path / "data").symlink_to("real")  # the data folder itself may be a link
    dataset = found(tmp_path / "data")
    assert dataset.classes == ("ant", "bee", "cat") and len(dataset.samples) == 10
    assert dataset.root == tmp_path / "data"


def test_links_that_are_not_read_do_not_matter(tmp_path: Path) -> None:
    ants_and_bees(tmp_path, "train/", 3)
    (tmp_path / "train/ant/README").symlink_to("/etc/passwd")
    for name in ("train/ant/.hidden.jpg", "train/.cache", "notes"):
        (tmp_path / name).symlink_to("/etc")
    assert len(found(tmp_path).samples) == 6


def test_plain_files_are_not_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resolving costs tens of microseconds a file: a million images would wait half a minute."""
    ants_and_bees(tmp_path, "", 3)
    monkeypatch.setattr(os.path, "realpath", None)
    assert len(found(tmp_path).samples) == 6


@pytest.mark.parametrize("target", [".", "..", "../..", "deep"])
def test_linked_folders_do_not_loop_or_borrow_from_other_classes(tmp_path: Path, target: str) -> None:
    ants_and_bees(tmp_path, "train/", 3)
    tree(tmp_path, "train/ant/deep/9.jpg")
    (tmp_path / "train/ant/deep/loop").symlink_to(Path("..") / target, target_is_directory=True)
    assert sum(sample.label == 0 for sample in found(tmp_path).samples) == 4
    assert sum(sample.label == 1 for sample in found(tmp_path).samples) == 3


def test_a_dead_link_is_kept_so_that_the_check_reports_it(tmp_path: Path) -> None:
    ants_and_bees(tmp_path, "", 3)
    (tmp_path / "ant/dead.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "ant/self.jpg").symlink_to(tmp_path / "ant/self.jpg")
    every = {sample.path for sample in found(tmp_path).samples}
    assert {"ant/dead.jpg", "ant/self.jpg"} <= every


def test_a_named_pipe_is_not_an_image(tmp_path: Path) -> None:
    ants_and_bees(tmp_path, "", 3)
    os.mkfifo(tmp_path / "ant/pipe.jpg")
    assert len(found(tmp_path).samples) == 6


@pytest.mark.parametrize("name", [b"ant/\xff.jpg", b"\xfc/0.jpg", b"ant/\xe9/0.jpg"])
def test_a_name_that_is_not_utf8_is_reported(tmp_path: Path, name: bytes) -> None:
    ants_and_bees(tmp_path, "", 3)
    tree(tmp_path, os.fsdecode(name))
    assert "\\udc" in refused(tmp_path).found


def test_other_files_need_no_utf8(tmp_path: Path) -> None:
    ants_and_bees(tmp_path, "", 3)
    tree(tmp_path, os.fsdecode(b"ant/\xff.txt"), os.fsdecode(b"ant/x.\xff"))
    dataset = found(tmp_path)
    assert len(dataset.samples) == 6
    str(dataset.warnings).encode()


def test_ignored_files_are_counted_in_a_warning(tmp_path: Path) -> None:
    ants_and_bees(tmp_path, "", 3)
    tree(tmp_path, "ant/a.mov", "bee/b.MOV", "bee/README", "0.jpg", "notes.txt")
    assert found(tmp_path).warnings == (
        "1 image directly in the data folder, outside the class folders, ignored.",
        "Files in the data folder that are not images are ignored: .mov (2), no extension (1).",
    )


# Classes


def test_classes_in_code_point_order_as_imagefolder(tmp_path: Path) -> None:
    names = ["b", "B", "10", "9", "é", "a b"]
    tree(tmp_path, *(f"{name}/{n}.jpg" for name in names for n in range(2)))
    assert found(tmp_path).classes == ("10", "9", "B", "a b", "b", "é")


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_that_a_split_lacks_shifts_no_index(tmp_path: Path, split: Split) -> None:
    tree(tmp_path, *(f"train/{name}/{n}.jpg" for name in ("ant", "bee", "cat") for n in range(4)))
    tree(tmp_path, *(f"{split}/{name}/{n}.jpg" for name in ("bee", "cat") for n in range(2)))
    dataset = found(tmp_path)
    assert dataset.classes == ("ant", "bee", "cat")
    assert {(s.path.split("/")[1], s.label) for s in dataset.of(split)} == {("bee", 1), ("cat", 2)}
    assert len(dataset.warnings) == 1
    assert "'ant'" in dataset.warnings[0] and split in dataset.warnings[0]


def test_an_empty_class_folder_in_val_is_a_missing_class(tmp_path: Path) -> None:
    ants_and_bees(tmp_path, "train/")
    tree(tmp_path, "val/ant/0.jpg", "val/bee/", "val/wasp/")
    dataset = found(tmp_path)
    assert dataset.counts("val") == [1, 0]
    assert any("'bee'" in warning for warning in dataset.warnings)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_that_training_does_not_know_is_refused(tmp_path: Path, split: str) -> None:
    ants_and_bees(tmp_path, "train/")
    ants_and_bees(tmp_path, f"{split}/")
    tree(tmp_path, f"{split}/ants/0.jpg")
    error = refused(tmp_path)
    assert "'ants'" in error.found and "did you mean 'ant'" in error.found and split in error.found


def test_one_class_is_refused(tmp_path: Path) -> None:
    assert "only one class, 'ant'" in refused(tree(tmp_path, "ant/0.jpg", "ant/1.jpg")).found


def test_a_folder_one_level_too_high_is_refused(tmp_path: Path) -> None:
    ants_and_bees(tmp_path, "unpacked/train/")
    assert refused(tmp_path).fix == f"Did you mean --data {tmp_path / 'unpacked'}?"


def test_an_empty_class_folder_in_training_is_refused(tmp_path: Path) -> None:
    ants_and_bees(tmp_path, "train/")
    assert "'train/wasp' holds no images" in refused(tree(tmp_path, "train/wasp/")).found


def test_a_class_folder_of_other_files_names_their_extensions(tmp_path: Path) -> None:
    ants_and_bees(tmp_path, "")
    tree(tmp_path, "wasp/0.mov", "wasp/1.mov", "wasp/deep/x.txt")
    assert "'wasp' holds no images, only .mov (2), .txt (1)" in refused(tmp_path).found


def test_a_single_image_cannot_be_split(tmp_path: Path) -> None:
    ants_and_bees(tmp_path, "")
    error = refused(tree(tmp_path, "wasp/0.jpg"))
    assert "'wasp'" in error.found and "both trained on and tested" in error.found
    assert "val/" in error.fix


def test_a_single_training_image_is_a_warning_when_val_is_given(tmp_path: Path) -> None:
    ants_and_bees(tmp_path, "train/")
    ants_and_bees(tmp_path, "val/")
    tree(tmp_path, "train/wasp/0.jpg", "val/wasp/0.jpg")
    assert found(tmp_path).warnings == ("1 class has a single training image: 'wasp'.",)


@pytest.mark.parametrize("name", ["a\nb", "a\x07", "a\u2028b", "a\\b", " "])
def test_class_names_that_are_refused(tmp_path: Path, name: str) -> None:
    ants_and_bees(tmp_path, "")
    assert repr(name) in refused(tree(tmp_path, f"{name}/0.jpg", f"{name}/1.jpg")).found


def test_class_names_that_only_look_dangerous_are_accepted(tmp_path: Path) -> None:
    names = ["=cmd()", "<script>", "NA", "007", "ant, red", "日本", "a.jpg"]
    tree(tmp_path, *(f"{name}/{n}.jpg" for name in names for n in range(2)))
    assert found(tmp_path).classes == tuple(sorted(names))


@pytest.mark.parametrize(
    ("name", "how"),
    [("Ant", ", and"), ("ant ", ", spaces"), ("ant\u00a0", ", spaces"), ("a\u200bnt", ", spaces")],
)
def test_classes_that_look_alike_are_a_warning(tmp_path: Path, name: str, how: str) -> None:
    tree(tmp_path, *(f"{folder}/{n}.jpg" for folder in (name, "ant", "bee") for n in range(2)))
    dataset = found(tmp_path)
    assert dataset.num_classes == 3
    [warning] = dataset.warnings
    assert "'ant'" in warning and f"differ only in letter case{how}" in warning


# Ambiguous folders


def test_class_folders_beside_train_are_ignored_with_a_warning(tmp_path: Path) -> None:
    ants_and_bees(tmp_path, "train/")
    ants_and_bees(tmp_path, "val/")
    tree(tmp_path, "wasp/0.jpg", "docs/")
    dataset = found(tmp_path)
    assert dataset.classes == ("ant", "bee")
    assert dataset.warnings == ("Beside 'train', these folders are ignored: 'docs', 'wasp'.",)


@pytest.mark.parametrize("split", ["val", "valid", "test"])
def test_a_split_without_train_is_refused(tmp_path: Path, split: str) -> None:
    ants_and_bees(tmp_path, f"{split}/")
    ants_and_bees(tmp_path, "")
    assert f"has '{split}' but no train folder" in refused(tmp_path).found


@pytest.mark.parametrize("second", ["valid", "VAL"])
def test_two_validation_folders_are_refused(tmp_path: Path, second: str) -> None:
    for split in ("train", "val", second):
        ants_and_bees(tmp_path, f"{split}/")
    error = refused(tmp_path)
    assert "more than one val folder" in error.found and repr(second) in error.found


def test_val_linked_to_train_is_refused(tmp_path: Path) -> None:
    ants_and_bees(tmp_path, "train/")
    (tmp_path / "val").symlink_to("train")
    assert "'train' and 'val' are the same folder" in refused(tmp_path).found


@pytest.mark.parametrize("content", ["", "ant/"])
def test_an_empty_validation_split_is_refused(tmp_path: Path, content: str) -> None:
    ants_and_bees(tmp_path, "train/")
    assert "'val" in refused(tree(tmp_path, f"val/{content}")).found


def test_images_without_class_folders_are_refused(tmp_path: Path) -> None:
    assert "images but no class folders" in refused(tree(tmp_path, "0.jpg", "1.jpg")).found


def test_images_directly_in_train_are_refused(tmp_path: Path) -> None:
    error = refused(tree(tmp_path, "train/0.jpg", "val/ant/0.jpg"))
    assert "'train' holds images but no class folders" in error.found


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert "no class folders and no images" in refused(tmp_path).found


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    assert "only .txt (1)" in refused(tree(tmp_path, "a.txt")).found


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    tree(tmp_path, "flowers/")
    error = refused(tmp_path / "flower")
    assert "does not exist" in error.found and "did you mean 'flowers'" in error.found
    assert error.asked == f"--data {tmp_path / 'flower'}"
    refused(tmp_path / "no" / "such")
    refused(tmp_path / os.fsdecode(b"\xff"))


@pytest.mark.parametrize("name", ["x.jpg", "labels.txt"])
def test_a_file_that_is_not_a_csv_file_is_refused(tmp_path: Path, name: str) -> None:
    assert "neither a folder, a zip or tar archive nor a CSV" in refused(tree(tmp_path, name) / name).found


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x.tar.bz2", "bzip2"),
        ("x.TXZ", "tar (xz)"),
        ("x.jpg.gz", "gzip"),
        ("x.7z", "7-Zip"),
        ("x.rar", "RAR"),
    ],
)
def test_an_archive_of_another_kind_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    error = refused(tree(tmp_path, name) / name)
    assert error.found == f"is a {kind} archive, and only zip, tar and tar.gz are read"
    assert error.fix.startswith("Unpack it first")


def test_a_folder_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ants_and_bees(tmp_path, "")
    scandir = os.scandir

    def closed(path: Path) -> object:
        if Path(path).name == "bee":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)  # chmod means nothing to root
    assert "'bee' cannot be read (Permission denied)" in refused(tmp_path).found


# CSV

FOUR = ("a.jpg", "b.jpg", "sub/c.jpg", "sub/d.jpg")


def test_csv_without_a_split_column(tmp_path: Path) -> None:
    dataset = found(table(tmp_path, "path,label\na.jpg,x\nb.jpg,x\nsub/c.jpg,y\nsub/d.jpg,y\n", *FOUR))
    assert dataset.root == tmp_path
    assert dataset.classes == ("x", "y")
    assert dataset.counts("train") == [1, 1] and dataset.counts("val") == [1, 1]
    assert all(dataset.file(sample).is_file() for sample in dataset.samples)


def test_csv_with_split_and_other_columns(tmp_path: Path) -> None:
    text = (
        "note,split,label,path\n1,train,y,a.jpg\n,TRAIN ,x,b.jpg\n"
        ',validation,x,sub/c.jpg\n"q,""r""",test,y,sub/d.jpg\n'
    )
    dataset = found(table(tmp_path, text, *FOUR))
    assert dataset.samples == (
        Sample("a.jpg", 1, "train"),
        Sample("b.jpg", 0, "train"),
        Sample("sub/c.jpg", 0, "val"),
        Sample("sub/d.jpg", 1, "test"),
    )
    assert len([warning for warning in dataset.warnings if "has no images of 1 class" in warning]) == 2


def test_csv_split_without_val_rows_is_split_off_from_train(tmp_path: Path) -> None:
    images = [f"{n}.jpg" for n in range(10)]
    rows = [f"{name},{'xy'[n % 2]},{'test' if n > 7 else 'train'}" for n, name in enumerate(images)]
    dataset = found(table(tmp_path, "\n".join(["path,label,split", *rows]), *images))
    assert [dataset.counts(split) for split in ("train", "val", "test")] == [[3, 3], [1, 1], [1, 1]]


def test_csv_and_folder_give_the_same_dataset(tmp_path: Path) -> None:
    ants_and_bees(tmp_path, "", 12)
    by_folder = found(tmp_path)
    rows = [f"{sample.path},{by_folder.classes[sample.label]}" for sample in reversed(by_folder.samples)]
    by_table = found(table(tmp_path, "\n".join(["path,label", *rows])))
    assert by_table == dataclasses.replace(by_folder, is_folder=False)


def test_csv_labels_are_text(tmp_path: Path) -> None:
    names = ("NA", "007", "1.0", "null", "nan", "True")
    images = [f"{n}.jpg" for n in range(2 * len(names))]
    rows = [f"{image},{name}" for image, name in zip(images, names * 2, strict=True)]
    assert found(table(tmp_path, "\n".join(["path,label", *rows]), *images)).classes == tuple(sorted(names))


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffpath,label\na.jpg,x\nb.jpg,x\nsub/c.jpg,y\nsub/d.jpg,y\n",
        "path,label\r\na.jpg,x\r\nb.jpg,x\r\nsub/c.jpg,y\r\nsub/d.jpg,y",
        'path, label\na.jpg, x\n\nb.jpg,"x "\n./sub/c.jpg,y\nsub//d.jpg,y\n\n',
        "label, path\nx, a.jpg\nx, b.jpg\ny, sub/c.jpg\ny, sub/d.jpg\n",
    ],
    ids=["byte order mark", "windows line ends", "spaces and blank lines", "spaces before paths"],
)
def test_csv_spellings_that_are_accepted(tmp_path: Path, text: str) -> None:
    dataset = found(table(tmp_path, text, *FOUR))
    assert dataset.classes == ("x", "y")
    assert sorted(sample.path for sample in dataset.samples) == sorted(FOUR)


def test_csv_absolute_paths_below_its_folder_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    tree(tmp_path / "real", *FOUR)
    places = [tmp_path / "link" / FOUR[0], *(tmp_path / "real" / name for name in FOUR[1:])]
    rows = [f"{place},{label}" for place, label in zip(places, "xxyy", strict=True)]
    text = "\n".join(["path,label", *rows])
    (tmp_path / "real/labels.csv").write_text(text)
    assert sorted(sample.path for sample in found(tmp_path / "link/labels.csv").samples) == sorted(FOUR)


def test_csv_faults_are_collected_with_line_numbers(tmp_path: Path) -> None:
    text = (
        'path,label,split,note\na.jpg,x,train,"two\nlines"\n'
        "gone.jpg,x,train,\n\nb.jpg,,train,\nb.jpg,../x,train,\nb.jpg,x,trian,\n,x,train,\n"
        "../b.jpg,x,train,\n/etc/passwd,x,train,\na.jpg,x,train,\nsub,x,train,\n"
    )
    error = refused(table(tmp_path, text, *FOUR))
    assert error.found == (
        "9 rows cannot be used:\n"
        "  line 4: 'gone.jpg' does not exist or is not a file\n"
        "  line 6: the label '' is empty\n"
        "  line 7: the label '../x' is a path, not a name\n"
        "  line 8: split 'trian' is not one of train, val, test; did you mean 'train'?\n"
        "  line 9: the path is empty\n"
        "  and 4 more"
    )


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("../out.jpg,x,train", "'../out.jpg' lies outside the folder of the CSV file"),
        ("/etc/passwd,x,train", "'/etc/passwd' lies outside the folder of the CSV file"),
        ("a.jpg,x,train", "'a.jpg' is listed twice"),
        ("a.jpg,y,train", "'a.jpg' is under two labels, 'x' and 'y'"),
        ("a.jpg,y,val", "'a.jpg' is under two labels, 'x' and 'y'"),
        ("./sub/../a.jpg,x,val", "'./sub/../a.jpg' is in train and again in val"),
        ("b.jpg", "the label '' is empty"),
        ("sub,x,train", "'sub' does not exist or is not a file"),
        ("b.jpg,a/b,train", "the label 'a/b' is a path, not a name"),
        ("b.jpg,..,train", "the label '..' is a path, not a name"),
        ("b.jpg,a\x07,train", "the label 'a\\x07' holds a control character or a line break"),
        ("a\x00.jpg,x,train", "'a\\x00.jpg' does not exist or is not a file"),
    ],
)
def test_each_csv_fault_alone_is_refused(tmp_path: Path, row: str, fault: str) -> None:
    (tmp_path.parent / "out.jpg").touch()
    error = refused(table(tmp_path, f"path,label,split\na.jpg,x,train\n{row}\n", *FOUR))
    assert error.found == f"1 row cannot be used:\n  line 3: {fault}"


def test_csv_links_out_are_named_once_a_folder(tmp_path: Path) -> None:
    tree(tmp_path / "store", "deep/0.jpg", "deep/1.jpg", "2.jpg")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/img").symlink_to(tmp_path / "store")
    text = "path,label\nimg/deep/0.jpg,x\nimg/deep/1.jpg,y\nimg/2.jpg,x\na.jpg,x\nb.jpg,y\nsub/c.jpg,y\n"
    file = table(tmp_path / "data", text, *FOUR)
    (tmp_path / "data/b.jpg").unlink()
    (tmp_path / "data/b.jpg").symlink_to("/etc/passwd")
    error = refused(file)
    assert error.found == (
        f"2 links lead out of the folder: 'b.jpg' -> '/etc/passwd', 'img' -> '{tmp_path}/store'"
    )
    assert error.fix == "Copy the files there, or add --set data.follow_links=true."
    assert len(discover(file, SplitConfig(0.25, 0), follow_links=True).samples) == 6


def test_csv_links_inside_and_a_linked_data_folder(tmp_path: Path) -> None:
    text = "path,label\na.jpg,x\nlink/c.jpg,x\nd.jpg,y\nb.jpg,y\n"
    table(tmp_path / "real", text, *FOUR)
    (tmp_path / "real/link").symlink_to("sub")
    (tmp_path / "real/d.jpg").symlink_to("sub/d.jpg")
    (tmp_path / "data").symlink_to("real")
    assert len(found(tmp_path / "data/labels.csv").samples) == 4


def test_csv_folders_are_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [f"{'xy'[n % 2]}/{n}.jpg" for n in range(50)]
    file = table(tmp_path, "\n".join(["path,label", *(f"{image},{image[0]}" for image in images)]), *images)
    realpath, calls = os.path.realpath, []

    def recorded(path: Path) -> str:
        calls.append(path)
        return realpath(path)

    monkeypatch.setattr(os.path, "realpath", recorded)
    assert len(found(file).samples) == 50
    assert len(calls) == 3  # the root and two folders


def test_csv_dead_and_endless_links_are_refused(tmp_path: Path) -> None:
    file = table(tmp_path, "path,label\nx.jpg,x\ny.jpg,y\n")
    (tmp_path / "x.jpg").symlink_to("nowhere")
    (tmp_path / "y.jpg").symlink_to("y.jpg")
    assert refused(file).found == (
        "2 rows cannot be used:\n  line 2: 'x.jpg' does not exist or is not a file\n"
        "  line 3: 'y.jpg' cannot be read (Too many levels of symbolic links)"
    )


def test_csv_path_longer_than_a_file_name_is_refused(tmp_path: Path) -> None:
    error = refused(table(tmp_path, f"path,label\n{'a' * 9000}.jpg,x\n", *FOUR))
    assert "cannot be read (File name too long)" in error.found and len(error.found) < 400


def test_csv_label_longer_than_a_folder_name_is_refused(tmp_path: Path) -> None:
    error = refused(table(tmp_path, f"path,label\na.jpg,{'a' * 9000}\nb.jpg,{'b' * 255}\n", *FOUR))
    assert "1 row cannot be used" in error.found and len(error.found) < 400


def test_csv_over_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "labels.csv").open("wb") as file:
        file.truncate(2**30 + 1)  # takes no room on the disk
    assert refused(tmp_path / "labels.csv").found == "has 1025 MB, more than 1024 MB"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has an empty first line"),
        ("path,label\n", "has no training rows"),
        ("path,label,split\na.jpg,x,val\n", "has no training rows"),
        ("pth,Label\nz.jpg,x\n", "(columns: 'pth', 'Label'; for 'path' did you mean 'pth'?)"),
        ("a.jpg,x\nb.jpg,y\n", "has no column 'path' and no column 'label'"),
        ("path\na.jpg\n", "has no column 'label'"),
        ("path,label,label\na.jpg,x,y\n", "more than one column 'label'"),
        ("path,label\na.jpg,x,\nb.jpg,y\n", "Expected 2 fields in line 2, saw 3"),
        ('path,label\na.jpg,"x\n', "is not a table"),
        ("path,label\na.jpg,x\nb.jpg,x\n", "only one class, 'x'"),
        (
            "path,label\na.jpg,x\nb.jpg,x\nsub/c.jpg,y\n",
            "'y'; one image cannot be both trained on and tested",
        ),
        (
            "path,label,split\na.jpg,x,train\nb.jpg,y,train\nsub/c.jpg,z,val\n",
            "val has 1 class that training",
        ),
    ],
)
def test_csv_files_that_are_refused(tmp_path: Path, text: str, said: str) -> None:
    assert said in refused(table(tmp_path, text, *FOUR)).found


def test_a_csv_file_that_is_neither_utf8_nor_windows_1252_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(b"path,label\n\x81.jpg,x\n")
    assert "is not UTF-8 (invalid start byte at byte 11)" in refused(tmp_path / "labels.csv").found


# The dataset


def test_without_keeps_classes_and_the_rest(tmp_path: Path) -> None:
    dataset = found(ants_and_bees(tmp_path, "", 4))
    every = {sample.path for sample in dataset.samples if sample.label == 1}
    smaller = dataset.without(every)
    assert smaller.classes == ("ant", "bee")
    assert smaller.counts("train") == [3, 0]
    assert len(dataset.samples) == 8


def test_the_folder_of_an_archive_is_named(tmp_path: Path) -> None:
    ants_and_bees(tmp_path / "download" / "photos", "", 3)
    with pytest.raises(DataError, match=r"Did you mean --data .*download/photos\?"):
        found(tmp_path / "download")


def test_a_deep_hidden_folder_is_looked_through(tmp_path: Path) -> None:
    images = [f"{name}/{number}.jpg" for name in ("ant", "bee") for number in range(4)]
    for name in images:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    below = tmp_path / ".old"
    below.mkdir()
    here = Path.cwd()
    try:
        os.chdir(below)
        for _ in range(1500):
            Path("d").mkdir()
            os.chdir("d")
        Path("x.jpg").touch()
    finally:
        os.chdir(here)
    try:
        dataset = discover(tmp_path, SplitConfig(0.25, 0))
    finally:
        subprocess.run(["rm", "-rf", below], check=True)  # shutil.rmtree calls itself for each level
    assert {sample.path for sample in dataset.samples} == set(images)
    assert any("'.old'" in warning for warning in dataset.warnings)
