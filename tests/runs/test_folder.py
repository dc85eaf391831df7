"""The run folder: claiming it, and the outcome of its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.errors import DiskError, DivergedError, ExitCode, FinetuneError, TakenOverError, UsageError
from finetune.recipe import AutoValues, Recipe, load_recipe, resolve_recipe
from finetune.runs import claim as claim_module
from finetune.runs.claim import Claim, claim_folder
from finetune.runs.folder import Outcome, RunFolder, State
from finetune.runs.reader import RunReader


def recipe(**overrides: Any) -> Recipe:
    preprocessing = {
        "img_size": 32,
        "crop_pct": 0.9,
        "resize": "crop",
        "interpolation": "bilinear",
        "channels": "rgb",
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
    }
    facts = AutoValues("cpu", "float32", False, 0, 100, preprocessing, 0.0, "torch", "single")
    values = {key.replace("__", "."): value for key, value in overrides.items()}
    # A run that gets more epochs keeps its views (pipeline.setup.keep_views), which no claim knows of.
    fixed = {"data.path": "/data", "cache.views": 1}
    return resolve_recipe(load_recipe(None, fixed | values), facts)


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
    claim = claim_folder(tmp_path / place, recipe())
    folder = claim.folder
    assert claim == Claim(RunFolder(tmp_path / place))
    assert load_recipe(str(folder.recipe)).to_dict() == recipe().to_dict()
    assert names_in(folder.path) == ["checkpoints", "outcome.json", "recipe.yaml"]


def test_an_empty_folder(tmp_path: Path) -> None:
    assert claim_folder(tmp_path, recipe()) == Claim(RunFolder(tmp_path))
    assert (tmp_path / "recipe.yaml").is_file()


def test_a_link_to_a_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    claim_folder(tmp_path / "link", recipe())
    assert (tmp_path / "real" / "recipe.yaml").is_file()


@pytest.mark.parametrize("state", ["running", "interrupted", "failed", None])
def test_the_same_run_is_resumed(tmp_path: Path, state: State | None) -> None:
    folder = claim_folder(tmp_path, recipe()).folder
    checkpoint = folder.checkpoints / "checkpoint-000001"
    checkpoint.mkdir()
    if state:
        folder.write_outcome(Outcome(state, "x"))
    text = folder.recipe.read_bytes()
    assert claim_folder(tmp_path, recipe()) == Claim(folder, attempt=2)
    assert checkpoint.is_dir()
    assert folder.recipe.read_bytes() == text


def test_a_finished_run_is_recognised(tmp_path: Path) -> None:
    folder = claim_folder(tmp_path, recipe()).folder
    folder.write_outcome(Outcome("done", "finished"))
    assert claim_folder(tmp_path, recipe()) == Claim(folder, attempt=2, finished=True)
    assert RunReader(folder).outcome["state"] == "done"


def test_a_run_of_a_version_without_a_key_is_resumed(tmp_path: Path) -> None:
    saved = claim_folder(tmp_path, recipe()).folder.recipe
    lines = saved.read_text().splitlines(keepends=True)
    older = [line for line in lines if not line.startswith("runtime:")]
    assert len(older) == len(lines) - 1
    saved.write_text("".join(older))
    assert claim_folder(tmp_path, recipe()).attempt == 2


def test_more_epochs_are_the_same_run(tmp_path: Path) -> None:
    folder = claim_folder(tmp_path, recipe(training__epochs=3)).folder
    folder.write_outcome(Outcome("done", "finished"))
    assert claim_folder(tmp_path, recipe(training__epochs=5)) == Claim(folder, 2, was_finished=True)
    assert load_recipe(str(folder.recipe)).training.epochs == 5
    assert RunReader(folder).outcome["state"] == "running"
    assert "training.epochs: 5 -> 4" in refusal(tmp_path, recipe(training__epochs=4)).found


def test_another_recipe_may_be_allowed(tmp_path: Path) -> None:
    claim_folder(tmp_path, recipe())
    claim = claim_folder(tmp_path, recipe(seed=3), allow_changed=True)
    assert claim.changes == ("seed: 0 -> 3",)
    assert load_recipe(str(claim.folder.recipe)).seed == 3


def test_a_later_claim_ends_an_earlier_one(tmp_path: Path) -> None:
    earlier = claim_folder(tmp_path, recipe())
    earlier.check_owner()
    later = claim_folder(tmp_path, recipe())
    later.check_owner()
    with pytest.raises(TakenOverError, match="attempt 2, and this is 1"):
        earlier.check_owner()


def test_a_run_killed_while_it_is_extended_is_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = claim_folder(tmp_path, recipe(training__epochs=3)).folder
    folder.write_outcome(Outcome("done", "finished"))

    def die(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(claim_module, "write_text", die)
        with pytest.raises(KeyboardInterrupt):
            claim_folder(tmp_path, recipe(training__epochs=5))
    assert not claim_folder(tmp_path, recipe(training__epochs=3)).finished


def test_another_recipe_is_refused_with_the_differences(tmp_path: Path) -> None:
    claim_folder(tmp_path, recipe())
    refused = refusal(tmp_path, recipe(training__lr=0.5, seed=3))
    assert refused.found == "it holds another run (training.lr: 0.01 -> 0.5; seed: 0 -> 3)"
    assert refused.fix == (
        "Name a new folder with --output, or give the earlier command again to resume that run "
        "(--allow-changed resumes it with this recipe)."
    )


def test_another_recipe_is_refused_even_when_that_run_is_finished(tmp_path: Path) -> None:
    claim_folder(tmp_path, recipe()).folder.write_outcome(Outcome("done", "finished"))
    assert "it holds another run" in refusal(tmp_path, recipe(seed=1)).found


def test_at_most_five_differences_are_listed(tmp_path: Path) -> None:
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
    folder = claim_folder(tmp_path, recipe()).folder
    folder.recipe.write_bytes(content)
    refused = refusal(tmp_path, recipe())
    assert found in refused.found
    assert refused.exit_code == ExitCode.USAGE and refused.fix.startswith("Name a new folder with --output")
    if "another run" not in found:
        assert "recipe.yaml is damaged" in refused.found


def test_a_folder_instead_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").mkdir()
    assert "recipe.yaml is damaged (it is a folder)" in refusal(tmp_path, recipe()).found


@pytest.mark.parametrize("path", ["/proc/finetune", "/proc/finetune/run", "/dev/null/run"])
def test_a_path_that_cannot_be_written(path: str) -> None:
    with pytest.raises(DiskError) as fault:
        claim_folder(Path(path), recipe())
    assert fault.value.exit_code == ExitCode.DISK
    assert fault.value.asked == f"writing {path}"


def test_a_file_instead_of_the_checkpoint_folder(tmp_path: Path) -> None:
    folder = claim_folder(tmp_path, recipe()).folder
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(DiskError):
        claim_folder(folder.path, recipe())


def test_after_a_full_disk_the_same_command_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise DiskError("writing", "No space left on device", "Free some space.")

    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(claim_module, "write_text", fail)
        with pytest.raises(DiskError):
            claim_folder(path, recipe())
    assert claim_folder(path, recipe()) == Claim(RunFolder(path))


def test_after_a_kill_during_a_claim_the_same_command_resumes(tmp_path: Path) -> None:
    (tmp_path / ".recipe.yaml.part").write_bytes(b"backbo")
    assert claim_folder(tmp_path, recipe()) == Claim(RunFolder(tmp_path))
    assert names_in(tmp_path) == ["checkpoints", "outcome.json", "recipe.yaml"]
    (tmp_path / "checkpoints").rmdir()
    claim_folder(tmp_path, recipe())
    assert (tmp_path / "checkpoints").is_dir()


# --- the outcome ---------------------------------------------------------------------------------


def test_an_outcome_is_read_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_outcome(Outcome.of(DivergedError("it", "broke", "mend it"), step=7, attempt=3))
    assert RunReader(folder).outcome == {
        "state": "failed",
        "class": "diverged",
        "retryable": False,
        "message": "it: broke",
        "hint": "mend it",
        "exit_code": 76,
        "step": 7,
        "attempt": 3,
    }


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[1]", b"null", b'"done"', b"\xff", b"\0", b"[" * 100_000]
)
def test_a_damaged_outcome_counts_as_none(tmp_path: Path, content: bytes | None) -> None:
    folder = claim_folder(tmp_path, recipe()).folder
    folder.outcome.unlink()
    if content is not None:
        folder.outcome.write_bytes(content)
    assert RunReader(folder, tolerant=True).outcome == {}
    assert claim_folder(tmp_path, recipe()) == Claim(folder)


@pytest.mark.parametrize("kind", FinetuneError.__subclasses__())
def test_every_error_becomes_an_outcome(kind: type[FinetuneError]) -> None:
    outcome = Outcome.of(kind("a", "b", "c"), 1, 1)
    assert outcome.state == ("interrupted" if outcome.exit_code == 75 else "failed")
    assert (outcome.message, outcome.hint) == ("a: b", "c")
    assert ExitCode[outcome.fault.upper()] == outcome.exit_code
    assert outcome.retryable == (outcome.exit_code in (70, 74, 75))


# --- names ---------------------------------------------------------------------------------------


def test_every_path_is_in_the_folder_and_has_a_name_of_its_own() -> None:
    folder = RunFolder(Path("run"))
    names = [name for name, value in vars(RunFolder).items() if isinstance(value, property)]
    paths = [getattr(folder, name) for name in names]
    assert len(set(paths)) == len(paths) > 10
    assert all(path.is_relative_to(folder.path) for path in paths)
    assert not folder.path.exists()
