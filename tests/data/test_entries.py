"""A tar file is trusted as little as a zip archive, and names in other encodings are read or shown right."""

from __future__ import annotations

import gzip
import io
import os
import random
import shutil
import struct
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import pytest

from finetune.data.archives import plan
from finetune.data.dataset import Dataset
from finetune.data.discover import discover, find_images
from finetune.data.root import find_root
from finetune.data.split import SplitConfig
from finetune.errors import DataError

PLAIN = tuple(f"{name}/{n}.jpg" for name in ("ant", "bee") for n in range(4))
Member = tuple[tarfile.TarInfo, bytes]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, empty; the flush of the whole machine's disks is left out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "sync", lambda: None)
    return tmp_path / "cache" / "finetune" / "archives"


def member(
    name: str, content: bytes | None = None, kind: bytes = tarfile.REGTYPE, target: str = ""
) -> Member:
    info = tarfile.TarInfo(name)
    data = name.encode("utf-8", "surrogateescape") if content is None else content
    info.type, info.linkname, info.size = kind, target, len(data)
    return info, data


def packed(path: Path, *members: Member | str, format: int = tarfile.PAX_FORMAT) -> Path:
    """A tar file of these members, packed by gzip if its name says so."""
    mode = "w" if path.suffix == ".tar" else "w:gz"
    with tarfile.open(path, mode, format=format, errors="surrogateescape") as file:  # type: ignore[call-overload]
        for one in members:
            info, data = member(one) if isinstance(one, str) else one
            file.addfile(info, io.BytesIO(data))
    return path


def found(data: Path) -> Dataset:
    return discover(data, SplitConfig(0.25, 0))


def refused(data: Path) -> str:
    with pytest.raises(DataError) as error:
        found(data)
    assert error.value.asked == f"--data {data}" and len(error.value.found) < 500
    return error.value.found


def unpacked(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()] if cache.is_dir() else []


# What is read


@pytest.mark.parametrize(("suffix", "kind"), [(".tar", "tar"), (".tar.gz", "gztar"), (".tgz", "gztar")])
def test_a_tar_file_reads_as_its_folder(tmp_path: Path, cache: Path, suffix: str, kind: str) -> None:
    for split in ("train", "val", "test"):
        for name in PLAIN:
            (tmp_path / "data" / split / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "data" / split / name).write_text(split + name)
    made = Path(shutil.make_archive(str(tmp_path / "made"), kind, tmp_path / "data"))
    file = made.rename(tmp_path / f"data{suffix}")
    by_folder, by_archive = found(tmp_path / "data"), found(file)
    assert by_archive.samples == by_folder.samples and by_archive.classes == by_folder.classes
    assert by_archive.warnings == () and by_archive.root.parent == cache
    for sample in by_archive.samples:
        assert by_archive.file(sample).read_text() == by_folder.file(sample).read_text()
    assert find_root(file) == by_archive.root


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_formats_and_long_names(tmp_path: Path, format: int) -> None:
    long = f"ant/{'x' * 90}/{'y' * 90}.jpg"
    names = [*PLAIN, long, "caf\u00e9/0.jpg", "caf\u00e9/1.jpg"]
    dataset = found(packed(tmp_path / "x.tar", *(f"top/{name}" for name in names), format=format))
    assert dataset.classes == ("ant", "bee", "caf\u00e9") and dataset.root.name == "top"
    assert {sample.path for sample in dataset.samples} == set(names)


def test_content_decides_whether_it_is_packed(tmp_path: Path) -> None:
    file = packed(tmp_path / "x.tar", *PLAIN)
    (tmp_path / "plain.tar.gz").write_bytes(file.read_bytes())
    (tmp_path / "packed.tar").write_bytes(gzip.compress(file.read_bytes()))
    assert len(found(tmp_path / "plain.tar.gz").samples) == len(found(tmp_path / "packed.tar").samples) == 8


def test_left_out_files_and_progress(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    file = packed(tmp_path / "x.tgz", *PLAIN, "README", "ant/x.py")
    dataset = discover(file, SplitConfig(0.25, 0), on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 8) for n in range(1, 9)]
    assert "that are not images are left out: no extension (1), .py (1)." in dataset.warnings[0]


# What is refused

HOSTILE: tuple[tuple[Member, str], ...] = (
    (member("../evil.jpg"), "'../evil.jpg' leads upwards"),
    (member("ant/../../evil.jpg"), "leads upwards"),
    (member("../evil.sh"), "leads upwards"),
    (member("/etc/evil.jpg"), "'/etc/evil.jpg' is an absolute path"),
    (member("C:/evil.jpg"), "is an absolute path"),
    (member("ant\\..\\..\\evil.jpg"), "leads upwards"),
    (member("ant/a\nb.jpg"), "holds a control character"),
    (member("ant/0.jpg"), "'ant/0.jpg' is in there twice"),
    (member("ant"), "'ant' is both a file and a folder"),
    (member("a/" * 40 + "0.jpg"), "is too long"),
    (member(f"ant/{'x' * 300}.jpg"), "has a part that is too long"),
    (member("ant/link.jpg", b"", tarfile.SYMTYPE, "/etc/passwd"), "'ant/link.jpg' is a link"),
    (member("ant/link.jpg", b"", tarfile.LNKTYPE, "ant/0.jpg"), "'ant/link.jpg' is a link"),
    (member("wasp", b"", tarfile.SYMTYPE, "/etc"), "'wasp' is a link"),
    (member("ant/pipe.jpg", b"", tarfile.FIFOTYPE), "'ant/pipe.jpg' is a link or another kind of entry"),
    (member("ant/null.jpg", b"", tarfile.CHRTYPE), "'ant/null.jpg' is a link or another kind of entry"),
    (member("ant/disk.jpg", b"", tarfile.BLKTYPE), "'ant/disk.jpg' is a link or another kind of entry"),
    (member("ant/odd.jpg", b"", b"V"), "'ant/odd.jpg' is a link or another kind of entry"),
)


@pytest.mark.parametrize("suffix", [".tar", ".tgz"])
@pytest.mark.parametrize(("entry", "fault"), HOSTILE, ids=[f"{n}" for n in range(len(HOSTILE))])
def test_a_hostile_member_is_refused_by_name(
    tmp_path: Path, cache: Path, entry: Member, fault: str, suffix: str
) -> None:
    said = refused(packed(tmp_path / f"x{suffix}", *PLAIN, entry))
    assert fault in said and said.startswith("1 entry is not what a plain archive of images holds:\n  ")
    assert unpacked(cache) == []
    assert {path.name for path in tmp_path.iterdir()} == {f"x{suffix}", "cache"}


def test_a_link_then_a_file_through_it(tmp_path: Path, cache: Path) -> None:
    """The way out of the folder that filters of tarfile have let pass."""
    outside = tmp_path / "outside"
    outside.mkdir()
    steps = [member("ant/hop", b"", tarfile.SYMTYPE, str(outside)), member("ant/hop/evil.jpg")]
    assert "'ant/hop' is a link" in refused(packed(tmp_path / "x.tar", *PLAIN, *steps))
    assert list(outside.iterdir()) == [] and unpacked(cache) == []


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("suffix", [".tar", ".tgz"])
def test_a_cut_tar_is_refused(tmp_path: Path, cache: Path, suffix: str, share: float) -> None:
    file = packed(tmp_path / f"x{suffix}", *PLAIN, member("ant/z.jpg", random.Random(0).randbytes(30_000)))
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    assert "is truncated" in refused(file) and unpacked(cache) == []


def test_a_tar_cut_between_members_is_refused(tmp_path: Path) -> None:
    """tarfile takes that for the end."""
    file = packed(tmp_path / "x.tar", *PLAIN)
    file.write_bytes(file.read_bytes()[: 1024 * 6])
    assert "its end is missing" in refused(file)


@pytest.mark.parametrize(
    "content", [b"", b"<!DOCTYPE html>", b"\x1f\x8b", bytes(100), gzip.compress(b"x", mtime=0)]
)
def test_a_file_that_is_no_tar_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tgz").write_bytes(content)
    assert "is truncated, damaged or not a tar archive" in refused(tmp_path / "x.tgz")


def header(name: str, size: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header whose size field holds these 12 bytes, with a right checksum."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, b"V"])
@pytest.mark.parametrize("size", [b"\xff" * 11 + b"\x00", b"\x80" + b"\x7f" * 11], ids=["negative", "huge"])
def test_a_size_that_cannot_be_is_refused(tmp_path: Path, kind: bytes, size: bytes) -> None:
    """A negative size sends tarfile back and round in a circle, a huge header fills the memory."""
    start = packed(tmp_path / "x.tar", *PLAIN).read_bytes()
    (tmp_path / "x.tar").write_bytes(start[: 1024 * 8] + header("ant/9.jpg", size, kind) + bytes(10240))
    refused(tmp_path / "x.tar")


def test_a_chain_of_headers_is_refused(tmp_path: Path) -> None:
    block = header("x", b"00000000000\0", tarfile.XHDTYPE)
    (tmp_path / "x.tgz").write_bytes(gzip.compress(block * 100_000))
    assert "is truncated, damaged" in refused(tmp_path / "x.tgz")


def global_header(**fields: str) -> bytes:
    """A header for all members that follow."""
    return tarfile.TarInfo.create_pax_global_header(fields)


def test_long_headers_of_one_member_are_refused(tmp_path: Path) -> None:
    """A chain of them, each of a permitted length, would be held in memory whole."""
    start = packed(tmp_path / "x.tar", *PLAIN).read_bytes()[: 1024 * 8]
    for number, read in ((1, True), (3, False)):
        chain = global_header(comment="x" * 400_000) * number
        content = start + chain + packed(tmp_path / "z.tar", "cat/1.jpg", "cat/2.jpg").read_bytes()
        (tmp_path / "y.tar").write_bytes(content)
        if read:
            assert found(tmp_path / "y.tar").classes == ("ant", "bee", "cat")
        else:
            assert "a header of an impossible length" in refused(tmp_path / "y.tar")


def test_many_fields_for_all_members_are_refused(tmp_path: Path) -> None:
    """tarfile keeps them to the end, and copies them for each member."""
    fields = {f"field{n}": "x" for n in range(1001)}
    tail = packed(tmp_path / "z.tar", "cat/1.jpg", "cat/2.jpg").read_bytes()
    (tmp_path / "x.tar").write_bytes(global_header(**fields) + tail)
    assert "too many fields in headers for all members" in refused(tmp_path / "x.tar")


def test_folders_of_what_is_left_out_are_not_made(tmp_path: Path, cache: Path) -> None:
    deep = [f"{n}/" + "d/" * 29 for n in range(20)]
    file = packed(tmp_path / "x.tgz", *PLAIN, *(f"ant/{name}x.txt" for name in deep))
    root = found(file).root
    folders = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_dir()}
    assert folders == {"ant", "bee", *(f"ant/{n}" for n in range(20))}
    many = packed(
        tmp_path / "y.tgz", *PLAIN, *(member(f"{n}-{name}x.jpg", b"") for n in range(50) for name in deep)
    )
    assert many.stat().st_size < 1_000_000
    assert "grows to more than 100 times its size" in refused(many)
    assert unpacked(cache) == [root]


def test_a_header_of_digits_is_refused_at_once(tmp_path: Path) -> None:
    """tarfile's search for a number in it takes the square of its length: 200 kilobytes half a minute."""
    chain = header("x", b"00000620000\0", tarfile.XHDTYPE) + b"1" * 0o620000
    (tmp_path / "x.tgz").write_bytes(gzip.compress(chain))
    began = time.thread_time()
    assert "a number of an impossible length" in refused(tmp_path / "x.tgz")
    assert time.thread_time() - began < 1


def test_a_sparse_member_is_refused(tmp_path: Path) -> None:
    info, _ = member("ant/9.jpg", b"")
    info.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "1000000000000"}
    assert "is a link or another kind" in refused(packed(tmp_path / "x.tar", *PLAIN, (info, b"")))


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["ant/z.jpg", "ant/z.bin"])
def test_a_bomb_is_refused(tmp_path: Path, cache: Path, name: str) -> None:
    """Also one whose large file would not be unpacked: it must be read to reach the next one."""
    file = packed(tmp_path / "x.tgz", *PLAIN, member(name, bytes(200 * 2**20)))
    assert file.stat().st_size < 300_000
    assert "grows to more than 100 times its size" in refused(file) and unpacked(cache) == []


@pytest.mark.parametrize(
    ("limit", "value", "said"),
    [
        ("MAX_FILE_BYTES", 9_999, "holds a file of more than 1 MB"),
        ("MAX_BYTES", 25_000, "holds more than 1 MB"),
        ("MAX_ENTRIES", 5, "holds more than 5 files and folders"),
        ("MAX_NAMES_BYTES", 90, "holds more than 1000000 files and folders"),
    ],
)
def test_limits(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, said: str
) -> None:
    monkeypatch.setattr(plan, limit, value)
    file = packed(tmp_path / "x.tar", *PLAIN, *(member(f"ant/z{n}.jpg", bytes(10_000)) for n in range(3)))
    assert said in refused(file) and unpacked(cache) == []


@pytest.mark.sample(1)
@pytest.mark.parametrize("suffix", [".tar", ".tgz"])
def test_fuzzed_tar_files_raise_refusals_only(tmp_path: Path, cache: Path, suffix: str) -> None:
    rng = random.Random(2026)
    file = packed(tmp_path / "x.tar", *PLAIN, member("bee/z.jpg", bytes(2000)))
    sound = file.read_bytes()[: 1024 * 13]
    read = 0
    for _ in range(300):
        data = bytearray(sound)
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        packed_file = tmp_path / f"y{suffix}"
        packed_file.write_bytes(bytes(data) if suffix == ".tar" else gzip.compress(bytes(data), 1))
        try:
            dataset = found(packed_file)
        except DataError:
            continue
        read += 1
        for sample in dataset.samples:
            assert Path(os.path.realpath(dataset.file(sample))).is_relative_to(cache)
        shutil.rmtree(cache)
    assert {path.name for path in tmp_path.iterdir()} <= {"x.tar", f"y{suffix}", "cache"}
    assert 0 < read < 300


# Archives of splits


def split_archives(folder: Path, *names: str, inside: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        paths = [f"{inside.format(stem=name.partition('.')[0])}{path}" for path in PLAIN]
        if name.endswith(".zip"):
            with zipfile.ZipFile(folder / name, "w") as file:
                for path in paths:
                    file.writestr(path, f"{number}{path}")
        else:
            packed(folder / name, *(member(path, f"{number}{path}".encode()) for path in paths))
    return folder


@pytest.mark.parametrize("inside", ["", "{stem}/"])
@pytest.mark.parametrize(
    "names", [("train.zip", "test.zip"), ("train.tar.gz", "test.tgz"), ("Training.zip", "Testing.tar")]
)
def test_an_archive_for_each_split(tmp_path: Path, cache: Path, names: tuple[str, ...], inside: str) -> None:
    data = split_archives(tmp_path / "data", *names, inside=inside)
    dataset = found(data)
    assert dataset.classes == ("ant", "bee") and dataset.counts("test") == [4, 4]
    assert len(dataset.samples) == 16 and dataset.root.parent == cache == find_root(data).parent  # type: ignore[union-attr]
    assert all(
        dataset.file(sample).read_text()[0] == str(int(sample.split == "test")) for sample in dataset.samples
    )
    assert f"The archives {names[0]!r}, {names[1]!r} were read as splits." in dataset.warnings
    assert found(data) == dataset == find_images(data, SplitConfig(0.25, 0))
    assert len(unpacked(cache)) == 1


def test_archives_beside_folders_are_named(tmp_path: Path) -> None:
    data = split_archives(tmp_path / "data", "test.zip")
    for path in PLAIN:
        (data / "train" / path).parent.mkdir(parents=True, exist_ok=True)
        (data / "train" / path).touch()
    assert found(data).warnings == ("Beside 'train', these archives are not read: 'test.zip'.",)


@pytest.mark.parametrize("names", [("flowers.zip",), ("test.zip",), ("a.zip", "b.zip")])
def test_other_archives_in_a_folder_are_named(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(DataError) as error:
        found(split_archives(tmp_path / "data", *names))
    assert names[0] in error.value.fix


def test_an_archive_that_leads_out_is_refused(tmp_path: Path) -> None:
    split_archives(tmp_path / "else", "train.zip")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.zip").symlink_to(tmp_path / "else/train.zip")
    assert "1 link leads out of the folder: 'train.zip'" in refused(tmp_path / "data")


def test_a_hostile_archive_of_a_split_is_refused(tmp_path: Path, cache: Path) -> None:
    data = split_archives(tmp_path / "data", "train.zip")
    packed(data / "test.tar", *PLAIN, "../../evil.jpg")
    assert "leads upwards" in refused(data) and unpacked(cache) == []


# Names


def renamed(path: Path, names: dict[str, bytes], extra: bytes = b"") -> Path:
    """A zip without the flag for UTF-8 whose placeholders are replaced by the bytes of names."""
    with zipfile.ZipFile(path, "w") as file:
        for name in [*PLAIN, *(f"{key}/{n}.jpg" for key in names for n in range(3))]:
            info = zipfile.ZipInfo(name)
            if extra and name[:1].isupper():
                raw = name.encode().replace(b"XXXX", names["XXXX"])
                field = b"\1" + struct.pack("<I", zlib.crc32(raw)) + extra + name[4:].encode()
                info.extra = struct.pack("<HH", 0x7075, len(field)) + field
            file.writestr(info, b"content")
    data = path.read_bytes()
    for key, raw in names.items():
        assert len(key) == len(raw)
        data = data.replace(key.encode(), raw)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("\u00c4pfel", "cp437"),
        ("K\u00fcrbis", "cp850"),
        ("caf\u00e9", "cp1252"),
        ("\u00c1gua", "cp850"),
        ("\u043a\u043e\u0442\u044b", "cp866"),
        ("\u043a\u043e\u0448\u043a\u0430", "cp1251"),
        ("\u30cd\u30b3\u3068\u72ac", "cp932"),
    ],
)
def test_names_in_the_encoding_of_the_packer(tmp_path: Path, name: str, codec: str) -> None:
    raw = name.encode(codec)
    file = renamed(tmp_path / "x.zip", {"X" * len(raw): raw})
    for _ in range(2):  # also when it was unpacked before
        dataset = found(file)
        assert set(dataset.classes) == {"ant", "bee", name}
        assert "are not UTF-8, and were read as" in dataset.warnings[0] and repr(name) in dataset.warnings[0]


def test_the_name_in_the_extra_field_decides(tmp_path: Path) -> None:
    file = renamed(tmp_path / "x.zip", {"XXXX": b"\x8c\xa2\x82\xe9"}, "\u72ac".encode())
    assert set(found(file).classes) == {"ant", "bee", "\u72ac"}


def test_a_name_that_may_be_two_is_refused_with_both(tmp_path: Path) -> None:
    said = refused(renamed(tmp_path / "x.zip", {"XX": "\u044c\u044f".encode("cp1251")}))
    assert "is not UTF-8, and may be '\u00fc\u00ff/0.jpg' (cp1252) or '\u044c\u044f/0.jpg' (cp1251)" in said
    assert "'\\\\xfc\\\\xff/0.jpg'" in said or "\\xfc\\xff/0.jpg" in said


@pytest.mark.parametrize(("name", "codec"), [("γάτες", "cp1253"), ("γάτα", "cp737")])
def test_names_in_an_encoding_that_is_not_known_are_not_taken_for_cyrillic(
    tmp_path: Path, name: str, codec: str
) -> None:
    raw = name.encode(codec)
    assert "is not UTF-8" in refused(renamed(tmp_path / "x.zip", {"X" * len(raw): raw}))


def test_names_of_tar_members_in_another_encoding(tmp_path: Path) -> None:
    name = os.fsdecode("K\u00fcrbis".encode("cp1252"))
    file = packed(tmp_path / "x.tar", *PLAIN, f"{name}/0.jpg", f"{name}/1.jpg", format=tarfile.GNU_FORMAT)
    assert set(found(file).classes) == {"ant", "bee", "K\u00fcrbis"}


def test_backslashes_separate(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for name in PLAIN:
            file.writestr("train\\" + name.replace("/", "\\"), name)
    dataset = found(tmp_path / "x.zip")
    assert dataset.classes == ("ant", "bee") and {s.path for s in dataset.samples} == {
        f"train/{p}" for p in PLAIN
    }


def test_long_extra_fields_of_a_zip_are_refused_at_once(tmp_path: Path) -> None:
    """zipfile copies the rest of them for each field: 16 MB of them took nine seconds."""
    file = tmp_path / "x.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for name in PLAIN * 20:
            info = zipfile.ZipInfo(f"{len(archive.infolist())}{name}")
            info.extra = struct.pack("<HH", 0xCAFE, 0) * 16_000
            archive.writestr(info, b"x")
    began = time.monotonic()
    with pytest.raises(DataError, match="extra fields of an impossible length"):
        found(file)
    assert time.monotonic() - began < 2


def test_extra_fields_of_ordinary_length_are_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in PLAIN:
            info = zipfile.ZipInfo(name)
            info.extra = struct.pack("<HH", 0xCAFE, 0) * 1000
            archive.writestr(info, b"x")
    assert {sample.path for sample in found(tmp_path / "x.zip").samples} == set(PLAIN)
