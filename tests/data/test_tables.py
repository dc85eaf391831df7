"""Tables as people bring them: names of columns, splits, files, encodings and separators."""

from __future__ import annotations

import gzip
import re
import time
from pathlib import Path

import pytest

from finetune.api import check
from finetune.data.dataset import Dataset
from finetune.data.discover import discover
from finetune.data.inputs import find_inputs, find_labelled
from finetune.data.split import SplitConfig
from finetune.data.tables.config import TableConfig
from finetune.errors import DataError
from finetune.features.extraction import open_images
from finetune.pipeline.run_inputs import find_run_images
from finetune.recipe import load_recipe
from finetune.system.display import SilentDisplay

NAMES = [f"img/{label}{number}.jpg" for label in "xy" for number in range(6)]


def images(root: Path, *names: str) -> Path:
    for name in names or NAMES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def write(root: Path, text: str, name: str = "labels.csv", encoding: str = "utf-8") -> Path:
    data = text.encode(encoding)
    (root / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return root / name


def rows(header: str, line: str, names: list[str] = NAMES, **columns: list[str]) -> str:
    """Return a table; in ``line``, {p} is a path, {l} its label and {s} the cell of the split."""
    cells = columns.get("s", [""] * len(names))
    return "\n".join(
        [
            header,
            *(
                line.format(p=n, b=n.rpartition("/")[2], i=n.rpartition("/")[2][:-4], l=label(n), s=s)
                for n, s in zip(names, cells, strict=True)
            ),
        ]
    )


def label(name: str) -> str:
    return name.rpartition("/")[2][0]


def found(data: Path, **config: str) -> Dataset:
    return discover(data, SplitConfig(0.25, 0), table=TableConfig(**config))


def refused(data: Path, **config: str) -> DataError:
    with pytest.raises(DataError) as error:
        found(data, **config)
    return error.value


def assert_read(dataset: Dataset, *said: str) -> None:
    """Check that every image is there under its label, and that the warnings hold these texts."""
    assert {s.path: dataset.classes[s.label] for s in dataset.samples} == {n: label(n) for n in NAMES}
    for text in said:
        assert any(text in warning for warning in dataset.warnings), dataset.warnings


# --- columns of paths and labels ---


@pytest.mark.parametrize(
    ("header", "line"),
    [
        ("filename,class", "{p},{l}"),
        ("ImageId,LabelName", "{i},{l}"),
        ("id,breed", "{i},{l}"),
        ("Path,Label", "{p},{l}"),
        ("image_path,label", "{p},{l}"),
        ("PATH,LABEL", "{p},{l}"),
        ("file_name,category", "{b},{l}"),
        ("label,image", "{l},{b}"),
        (",image,target", "7,{b},{l}"),
        ("Image,Id", "{b},{l}"),
        ("Foto,Art", "{p},{l}"),
        ("class id,filepaths,labels,scientific name", "3{l},{p},{l},Homo {l}"),
        ("id,filename,width,label", "99,{p},640,{l}"),
        ("image_url,filename,label", "http://x/{b},{p},{l}"),
    ],
)
def test_columns_by_names_that_are_in_use(tmp_path: Path, header: str, line: str) -> None:
    dataset = found(write(images(tmp_path), rows(header, line)))
    assert_read(dataset, "was read as the path, and")


def test_the_documented_names_are_read_without_a_word(tmp_path: Path) -> None:
    dataset = found(write(images(tmp_path), rows("path,label,class", "{p},{l},z")))
    assert_read(dataset)
    assert not dataset.warnings


@pytest.mark.parametrize(
    ("header", "line", "said", "key"),
    [
        ("file,class,species", "{p},{l},q{b}", "'class', 'species'", "data.label_column"),
        ("file,colour,size", "{p},{l},q{b}", "'colour', 'size'", "data.label_column"),
        ("image,mask,label", "{p},{p},{l}", None, None),
        ("image,file,label", "{p},img/x0.jpg,{l}", "'image', 'file'", "data.path_column"),
    ],
)
def test_two_readings_are_refused_with_the_key_that_decides(
    tmp_path: Path, header: str, line: str, said: str | None, key: str | None
) -> None:
    table = write(images(tmp_path), rows(header, line))
    if said is None or key is None:
        assert_read(found(table))
        return
    error = refused(table)
    assert said in error.found and f"--set {key}=" in error.fix
    first = header.split(",")[0 if "path" in key else 1]
    assert_read(found(table, **{key.removeprefix("data."): first.upper()}))


def test_one_hot_columns_are_one_class_each(tmp_path: Path) -> None:
    text = rows("image,MEL,NEV", "{p},{s}", s=["1.0,0.0"] * 6 + ["0.0,1.0"] * 6)
    dataset = found(write(images(tmp_path), text))
    assert dataset.classes == ("MEL", "NEV")
    assert any("'MEL', 'NEV' as one class each" in warning for warning in dataset.warnings)


def test_a_column_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    error = refused(write(images(tmp_path), rows("path,label", "{p},{l}")), label_column="lable")
    assert "has no column 'lable'" in error.found and "did you mean 'label'?" in error.found


# --- files ---


def test_names_without_folder_and_extension_must_fit_one_file(tmp_path: Path) -> None:
    table = write(images(tmp_path, *NAMES, "masks/x0.png"), rows("id,label", "{i},{l}"))
    error = refused(table)
    assert "'x0' fits 2 files: 'img/x0.jpg', 'masks/x0.png'" in error.found
    assert "--set data.image_root=" in error.fix
    assert_read(found(table, image_root="img"), "'x0' was read as 'img/x0.jpg'")
    assert_read(found(table, suffix=".jpg"))


def test_image_root_beside_the_table(tmp_path: Path) -> None:
    images(tmp_path / "store" / "all")
    (tmp_path / "tables").mkdir()
    table = write(tmp_path / "tables", rows("path,label", "{p},{l}"))
    assert "data.image_root" in refused(table).fix
    dataset = found(table, image_root="../store/all")
    assert_read(dataset)
    assert dataset.root == tmp_path / "store" / "all"
    assert "has no folder 'gone'" in refused(table, image_root="gone").found


def test_backslashes_separate_where_no_such_file_exists(tmp_path: Path) -> None:
    text = rows("path,label", "{p},{l}").replace("/", "\\")
    assert_read(found(write(images(tmp_path), text)), "backslashes separate folders")
    (tmp_path / "img\\x0.jpg").touch()
    assert "img\\x0.jpg" in {sample.path for sample in found(tmp_path / "labels.csv").samples}


@pytest.mark.parametrize(
    "before", ["photos/", "/kaggle/input/set/photos/", "C:\\Users\\me\\", "/content/drive/"]
)
def test_folders_that_lead_to_the_table_are_left_out(tmp_path: Path, before: str) -> None:
    table = write(images(tmp_path / "photos"), rows("path,label", before.replace("{", "{{") + "{p},{l}"))
    assert_read(found(table), "at the start of paths is left out")


def test_the_folder_of_another_split_is_not_left_out(tmp_path: Path) -> None:
    table = write(images(tmp_path / "train"), rows("path,label", "val/{p},{l}"))
    assert "'val/img/x0.jpg' does not exist" in refused(table).found
    table = write(tmp_path / "train", rows("path,label", "/data/val/{p},{l}"))
    assert "lies outside" in refused(table).found


@pytest.mark.parametrize(
    "address",
    [
        "http://x.org/{b}",
        "HTTPS://x/{b}",
        "s3://a/{b}",
        "gs://a/{b}",
        "www.x.org/{b}",
        "//x.org/{b}",
        "dbfs:/{b}",
    ],
)
def test_addresses_are_not_fetched(tmp_path: Path, address: str) -> None:
    error = refused(write(images(tmp_path), rows("path,label", address + ",{l}")))
    assert "is an address" in error.found
    assert error.fix == "Addresses are not fetched; download them first, and name the files."
    assert "not fetched" in refused(Path("http://x.org/a.zip")).fix


# --- splits ---

THIRDS = ["TRAIN", "TRAIN", "TRAIN", "TRAIN", "VAL", "TEST"] * 2


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("Split", ("train", "val", "test")),
        ("set", ("Training", "Validation", "Testing")),
        ("subset", ("training", "dev", "test")),
        ("ML_USE", ("TRAINING", "VALIDATION", "TEST")),
        ("fold", ("train", "valid", "test")),
        ("data set", ("train", "valid", "test")),
        ("usage", ("train_set", "val_set", "test_set")),
        ("irgendwas", ("Train", "Val", "Test")),
        ("fold,Split", ("1,train", "2,eval", "3,test")),
        ("irgendwas", ("tr", "va", "te")),
        ("irgendwas", ("trainval", "val", "test")),
    ],
)
def test_split_columns(tmp_path: Path, column: str, words: tuple[str, str, str]) -> None:
    of = dict(zip(("TRAIN", "VAL", "TEST"), words, strict=True))
    text = rows(f"path,label,{column}", "{p},{l},{s}", s=[of[third] for third in THIRDS])
    dataset = found(write(images(tmp_path), text))
    assert_read(dataset, f"Column '{column.rpartition(',')[2]}' gave the splits: 8 train, 2 val, 2 test.")
    assert [s.path for s in dataset.of("test")] == ["img/x5.jpg", "img/y5.jpg"]
    assert not dataset.val_was_drawn


@pytest.mark.parametrize(
    ("header", "cells", "counts"),
    [
        ("is_valid", ["False"] * 4 + ["True"] * 2, (8, 4, 0)),
        ("is_test", ["0"] * 5 + ["1"], (8, 2, 2)),
        ("IsVal,IsTest", ["no,no"] * 4 + ["yes,no", "no,yes"], (8, 2, 2)),
        ("train,val,test", ["1,0,0"] * 4 + ["0,1,0", "0,0,1"], (8, 2, 2)),
        ("is_train,is_test", ["1,0"] * 4 + ["0,0", "0,1"], (8, 2, 2)),
        ("split", ["train", "", "UNASSIGNED", "", "train", "test"], (8, 2, 2)),
        ("split", ["train", "", "", "train", "val", "test"], (8, 2, 2)),
        ("set", ["", "", "", "", "", ""], (8, 4, 0)),
        ("test_flag", ["0"] * 5 + ["1"], (8, 2, 2)),
        ("useForVal,image_test", ["0,0"] * 4 + ["1,0", "0,1"], (8, 2, 2)),
    ],
)
def test_flags_and_rows_without_a_split(
    tmp_path: Path, header: str, cells: list[str], counts: tuple[int, ...]
) -> None:
    dataset = found(write(images(tmp_path), rows(f"path,label,{header}", "{p},{l},{s}", s=cells * 2)))
    assert_read(dataset)
    assert tuple(len(dataset.of(split)) for split in ("train", "val", "test")) == counts


@pytest.mark.parametrize(
    ("column", "cells", "said"),
    [
        ("fold", ["0", "1", "2", "3", "4", "0"], "whose cells name no split ('0', '1', '2'"),
        ("kfold", ["0", "1", "2", "3", "4", "0"], "whose cells name no split"),
        ("is_train", ["1", "1", "1", "1", "0", "0"], "may mean more than one split"),
        ("valid", ["1", "1", "1", "1", "0", "0"], "may mean the validation split, or images"),
        ("valid_image", ["1", "1", "1", "1", "0", "0"], "may mean the validation split, or images"),
        ("use_for_train", ["1", "1", "1", "1", "0", "0"], "may mean more than one split"),
        ("is_eval", ["0", "0", "0", "0", "1", "1"], "whose cells name no split"),
        ("held_out", ["0", "0", "0", "0", "1", "1"], "whose cells name no split"),
        ("cv", ["0", "1", "2", "3", "4", "0"], "whose cells name no split"),
        ("test_fold", ["-1", "-1", "0", "1", "2", "0"], "whose cells name no split"),
        ("set", ["A", "A", "A", "B", "B", "B"], "whose cells name no split ('A', 'B')"),
        ("phase", ["train", "train", "train", "val", "spare", "spare"], "and also holds 'spare'"),
        ("phase", ["train", "train", "train", "train", "holdout", "holdout"], "'holdout'"),
        ("part", ["train", "train", "train", "train", "eval", "eval"], "may mean validation or test"),
        ("phase,set", ["train,train"] * 5 + ["test,train"], "two columns, 'phase' and 'set', that differ"),
    ],
)
def test_doubtful_split_columns_are_refused(tmp_path: Path, column: str, cells: list[str], said: str) -> None:
    table = write(images(tmp_path), rows(f"path,label,{column}", "{p},{l},{s}", s=cells * 2))
    error = refused(table)
    assert said in error.found, error.found
    if "val or test" not in error.fix:
        assert "--set data.split_column=" in error.fix
    assert_read(found(table, split_column="none"))


@pytest.mark.parametrize("before", ["", "data/"])
@pytest.mark.parametrize("names", [("train", "valid", "test"), ("seg_train", "seg_val", "seg_test")])
def test_folders_of_the_images_give_the_splits_of_a_table_without_them(
    tmp_path: Path, before: str, names: tuple[str, str, str]
) -> None:
    number = {"train": 4, "val": 2, "test": 2}
    paths = [f"{before}{folder}/{c}{n}.jpg" for folder, k in zip(names, number.values(), strict=True)
             for c in "xy" for n in range(k)]  # fmt: skip
    table = write(images(tmp_path, *paths), rows("path,label", "{p},{l}", paths))
    dataset = found(table)
    assert {split: len(dataset.of(split)) for split in number} == {"train": 8, "val": 4, "test": 4}
    assert f"gave the splits: '{names[0]}' as train" in dataset.warnings[0]
    assert found(table, split_column="none").val_was_drawn
    more = [f"{before}other/{c}{n}.jpg" for c in "xy" for n in range(2)]
    error = refused(write(images(tmp_path, *more), rows("path,label", "{p},{l}", paths + more)))
    assert "and in others ('other')" in error.found and "data.split_column" in error.fix


# --- text ---


@pytest.mark.parametrize(
    ("name", "mark", "encoding", "said"),
    [
        ("a.csv", ";", "utf-8", "UTF-8 with semicolons"),
        ("a.csv", "\t", "utf-8", "UTF-8 with tabs"),
        ("a.tsv", "\t", "utf-8", "UTF-8 with tabs"),
        ("a.csv", "|", "utf-8", "UTF-8 with vertical bars"),
        ("a.csv", "\t", "utf-16", "UTF-16 with tabs"),
        ("a.csv", ",", "utf-16-le", "UTF-16-LE with commas"),
        ("a.csv.gz", ",", "utf-8", "UTF-8 with commas, compressed by gzip"),
        ("A.TSV.GZ".lower(), "\t", "utf-8", "UTF-8 with tabs, compressed by gzip"),
    ],
)
def test_separators_and_encodings(tmp_path: Path, name: str, mark: str, encoding: str, said: str) -> None:
    text = rows("path,label", "{p},{l}").replace(",", mark)
    dataset = found(write(images(tmp_path), text, name, encoding))
    assert_read(dataset, said)


def test_windows_1252_from_excel_shows_an_example(tmp_path: Path) -> None:
    text = "sep=;\r\npath;label\r\n" + "\r\n".join(f"{n};{label(n)}é" for n in NAMES)
    dataset = found(write(images(tmp_path), text, encoding="cp1252"))
    assert dataset.classes == ("xé", "yé")
    assert "The table was read as Windows-1252 with semicolons, so that a cell is 'xé'." in dataset.warnings


@pytest.mark.parametrize(
    ("text", "encoding"),
    [("кот", "cp1251"), ("ねこ", "shift_jis"), ("狗鸟", "gbk")],
    ids=["cp1251", "sjis", "gbk"],
)
def test_other_encodings_are_not_taken_for_windows_1252(tmp_path: Path, text: str, encoding: str) -> None:
    table = write(images(tmp_path), rows("path,label", "{p},{l}" + text * 2), encoding=encoding)
    assert "is not UTF-8" in refused(table).found
    if len(text) > 2:
        table = write(tmp_path, rows("path,label", "{p},{l}" + text), encoding=encoding)
        assert "is not UTF-8" in refused(table).found


def test_damaged_utf8_is_not_taken_for_windows_1252(tmp_path: Path) -> None:
    table = images(tmp_path) / "labels.csv"
    table.write_bytes(rows("path,label", "{p},{l}é").encode() + b"\nz\xff.jpg,x\n")
    assert "is not UTF-8" in refused(table).found


def test_a_truncated_gzip_file_is_refused(tmp_path: Path) -> None:
    table = write(images(tmp_path), rows("path,label", "{p},{l}"), "a.csv.gz")
    table.write_bytes(table.read_bytes()[:-9])
    assert "truncated, damaged or not compressed by gzip" in refused(table).found


# --- tables that a finished model reads ---


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le"])
def test_what_a_gzip_file_unpacks_to_is_limited_in_every_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.setattr("finetune.data.tables.format.MAX_BYTES", 200_000)
    file = tmp_path / "labels.csv.gz"
    file.write_bytes(gzip.compress(("path,label\n" + "a.jpg,x\n" * 50_000).encode(encoding)))
    assert file.stat().st_size < 10_000
    assert "more than 0 MB" in refused(file).found
    with pytest.raises(DataError, match="more than 0 MB"):
        list(find_inputs(str(file), None).open())


def test_evaluation_reads_the_same_tables(tmp_path: Path) -> None:
    text = rows("ImageId;Breed;Usage", "{i};{l};{s}", s=THIRDS)
    dataset = find_labelled(write(images(tmp_path), text), ("x", "y"), "test")
    assert [s.path for s in dataset.samples] == ["img/x5.jpg", "img/y5.jpg"]
    with pytest.raises(DataError) as error:
        find_labelled(write(tmp_path, rows("file,class,species", "{p},{l},q{b}")), ("x", "y"))
    assert error.value.fix == "Rename the columns: path, label, split."


@pytest.mark.parametrize(
    ("name", "header", "line"),
    [
        ("a.csv", "ImageId;x", "{i};1"),
        ("a.tsv", "filename\tlabel", "{b}\t{l}"),
        ("a.csv.gz", "image_path,label", "{p},{l}"),
        ("a.csv", "path", "{p}"),
    ],
)
def test_prediction_reads_the_same_tables(tmp_path: Path, name: str, header: str, line: str) -> None:
    table = write(images(tmp_path), rows(header, line), name)
    files = [image.file for image in find_inputs(str(table), None).open()]
    assert files == [tmp_path / name for name in NAMES]


def test_a_table_of_one_class_does_not_name_itself(tmp_path: Path) -> None:
    fix = refused(write(images(tmp_path), rows("path,label", "{p},x"))).fix
    assert fix == "Add the images of at least one more class."


def test_an_address_in_the_first_line_is_no_header(tmp_path: Path) -> None:
    error = refused(write(images(tmp_path), rows("TRAIN,gs://b/0.jpg,a", "TRAIN,gs://b/{b},{l}")))
    assert "begins with no header" in error.found and "not fetched" in error.fix


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html><html><body>Sign in, please</body></html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a git-lfs pointer"),
        (b"PK\3\4\x14\0\6\0", "is a zip or an Excel workbook"),
    ],
)
def test_other_files_named_as_tables(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "labels.csv").write_bytes(content)
    assert said in refused(tmp_path / "labels.csv").found


def test_prediction_does_not_fetch_addresses(tmp_path: Path) -> None:
    table = write(images(tmp_path), "path\nhttp://x.org/a.jpg\n")
    assert "not fetched" in next(iter(find_inputs(str(table), None).open())).fault


def test_the_keys_of_the_recipe_reach_every_reader(tmp_path: Path) -> None:
    table = write(images(tmp_path, *NAMES, "masks/x0.png"), rows("f,Art,Ort", "{i},{l},q{i}"))
    data = {"path": str(table), "path_column": "f", "label_column": "Art", "suffix": ".jpg"}
    recipe = load_recipe(None, {"data": data})
    assert_read(find_run_images(recipe, SilentDisplay()))
    assert_read(open_images(recipe, SilentDisplay()))
    settings = {f"data.{key}": value for key, value in data.items()}
    result = check(settings=settings, output=tmp_path / "check", display=SilentDisplay())
    assert "table-columns" in str(result) and "may hold the labels" not in str(result)


def test_evaluation_reads_a_table_as_the_training_table_was_read(tmp_path: Path) -> None:
    """Other names decide where the table lacks the columns of the training table."""
    trained = TableConfig("file", "species", "none", "img", "")
    text = rows("file,class,Species,split", "{b},q{b},{l},test")
    dataset = find_labelled(write(images(tmp_path), text), ("x", "y"), table=trained)
    assert len(dataset.samples) == 12 and {s.split for s in dataset.samples} == {"train"}
    other = write(tmp_path, rows("path,label", "{p},{l}"), "other.csv")
    trained = TableConfig("file", "species", "part", "photos", "")
    assert len(find_labelled(other, ("x", "y"), table=trained).samples) == 12


# --- tables that cost more than they hold ---


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path,label" + "," * 20_000, "more than 20,000 columns"),
        ("sep=;\npath;label" + ";" * 20_000, "more than 20,000 columns"),
        ('"a\nb",' + "x," * 3_000_000, "more than 20,000 columns"),
        ("path,label," + ("x" * 100_000 + ",") * 50, "a first line of more than 4,194,304 characters"),
        ("path,label," + "x" * 200_000, "field larger than"),
        ("path,label" + "," * 19_000 + "\n" * 20_000, "20,000 lines of 19,002 cells"),
        ("path,label" + "," * 19_000 + "\r" * 20_000, "20,000 lines of 19,002 cells"),
    ],
)
@pytest.mark.parametrize("name", ["labels.csv", "labels.csv.gz"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_table_of_too_many_cells_is_refused_at_once(
    tmp_path: Path, text: str, said: str, name: str, encoding: str
) -> None:
    file = write(images(tmp_path), text, name, encoding)
    began = time.monotonic()
    assert said in refused(file).found
    with pytest.raises(DataError, match=re.escape(said)):
        list(find_inputs(str(file), None).open())
    assert time.monotonic() - began < 10


@pytest.mark.slow
def test_a_table_of_many_columns_is_read(tmp_path: Path) -> None:
    line = "{p},{l}" + ",1" * 19_998
    header = "path,label," + ",".join(map(str, range(19_998)))
    assert_read(found(write(images(tmp_path), rows(header, line))))


@pytest.mark.parametrize("separator", ["é", '"', "a", "0", "_", "\0", "\x1b"])
def test_a_separator_that_no_program_writes_is_refused(
    tmp_path: Path, separator: str, recwarn: pytest.WarningsRecorder
) -> None:
    """pandas would read it with another parser, and warn about that on stderr."""
    text = f"sep={separator}\n" + rows(f"path{separator}label", f"{{p}}{separator}{{l}}")
    file = write(images(tmp_path), text)
    assert "as the separator of its cells" in refused(file).found
    with pytest.raises(DataError, match="separator of its cells"):
        list(find_inputs(str(file), None).open())
    assert not recwarn.list
