"""Names that hold commands to a terminal: every command shows them, and none reaches the terminal."""

from __future__ import annotations

import io
import json
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

from finetune.cli import output as door
from finetune.cli.app import app
from finetune.errors import sanitize
from finetune.system import display as displays
from finetune.system.display import Display
from tests.conftest import Cli, draw

EVIL = "\x1b]0;x\x07\r\x9b1m\u202e\u061c\x7f\t"
"""It would set the title, ring, overwrite the line, colour it and turn its direction."""
HIDDEN = "\u202e\u061c"
"""What of it the name of a class may hold."""
TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
WORDS = ("--device", "cpu", "--workers", 0)


def raw_controls(text: str) -> list[str]:
    """Return what a terminal would obey: control characters but line breaks, and those of direction."""
    return sorted(
        ascii(char)
        for char in set(text) - {"\n"}
        if unicodedata.category(char) in {"Cc", "Cs", "Zl", "Zp"}
        or unicodedata.bidirectional(char) in TURNS
        or char in "\u061c\u200e\u200f"
    )


def list_commands(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every command that can be called, by its words."""
    if name and (not hasattr(command, "commands") or command.invoke_without_command):
        yield name, command
    for word, inner in getattr(command, "commands", {}).items():
        yield from list_commands(inner, f"{name} {word}".strip())


COMMANDS = dict(list_commands(get_command(app)))


class Place(NamedTuple):
    """Where everything has a hostile name: a network, images, a run on them and its evaluation."""

    root: Path
    tiny: Path
    data: Path
    run: Path
    evaluation: Path

    @property
    def image(self) -> Path:
        return next((self.data / "val" / f"blue{HIDDEN}").iterdir())

    @property
    def solved(self) -> Path:
        """A run whose classifier is solved."""
        run = self.new
        words = ("-s", "freeze", "--set", "strategy.features=last", "--workers", 0)
        said(0, "run", "-b", self.tiny, "-d", self.data, *words, "-o", run)
        return run

    @property
    def more(self) -> Path:
        """Images of a class that the run does not have."""
        folder = self.new / f"green{HIDDEN}"
        for seed in range(6):
            draw(folder / f"{EVIL}\n{seed}.jpg", (40, 200, 60), 500 + seed)
        return folder.parent

    @property
    def new(self) -> Path:
        """A folder that does not exist."""
        return self.root / f"{EVIL}{len(list(self.root.iterdir()))}"


def said(code: int, *words: object) -> str:
    """Run a command that must end with a code, and return what it said, which holds no raw control."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    kept = "\t" if words[0] == "recipes" else ""
    assert raw_controls(result.stdout.replace(kept, "")) == []
    assert raw_controls(result.stderr) == []
    return str(result.output)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Place:
    root = tmp_path_factory.mktemp("hostile")
    (root / f"tiny{EVIL}").symlink_to(tiny)
    data = root / f"data{EVIL}"
    for split, number in (("train", 20), ("val", 3)):
        for position, colour in enumerate(((40, 60, 200), (200, 50, 40))):
            for seed in range(number):
                name = f"{EVIL}\n{seed}.jpg"
                folder = data / split / f"{('blue', 'red')[position]}{HIDDEN}"
                draw(folder / name, colour, 100 * position + seed + 1000 * (split == "val"))
    (root / f"recipe{EVIL}.yaml").write_text(f"# {HIDDEN}\ttab\nseed: 1\n", encoding="utf-8")
    (root / "labels.csv").write_text(f"path,label\n{data.name}{EVIL!r},{EVIL}\n", encoding="utf-8")
    place = Place(root, root / f"tiny{EVIL}", data, root / f"run{EVIL}", root / f"evaluation{EVIL}")
    said(0, "run", *DONE["run"](place), "--json")
    said(0, "evaluate", place.run, "-d", place.data, "-o", place.evaluation)
    return place


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_STORE", str(tmp_path / "store"))


def queue_job(at: Place) -> tuple[object, ...]:
    """Queue a job with a hostile label, and return its id."""
    return (said(0, "jobs", "submit", "-d", "sample:digits", "--label", EVIL).splitlines()[-1],)


Words = Callable[[Place], tuple[object, ...]]
OF_JOBS = ("show", "logs", "events", "cancel", "resume", "rm")
OF_IMAGES = (
    *("cam", "saliency", "localise", "filters", "maps", "top", "deconv", "evolution", "receptive-field"),
    "invariance",
)
"""What `finetune explain` shows of images."""
OF_NETWORKS = ("class", "ablate", "influence")
DONE: dict[str, Words] = {
    "run": lambda at: (
        "-b",
        at.tiny,
        "-d",
        at.data,
        "-o",
        at.run,
        "--epochs",
        1,
        "--workers",
        0,
        "--batch-size",
        8,
        "--set",
        "training.keep_epochs=[1]",
    ),
    "check": lambda at: (at.data, "-o", at.new),
    "check --run": lambda at: ("--run", at.run, "-o", at.new),
    "check --folds": lambda at: (at.data, "--folds", 2, "-o", at.new),
    "advise": lambda at: ("-b", at.tiny, "-d", at.data, "-o", at.new, *WORDS),
    "evaluate": lambda at: (at.run, "-d", at.data, "-o", at.new),
    "report": lambda at: (at.run,),
    "compare": lambda at: (at.run, at.evaluation),
    "predict": lambda at: (at.run, at.data, "-o", at.new),
    "extract": lambda at: ("-b", at.tiny, "-d", at.data, "-o", at.new, "-l", "layer4", *WORDS),
    "probe": lambda at: (
        *("-b", at.tiny, "-d", at.data, "-o", at.new, "-l", "layer4", "--classifiers", "knn"),
        *("--per-class", 5, "--repeats", 1, *WORDS),
    ),
    "forecast": lambda at: (at.run, "-o", at.new, "--target-accuracy", 0.5),
    "audit": lambda at: (at.run, "-o", at.new),
    "extend": lambda at: (at.run, "-d", at.more, "-o", at.new, "--epochs", 1),
    "similar": lambda at: (at.image, "-b", at.tiny, "-d", at.data, "-o", at.new, *WORDS),
    "map": lambda at: ("-b", at.tiny, "-d", at.data, "-o", at.new, *WORDS),
    "pull": lambda at: (at.run,),
    "backbones": lambda at: ("--search", EVIL),
    "backbones show": lambda at: (at.run,),
    "recipes": lambda at: (),
    "recipes schema": lambda at: (),
    "recipes show": lambda at: (at.root / f"recipe{EVIL}.yaml",),
    "cache list": lambda at: (),
    "cache clear": lambda at: (),
    "backbones chart": lambda at: ("resnet18", "mobilenetv3_small_050", "-o", at.new),
    "explain ablate": lambda at: (at.run, "-o", at.new, *WORDS),
    "explain influence": lambda at: (at.solved, at.image, "-o", at.new),
    "explain class": lambda at: (at.run, "-o", at.new, "--seeds", 1, *WORDS),
    **{f"explain {name}": lambda at: (at.run, at.image, "-o", at.new, *WORDS) for name in OF_IMAGES},
}
"""Words with which a command succeeds; after its name may stand a flag that tells two cases apart."""
DONE |= {
    "jobs submit": lambda at: ("-d", "sample:digits", "--label", EVIL),
    "jobs list": lambda at: (queue_job(at) and "--label", EVIL),
    "jobs show": queue_job,
    "jobs logs": queue_job,
    "jobs events": queue_job,
    "jobs cancel": queue_job,
    "jobs resume": lambda at: (said(0, "jobs", "cancel", *(job := queue_job(at))) and job[0],),
    "jobs rm": lambda at: (said(0, "jobs", "cancel", *(job := queue_job(at))) and job[0],),
    "jobs pull": lambda at: (*queue_job(at), "-o", at.new),
}
SILENT = {f"jobs {name}" for name in ("submit", "logs", "events", "cancel", "resume", "rm")}
"""Commands that show ids and states, and no name that a user gave."""
REFUSED: dict[str, tuple[int, Words]] = {
    "run": (2, lambda at: ("-d", at.data, "--set", f"training.{EVIL}={EVIL}")),
    "check": (65, lambda at: (at.root / "labels.csv", "-o", at.new)),
    "advise": (2, lambda at: ("-b", EVIL, "-d", at.data)),
    "evaluate": (2, lambda at: (EVIL, "-d", at.data)),
    "report": (2, lambda at: (at.root / EVIL,)),
    "compare": (2, lambda at: (at.run, at.root / EVIL)),
    "predict": (65, lambda at: (at.run, at.root / EVIL, "-o", at.new)),
    "extract": (2, lambda at: ("-b", at.tiny, "-d", at.data, "-o", at.new, "--layers", EVIL, *WORDS)),
    "probe": (2, lambda at: ("-b", at.tiny, "-d", at.data, "--classifiers", EVIL, *WORDS)),
    "forecast": (2, lambda at: (at.root / EVIL, "-o", at.new)),
    "audit": (2, lambda at: (at.root / EVIL, "-o", at.new)),
    "extend": (65, lambda at: (at.run, "-d", at.root / EVIL, "-o", at.new)),
    "similar": (65, lambda at: (at.root / EVIL, "-b", at.tiny, "-d", at.data, *WORDS)),
    "map": (2, lambda at: ("-b", at.tiny, "-d", at.data, "--method", EVIL, *WORDS)),
    "export": (2, lambda at: (at.run, "-o", at.data)),
    "push": (2, lambda at: (at.run, EVIL)),
    "pull": (2, lambda at: (EVIL,)),
    "backbones": (2, lambda at: (EVIL,)),
    "backbones show": (2, lambda at: (EVIL,)),
    "recipes": (2, lambda at: (EVIL,)),
    "recipes schema": (2, lambda at: (EVIL,)),
    "recipes show": (2, lambda at: (EVIL,)),
    "cache list": (2, lambda at: (EVIL,)),
    "cache clear": (2, lambda at: (EVIL,)),
    "backbones chart": (2, lambda at: (EVIL, "-o", at.new)),
    "serve": (2, lambda at: ("--data-root", at.root / EVIL)),
    "jobs submit": (65, lambda at: ("-d", at.root / EVIL)),
    "jobs list": (2, lambda at: ("--state", EVIL)),
    "jobs pull": (2, lambda at: (EVIL, "-o", at.new)),
    **{f"jobs {name}": (2, lambda at: (EVIL,)) for name in OF_JOBS},
    **{
        f"explain {name}": (2, lambda at: (EVIL, "-o", at.new))
        for name in (*OF_IMAGES, "class", "ablate", "influence")
    },
}
"""Exit code and words of a refusal that names what was given."""


def name_of(case: str) -> str:
    return " ".join(word for word in case.split() if not word.startswith("--"))


def test_every_command_is_tried() -> None:
    """A new command stands here as soon as it stands in the app."""
    assert set(REFUSED) == set(COMMANDS)
    endless = {"serve"}
    assert set(map(name_of, DONE)) == set(COMMANDS) - {"export", "push"} - endless, "which start processes"


@pytest.mark.sample(1)
@pytest.mark.parametrize("case", DONE)
def test_what_a_command_says(case: str, place: Place) -> None:
    shown = said(0, *name_of(case).split(), *DONE[case](place))
    if case not in {"recipes", "recipes schema", "cache list", "cache clear", *SILENT}:
        assert "\\u202e" in shown, "it said no hostile name, so nothing was tried"


@pytest.mark.sample(2)
@pytest.mark.parametrize("case", REFUSED)
def test_what_a_command_refuses(case: str, place: Place) -> None:
    code, words = REFUSED[case]
    assert "x1b]0;x" in said(code, *case.split(), *words(place))
    if any("--json" in parameter.opts for parameter in COMMANDS[case].params):
        said(code, *case.split(), *words(place), "--json")


@pytest.mark.parametrize("words", [("run", f"--{EVIL}"), (EVIL,), (f"--{EVIL}",), ("run", "--epochs", EVIL)])
def test_what_the_parser_refuses(words: tuple[str, ...]) -> None:
    said(2, *words)


def test_a_row_of_a_table_stays_one_line(place: Place, cli: Cli) -> None:
    result = cli(
        "similar", place.image, "-b", place.tiny, "-d", place.data, "-o", place.new, "--top", 3, *WORDS
    )
    assert len(result.stdout.splitlines()) == 1 + 3
    rows = json.loads(
        cli(
            "similar", place.image, "-b", place.tiny, "-d", place.data, "-o", place.new, "--json", *WORDS
        ).stdout
    )
    assert all(EVIL in row["path"] for row in rows), "JSON gives the names as they are"


# --- the two doors -------------------------------------------------------------------------------

ALL = "".join(map(chr, [*range(0x3000), *range(0xD7F0, 0xE010), *range(0xFE00, 0x10000), 0x1F41D]))


def test_no_door_lets_a_control_character_pass(capsys: pytest.CaptureFixture[str]) -> None:
    parts = [ALL[start : start + 1000] for start in range(0, len(ALL), 1000)]
    for part in parts:
        door.say(part, colour="red")
        door.print_line(part, bold=True)
        door.print_table([part], [[part]])
        door.print_json({part: [part]})
    door.print_text(ALL.replace("\t", ""))
    file = io.StringIO()
    display = Display(Console(file=file, width=200))
    for part in parts:
        display.say(part)
        display.warn(part)
        display.say_fields([part, part])
        display.table([sanitize(part)], [[part]])
    shown = capsys.readouterr()
    for text in (shown.out, shown.err, file.getvalue()):
        assert raw_controls(text) == []
    assert "\U0001f41d" in shown.out and "\U0001f41d" in file.getvalue()


def test_no_progress_on_a_terminal_is_a_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor is it markup, of which a closing tag alone would be an error."""
    monkeypatch.setattr(displays, "FIRST_LINE", 0.05)
    file = io.StringIO()
    display = Display(Console(file=file, force_terminal=True, width=120, color_system=None))
    display.log_to(tmp_path / "run.log")
    name = f"[/x] [red]{EVIL}\n"
    with display.busy(name), display.track(name, 2) as advance, display.fetch(name) as fetched:
        advance(1, name)
        fetched(1, 2)
    display.table([name], [[name]])
    display.note(name)
    assert "[/x] [red]\\x1b]0;x" in file.getvalue()
    assert not any(
        command in file.getvalue() for command in ("\x1b]", "\x07", "\x9b", "\u202e", "\x7f", "\t")
    )
    assert raw_controls((tmp_path / "run.log").read_text()) == []


def test_letters_that_a_stream_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr("sys.stdout", stream)
    door.print_table(["path"], [["caf\u00e9 \u8702"]])
    door.print_json(["\u8702"])
    assert stream.buffer.getvalue().decode("latin-1") == 'path\ncaf\u00e9 \\u8702\n["\\u8702"]\n'  # type: ignore[attr-defined]
