"""The run folder: who may have it, and how the run in it ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.errors import DiskError, DivergedError, ExitCode, InterruptedRunError, UsageError
from finetune.recipe import Facts, Recipe, load_recipe, resolve_recipe
from finetune.runs import claim as claim_module
from finetune.runs.claim import claim_folder
from finetune.runs.folder import RunFolder, State, outcome_of


def recipe(**overrides: Any) -> Recipe:
    preprocessing = {
        "img_size": 32,
        "crop_pct": 0.9,
        "crop_mode": "center",
        "interpolation": "bilinear",
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
    }
    facts = Facts("cpu", "float32", False, 0, 100, preprocessing)
    values = {key.replace("__", "."): value for key, value in overrides.items()}
    return resolve_recipe(load_recipe(None, {"data.path": "/data", **values}), facts)


def refusal(path: Path, wanted: Recipe) -> UsageError:
    before = snapshot(path)
    with pytest.raises(UsageError) as refused:
        claim_folder(path, wanted)
    assert refused.value.asked == f"--output {path}"
    assert snapshot(path) == before, "a refusal changes nothing"
    return refused.value


def snapshot(path: Path) -> dict[str, bytes | None]:
    return {
        str(item.relative_to(path)): item.read_bytes() if item.is_file() else None
        for item in sorted(path.rglob("*"))
    }


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- claiming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["run", "a/b/c"])
def test_a_new_folder(tmp_path: Path, place: str) -> None:
    folder, finished = claim_folder(tmp_path / place, recipe())
    assert folder == RunFolder(tmp_path / place) and not finished
    assert load_recipe(str(folder.recipe)) == recipe()
    assert names_in(folder.path) == ["checkpoints", "recipe.yaml"]


def test_an_empty_folder(tmp_path: Path) -> None:
    assert claim_folder(tmp_path, recipe()) == (RunFolder(tmp_path), False)
    assert (tmp_path / "recipe.yaml").is_file()


def test_a_link_to_a_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    claim_folder(tmp_path / "link", recipe())
    assert (tmp_path / "real" / "recipe.yaml").is_file()


@pytest.mark.parametrize("state", ["running", "interrupted", "failed", None])
def test_the_same_run_goes_on(tmp_path: Path, state: State | None) -> None:
    folder, _ = claim_folder(tmp_path, recipe())
    folder.last_checkpoint.write_bytes(b"progress")
    if state:
        folder.write_outcome(state, "x")
    text = folder.recipe.read_bytes()
    assert claim_folder(tmp_path, recipe()) == (folder, False)
    assert folder.last_checkpoint.read_bytes() == b"progress"
    assert folder.recipe.read_bytes() == text


def test_a_finished_run_is_known_as_finished(tmp_path: Path) -> None:
    folder, _ = claim_folder(tmp_path, recipe())
    folder.write_outcome("done", "finished")
    assert claim_folder(tmp_path, recipe()) == (folder, True)


def test_another_recipe_is_refused_with_what_differs(tmp_path: Path) -> None:
    claim_folder(tmp_path, recipe())
    refused = refusal(tmp_path, recipe(training__lr=0.5, seed=3))
    assert refused.found == "it holds another run (training.lr: 0.01 -> 0.5; seed: 0 -> 3)"
    assert refused.fix == (
        "Name a new folder with --output, or give the same command again to go on with that run."
    )


def test_another_recipe_is_refused_even_when_that_run_is_finished(tmp_path: Path) -> None:
    claim_folder(tmp_path, recipe())[0].write_outcome("done", "finished")
    assert "it holds another run" in refusal(tmp_path, recipe(seed=1)).found


def test_at_most_five_differences_are_told(tmp_path: Path) -> None:
    claim_folder(tmp_path, recipe())
    other = recipe(
        seed=3, training__lr=1, training__epochs=3, training__mixup=1, data__path="/x", input__img_size=64
    )
    found = refusal(tmp_path, other).found
    assert found.count("->") == 5 and found.endswith("; ...)")


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name in ("d.txt", "a.txt", "c.txt", "b.txt"):
        (tmp_path / name).write_text("mine")
    refused = refusal(tmp_path, recipe())
    assert refused.found == "the folder holds other files (a.txt, b.txt, c.txt) and no run"
    assert refused.fix == "Name a new folder."


def test_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("mine")
    refused = refusal(path, recipe())
    assert str(refused) == f"--output {path}: it is a file\nName a folder."
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"training: {lr: [\n", "its YAML is refused: line 2"),
        (b"\xff\xfe\x00", "it is not UTF-8 text"),
        (b"\0" * 500, "its YAML is refused"),
        (b"- a\n", "it is not a mapping of sections"),
        (b"training: {lr: -1}\n", "`training.lr` is -1; it must be a number above 0 or auto"),
        (b"later_key: 1\n", "there is no `later_key`"),
        (b"", "it holds another run"),
    ],
)
def test_a_damaged_recipe_in_the_folder(tmp_path: Path, content: bytes, found: str) -> None:
    folder, _ = claim_folder(tmp_path, recipe())
    folder.recipe.write_bytes(content)
    refused = refusal(tmp_path, recipe())
    assert found in refused.found
    assert refused.exit_code == ExitCode.USAGE and refused.fix.startswith("Name a new folder with --output")
    if "another run" not in found:
        assert "recipe.yaml is damaged" in refused.found


def test_a_folder_in_the_place_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").mkdir()
    assert "recipe.yaml is damaged (it is a folder)" in refusal(tmp_path, recipe()).found


@pytest.mark.parametrize("path", ["/proc/finetune", "/proc/finetune/run", "/dev/null/run"])
def test_a_place_that_cannot_be_written(path: str) -> None:
    with pytest.raises(DiskError) as fault:
        claim_folder(Path(path), recipe())
    assert fault.value.exit_code == ExitCode.DISK
    assert fault.value.asked == f"writing {path}"


def test_a_file_in_the_place_of_the_checkpoints(tmp_path: Path) -> None:
    folder, _ = claim_folder(tmp_path, recipe())
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(DiskError):
        claim_folder(folder.path, recipe())


def test_after_a_full_disk_the_same_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise DiskError("writing", "No space left on device", "Free some space.")

    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(claim_module, "write_text", fail)
        with pytest.raises(DiskError):
            claim_folder(path, recipe())
    assert claim_folder(path, recipe()) == (RunFolder(path), False)


def test_after_a_kill_in_the_middle_of_a_claim_the_same_command_goes_on(tmp_path: Path) -> None:
    (tmp_path / ".recipe.yaml.part").write_bytes(b"backbo")
    assert claim_folder(tmp_path, recipe()) == (RunFolder(tmp_path), False)
    assert names_in(tmp_path) == ["checkpoints", "recipe.yaml"]
    (tmp_path / "checkpoints").rmdir()
    claim_folder(tmp_path, recipe())
    assert (tmp_path / "checkpoints").is_dir()


# --- the outcome ---------------------------------------------------------------------------------


def test_an_outcome_comes_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_outcome("failed", "it broke", "mend it", 76)
    assert folder.read_outcome() == {
        "state": "failed",
        "message": "it broke",
        "hint": "mend it",
        "exit_code": 76,
    }


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[1]", b"null", b'"done"', b"\xff", b"\0", b"[" * 100_000]
)
def test_a_damaged_outcome_counts_as_none(tmp_path: Path, content: bytes | None) -> None:
    folder, _ = claim_folder(tmp_path, recipe())
    if content is not None:
        folder.outcome.write_bytes(content)
    assert folder.read_outcome() == {}
    assert claim_folder(tmp_path, recipe()) == (folder, False)


def test_errors_become_outcomes() -> None:
    assert outcome_of(InterruptedRunError("a", "b", "c")) == ("interrupted", "a: b", "c", 75)
    assert outcome_of(DivergedError("a", "b", "c")) == ("failed", "a: b", "c", 76)


# --- names ---------------------------------------------------------------------------------------


def test_every_path_is_in_the_folder_and_has_a_name_of_its_own() -> None:
    folder = RunFolder(Path("run"))
    names = [name for name, value in vars(RunFolder).items() if isinstance(value, property)]
    paths = [getattr(folder, name) for name in names]
    assert len(set(paths)) == len(paths) > 10
    assert all(path.is_relative_to(folder.path) for path in paths)
    assert not folder.path.exists()
