from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.errors import DiskError, UsageError
from finetune.runs import resumable_writer
from finetune.runs.resumable_writer import bad_of, check_free, find_finished, journal_of, open_writer

FACTS = {"model": "a", "numbers": (1, 2)}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_files_are_renamed_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "out.csv"
    with open_writer(target, FACTS) as files:
        assert files.before is None and not files.is_another
        files.write(b"one\n")
        files.write(b"two\n", b"bad\n")
        files.save({"done": 2}, now=True)
        assert not target.exists() and journal_of(target).exists()
        files.finish()
    assert target.read_bytes() == b"one\ntwo\n"
    assert bad_of(target).read_bytes() == b"bad\n"
    assert names(tmp_path) == {"out.csv", "out.csv.bad.csv"}


def test_content_after_the_last_save_is_truncated(tmp_path: Path) -> None:
    target = tmp_path / "out.csv"
    with open_writer(target, FACTS) as files:
        files.write(b"one\n", b"bad\n")
        files.save({"done": 1}, now=True)
        files.write(b"lost", b"lost")
    with open_writer(target, FACTS) as files:
        assert files.before == {"done": 1}
        files.write(b"two\n")
        files.save({"done": 2}, now=True)
        files.finish()
    assert (target.read_bytes(), bad_of(target).read_bytes()) == (b"one\ntwo\n", b"bad\n")


@pytest.mark.parametrize("spoil", ["facts", "short", "changed", "garbage", "shape", "old version"])
def test_an_attempt_with_other_facts_is_not_used(tmp_path: Path, spoil: str) -> None:
    target = tmp_path / "out.csv"
    with open_writer(target, FACTS) as files:
        files.write(b"one\n", b"bad\n")
        files.save({"done": 1}, now=True)
    if spoil == "short":
        (tmp_path / ".out.csv.rows.part").write_bytes(b"o")
    elif spoil == "changed":
        (tmp_path / ".out.csv.rows.part").write_bytes(b"0ne\n")
    elif spoil == "garbage":
        journal_of(target).write_text("{")
    elif spoil == "shape":
        head, line = journal_of(target).read_text().splitlines()
        journal_of(target).write_text(f"{head}\n{json.dumps(json.loads(line) | {'bytes': [4]})}\n")
    elif spoil == "old version":
        old = {"facts": FACTS, "sizes": [4, 4], "progress": {"done": 1}}
        journal_of(target).write_text(json.dumps(old, indent=2) + "\n")
    facts = FACTS | {"model": "b"} if spoil == "facts" else FACTS
    with open_writer(target, facts) as files:
        assert files.before is None
        assert files.is_another == (spoil in ("facts", "short", "changed"))
        files.write(b"new\n")
        files.save({"done": 1}, now=True)
        files.finish()
    assert target.read_bytes() == b"new\n"
    assert names(tmp_path) == {"out.csv"}


def test_a_failed_conversion_is_repeated_by_the_next_attempt(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(DiskError), open_writer(target, FACTS) as files:
        files.write(b"one\n")
        files.save({"done": 1}, now=True)

        def fail(rows: Path, to: Path) -> None:
            raise OSError(28, "No space left on device")

        files.finish(fail)
    assert not target.exists()
    with open_writer(target, FACTS) as files:
        assert files.before == {"done": 1}
        files.finish(lambda rows, to: (to.write_bytes(rows.read_bytes().upper()), None)[1])
    assert target.read_bytes() == b"ONE\n" and names(tmp_path) == {"out"}


def test_a_kill_before_the_journal_is_removed_leaves_a_finished_file(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with open_writer(target, FACTS) as files:
        files.write(b"one\n")
        files.save({"done": 1}, now=True)
        journal = journal_of(target).read_bytes()
        files.finish()
    assert find_finished(target, FACTS) is None  # without a journal its content is unknown
    journal_of(target).write_bytes(journal)
    assert find_finished(target, {"model": "b"}) is None
    assert find_finished(target, FACTS) == {"done": 1}
    assert names(tmp_path) == {"out"}


def test_an_error_before_the_first_save_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x"), open_writer(tmp_path / "out", FACTS) as files:
        files.write(b"one\n")
        raise ValueError("x")
    assert names(tmp_path) == set()


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    again = open_writer(tmp_path / "out", FACTS)
    with open_writer(tmp_path / "out", FACTS), pytest.raises(UsageError, match="another process"):
        again.__enter__()


def test_saves_have_a_minimum_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumable_writer, "SAVE_SECONDS", 3600)
    with open_writer(tmp_path / "out", FACTS) as files:
        files.save({"done": 1})
    assert names(tmp_path) == set()
    monkeypatch.setattr(resumable_writer, "SAVE_SECONDS", 0)
    with open_writer(tmp_path / "out", FACTS) as files:
        files.save({"done": 1})
    assert journal_of(tmp_path / "out").exists()


def test_a_kill_between_the_two_renames_is_resumed(tmp_path: Path) -> None:
    """The list has its final name already, the rows do not."""
    target = tmp_path / "out.csv"
    with open_writer(target, FACTS) as files:
        files.write(b"one\n", b"bad\n")
        files.save({"done": 2}, now=True)
    (tmp_path / ".out.csv.bad.part").rename(bad_of(target))
    check_free(target)
    with open_writer(target, FACTS) as files:
        assert files.before == {"done": 2}
        files.finish()
    assert (target.read_bytes(), bad_of(target).read_bytes()) == (b"one\n", b"bad\n")
    assert names(tmp_path) == {"out.csv", "out.csv.bad.csv"}


@pytest.mark.parametrize("before", ["nothing", "journal", "journal without bad ones", "another size"])
def test_a_foreign_list_is_kept(tmp_path: Path, before: str) -> None:
    target = tmp_path / "out.csv"
    if before != "nothing":
        with open_writer(target, FACTS) as files:
            files.write(b"one\n", b"" if before == "journal without bad ones" else b"bad\n")
            files.save({"done": 1}, now=True)
        if before != "journal":
            (tmp_path / ".out.csv.bad.part").unlink()
    bad_of(target).write_text(
        "" if before == "journal without bad ones" else "min" if before == "another size" else "mine"
    )
    with pytest.raises(UsageError, match=r"out\.csv\.bad\.csv, where images .* already exists"):
        check_free(target)
    assert bad_of(target).read_text() in ("", "min", "mine")


@pytest.mark.parametrize("name", ["out.csv", "out.csv.bad.csv"])
@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("kind", ["file", "link to nothing", "folder"])
def test_a_file_created_meanwhile_is_not_replaced(
    tmp_path: Path, name: str, converted: bool, kind: str
) -> None:
    """What was computed is kept, and the same command ends it when the name is free again."""
    target, taken = tmp_path / "out.csv", tmp_path / name
    convert = (lambda rows, to: (to.write_bytes(rows.read_bytes()), None)[1]) if converted else None
    with pytest.raises(UsageError, match=r"Move .* away") as refusal, open_writer(target, FACTS) as files:
        files.write(b"one\n", b"bad\n")
        files.save({"done": 2}, now=True)
        if kind == "file":
            taken.write_text("mine")
        elif kind == "folder":
            taken.mkdir()
        else:
            taken.symlink_to("nothing")
        files.finish(convert)
    assert name in str(refusal.value)
    if kind == "file":
        assert taken.read_text() == "mine"
    taken.rmdir() if kind == "folder" else taken.unlink()
    check_free(target)
    with open_writer(target, FACTS) as files:
        assert files.before == {"done": 2}
        files.finish(convert)
    assert (target.read_bytes(), bad_of(target).read_bytes()) == (b"one\n", b"bad\n")
    assert names(tmp_path) == {"out.csv", "out.csv.bad.csv"}


@pytest.mark.parametrize("name", [".out.csv.rows.part", ".out.csv.bad.part", ".out.csv.journal"])
@pytest.mark.parametrize("link", ["symbolic", "second name"])
def test_links_at_temporary_names_are_not_followed(tmp_path: Path, name: str, link: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    if link == "symbolic":
        (tmp_path / name).symlink_to(victim)
    else:
        (tmp_path / name).hardlink_to(victim)
    with (
        pytest.raises(DiskError, match=r"symbolic link|second name"),
        open_writer(tmp_path / "out.csv", FACTS),
    ):
        pass
    assert victim.read_text() == "precious"


def test_a_list_created_meanwhile_is_not_removed(tmp_path: Path) -> None:
    target = tmp_path / "out.csv"
    with open_writer(target, FACTS) as files:
        files.write(b"one\n")
        files.save({"done": 1}, now=True)
        bad_of(target).write_text("mine")
        files.finish()
    assert bad_of(target).read_text() == "mine"
