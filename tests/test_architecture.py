"""The house: imports go down only and never in a circle, and nothing here can run what it reads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("finetune", "pretrained")

FLOORS = (
    ("finetune", "finetune.errors", "finetune.targets"),
    ("pretrained.graph", "pretrained.zoo"),
    ("pretrained",),
    ("finetune.system", "finetune.strategies"),
    ("finetune.recipe",),
    ("finetune.runs",),
    ("finetune.plots", "finetune.launch", "finetune.tracking"),
    ("finetune.data",),
    ("finetune.data.quality",),
    ("finetune.features",),
    ("finetune.evaluation",),
    ("finetune.training", "finetune.explain", "finetune.exporters"),
    ("finetune.report", "finetune.shortcuts"),
    ("finetune.pipeline",),
    ("finetune.api",),
    ("finetune.service",),
    ("finetune.cli",),
    ("finetune.__main__",),
)
"""Rooms from low to high (docs/design.md). A room imports itself and the floors below it; rooms on one
floor do not know each other, but for ``finetune``, which is only a version number."""

LEVELS = {room: level for level, floor in enumerate(FLOORS) for room in floor}


class Import(NamedTuple):
    importer: str
    imported: str
    line: int


@cache
def modules() -> Mapping[str, ast.Module]:
    """Every module of the packages with its syntax tree."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


def imports_of(name: str, tree: ast.Module, known: Mapping[str, object]) -> Iterator[Import]:
    """Every import of a module, wherever it stands. ``from package import module`` means the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(name, alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: imports are absolute here"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield Import(name, inner if inner in known else str(node.module), node.lineno)


def all_imports() -> list[Import]:
    known = modules()
    return [found for name, tree in known.items() for found in imports_of(name, tree, known)]


def our_imports() -> list[Import]:
    return [found for found in all_imports() if found.imported.partition(".")[0] in PACKAGES]


def room_of(module: str) -> str:
    """The longest name on the list that a module lies in."""
    parts = module.split(".")
    rooms = (".".join(parts[:size]) for size in range(len(parts), 0, -1))
    return next(room for room in rooms if room in LEVELS)


def upward(imports: list[Import]) -> list[str]:
    """Imports of a higher room, or of another one on the same floor."""
    return [
        f"{found.importer}:{found.line} imports {found.imported}"
        for found in imports
        if (here := room_of(found.importer)) != (there := room_of(found.imported))
        and there != "finetune"
        and LEVELS[there] >= LEVELS[here]
    ]


def find_circle(imports: list[Import]) -> list[str] | None:
    graph: dict[str, set[str]] = {}
    for found in imports:
        if found.importer != found.imported:
            graph.setdefault(found.importer, set()).add(found.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [str(name) for name in reversed(error.args[1])]  # the importer first
    return None


# --- the checks can fail -------------------------------------------------------------------------


def graph_of(**sources: str) -> list[Import]:
    trees = {name.replace("__", "."): ast.parse(source) for name, source in sources.items()}
    return [found for name, tree in trees.items() for found in imports_of(name, tree, trees)]


def test_an_upward_import_is_seen() -> None:
    wrong = graph_of(
        finetune__data__loader="def load():\n    from finetune.training.trainer import Trainer",
        finetune__runs__files="import finetune.data.loader",
        pretrained__zoo="from finetune.recipe import Recipe",
        finetune__cli="import finetune.pipeline",
        finetune__recipe__reading="from finetune import __version__",
    )
    assert upward(wrong) == [
        "finetune.data.loader:2 imports finetune.training.trainer",
        "finetune.runs.files:1 imports finetune.data.loader",
        "pretrained.zoo:1 imports finetune.recipe",
    ]


def test_a_circle_is_seen() -> None:
    circle = graph_of(
        finetune__a="from finetune import b",
        finetune__b="def f():\n    import finetune.c",
        finetune__c="import finetune.a",
    )
    found = find_circle(circle)
    assert found and set(found) == {"finetune.a", "finetune.b", "finetune.c"}
    assert find_circle(circle[:2]) is None


# --- the house -----------------------------------------------------------------------------------


def test_every_module_has_a_room() -> None:
    homeless = {name for name in modules() if room_of(name) == "finetune" and name != "finetune"}
    assert not homeless, f"give these a floor in FLOORS: {sorted(homeless)}"
    empty = {room for room in LEVELS if not any(room_of(name) == room for name in modules())}
    assert not empty, f"there are no such rooms: {sorted(empty)}"


def test_imports_only_go_down() -> None:
    assert upward(our_imports()) == []


def test_pretrained_knows_nothing_of_finetune_but_its_errors() -> None:
    known = {found.imported for found in our_imports() if found.importer.startswith("pretrained")}
    assert {name for name in known if name.startswith("finetune")} <= {"finetune.errors"}


def test_rooms_do_not_import_each_other_in_a_circle() -> None:
    between = [
        found._replace(importer=room_of(found.importer), imported=room_of(found.imported))
        for found in our_imports()
    ]
    assert find_circle(between) is None


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    """Imports in functions count: they only hide a circle."""
    circle = find_circle(our_imports())
    assert circle is None, " -> ".join(circle or [])


def test_errors_import_nothing_but_the_standard_library() -> None:
    names = {
        found.imported.partition(".")[0] for found in all_imports() if found.importer == "finetune.errors"
    }
    assert names <= set(sys.stdlib_module_names)


def test_only_the_command_line_knows_typer() -> None:
    rooms = {
        room_of(found.importer) for found in all_imports() if found.imported.partition(".")[0] == "typer"
    }
    assert rooms == {"finetune.cli"}


def test_a_recipe_needs_no_torch() -> None:
    heavy = {"torch", "torchvision", "timm", "pandas", "numpy"}
    for found in all_imports():
        if room_of(found.importer) in {"finetune.recipe", "finetune.strategies"}:
            assert found.imported.partition(".")[0] not in heavy, found


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        (
            "finetune.cli.app",
            {"torch", "pydantic", "pandas", "timm", "torchvision", "numpy", "PIL", "ruamel"},
        ),
        ("finetune.recipe", {"torch", "timm", "torchvision", "pandas", "numpy", "PIL"}),
        ("finetune.runs.folder", {"torch", "timm", "torchvision"}),
        ("finetune.targets", {"torch", "numpy", "pandas", "sklearn"}),
    ],
)
def test_what_an_import_does_not_load(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; print(*(name for name in {sorted(absent)!r} if name in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.split() == []


# --- one owner of hooks --------------------------------------------------------------------------

HOOKS_ALLOWED = {
    "pretrained.graph.recorder": "observes, records and replaces values, and removes its hooks",
    "finetune.training.standardize": "standardised features are part of the network until they are folded in",
}


def registers_hooks(tree: ast.Module) -> bool:
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return any(name.startswith("register_") and name.endswith("hook") for name in names)


def test_a_hook_is_seen() -> None:
    for method in ("forward_hook", "forward_pre_hook", "full_backward_hook", "module_forward_hook", "hook"):
        assert registers_hooks(ast.parse(f"module.register_{method}(note)"))
    assert not registers_hooks(ast.parse("module.register_buffer('mean', mean)"))


def test_one_module_owns_the_hooks() -> None:
    assert {name for name, tree in modules().items() if registers_hooks(tree)} == set(HOOKS_ALLOWED)


# --- nothing that is read can run ----------------------------------------------------------------

UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}


def unsafe(name: str, tree: ast.Module) -> Iterator[str]:
    """Yield every use of what can run code from a file. The name of an error may be imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            words = [alias.name for alias in node.names]
            module = getattr(node, "module", None)
            sources = [module] if module else words
            if words != ["UnpicklingError"] and UNSAFE_MODULES & {
                source.partition(".")[0] for source in sources
            }:
                yield f"{name}:{node.lineno} imports {', '.join(sources)}"
        elif isinstance(node, ast.Call):
            yield from (f"{name}:{node.lineno} {fault}" for fault in _unsafe_call(node))
        elif isinstance(node, ast.Constant) and node.value == "weights_only":
            yield f"{name}:{node.lineno} hides weights_only in a string"


def _unsafe_call(call: ast.Call) -> Iterator[str]:
    words = {word.arg: word.value for word in call.keywords}
    function = ast.unparse(call.func)
    if function in UNSAFE_CALLS:
        yield f"calls {function}"
    if "weights_only" in words and ast.unparse(words["weights_only"]) != "True":
        yield "loads with weights_only other than True"
    if function == "torch.load" and "weights_only" not in words:
        yield "loads without weights_only=True"
    if "allow_pickle" in words and ast.unparse(words["allow_pickle"]) != "False":
        yield "allows pickle"


def test_unsafe_code_is_seen() -> None:
    lines = [
        "import pickle",
        "import json, pickle as p",
        "from pickle import UnpicklingError, load",
        "def f():\n    from joblib.numpy_pickle import load",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=trusted)",
        "torch.load(path)",
        "load(**{'weights_only': False})",
        "eval(text)",
        "np.load(path, allow_pickle=True)",
        "import yaml",
    ]
    for line in lines:
        assert list(unsafe("x", ast.parse(line))), line
    for line in (
        "torch.load(path, weights_only=True)",
        "from pickle import UnpicklingError",
        "model.eval()",
        "re.compile(text)",
        "torch.compile(model)",
    ):
        assert not list(unsafe("x", ast.parse(line))), line


def test_nothing_can_run_what_it_reads() -> None:
    assert [fault for name, tree in modules().items() for fault in unsafe(name, tree)] == []


# --- one door to the terminal --------------------------------------------------------------------

OUTPUT_ALLOWED = {
    "finetune.cli.output": "the door of the commands",
    "finetune.system.display": "the door of everything else",
    "finetune.cli.processes": "flushes both streams before the process ends at once",
    "finetune.system.watch": "the same",
    "finetune.launch.ray": "passes on the bytes that other processes of this program wrote",
    "finetune.exporters.fresh": "runs as a file, without this package; an error of ours quotes what it says",
    "finetune.service.predictions.model_process": "answers its server in frames, and prints nothing",
    "pretrained.sizes": "a tool of developers; it names networks of the libraries",
}
"""Modules that may write to stdout or stderr. Both doors sanitise: file names hold terminal commands."""
STREAMS = {"stdout", "stderr", "__stdout__", "__stderr__"}
WRITERS = {"print", "echo", "secho", "print_exc", "print_exception", "pprint", "Console", "input"}


def writes_output(tree: ast.Module) -> Iterator[int]:
    """Yield the line of every use of a standard stream, and of every call that writes to one."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="sys"), attr=word) if word in STREAMS:
                yield node.lineno
            case ast.Call(func=ast.Name(id=word) | ast.Attribute(attr=word)) if word in WRITERS:
                yield node.lineno
            case ast.ImportFrom(module="sys" | "typer" | "click" | "rich", names=names):
                if (STREAMS | WRITERS) & {alias.name for alias in names}:
                    yield node.lineno
            case ast.Attribute(value=ast.Name(id="warnings" | "logging"), attr="warn" | "warning" | "error"):
                yield node.lineno


def test_writing_to_a_terminal_is_seen() -> None:
    for line in (
        "print(name)",
        "typer.echo(name)",
        "from typer import echo as show",
        "sys.stderr.write(name)",
        "write = sys.stdout.buffer.write",
        "from sys import stdout",
        "Console(stderr=True)",
        "self.console.print(name)",
        "traceback.print_exc()",
        "warnings.warn(name)",
    ):
        assert list(writes_output(ast.parse(line))), line
    for line in ("display.say(name)", "print_table(columns, rows)", "logging.disable(level)", "sys.stdin"):
        assert not list(writes_output(ast.parse(line))), line


def test_only_two_modules_write_to_a_terminal() -> None:
    found = {name for name, tree in modules().items() if list(writes_output(tree))}
    assert found == set(OUTPUT_ALLOWED)


def test_one_module_makes_temporary_files() -> None:
    """Elsewhere a missing or full TMPDIR would be an unexpected error."""
    found = {found.importer for found in all_imports() if found.imported.partition(".")[0] == "tempfile"}
    beside_the_output = {"finetune.launch.platforms"}
    assert found - beside_the_output == {"finetune.system.temporary"}


# --- what a label is --------------------------------------------------------------------------------

OF_LABELS = {
    "softmax",
    "log_softmax",
    "Softmax",
    "LogSoftmax",
    "argmax",
    "cross_entropy",
    "CrossEntropyLoss",
    "nll_loss",
    "NLLLoss",
    "BCEWithLogitsLoss",
    "binary_cross_entropy_with_logits",
    "topk",
}
"""Operations that depend on what a label is, under the names of torch and numpy."""

NOT_OF_LABELS = {
    ("finetune.features.minimize", "Softmax"): "a loss with its derivatives, one of three of the solver",
    ("finetune.features.solvers", "Softmax"): "the same, by name",
    ("finetune.features.solvers", "softmax"): "the name under which a user asks for it",
    ("finetune.features.probe", "softmax"): "the name under which a user asks for it",
    ("finetune.features.transferability", "topk"): "the nearest images by cosine",
    ("finetune.evaluation.multi_label", "argmax"): "the best of all thresholds",
    ("finetune.features.retrieval", "argmax"): "the sign of a principal axis",
    ("finetune.explain.dependencies", "softmax"): "attention",
    ("finetune.explain.relu_rules", "softmax"): "attention",
}
"""Where another thing has such a name, and what it is."""


def words_of_labels(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield each of these operations that a module defines, imports, calls or names in a string."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=word) | ast.Name(id=word) | ast.Constant(value=str(word)):
                words = {word}
            case ast.ClassDef(name=word) | ast.FunctionDef(name=word) | ast.arg(arg=word):
                words = {word}
            case ast.alias(name=word):
                words = {word.rpartition(".")[2]}
            case ast.keyword(arg=str(word)):
                words = {word}
            case _:
                continue
        yield from ((word, node.lineno) for word in words & OF_LABELS)


def test_what_depends_on_labels_is_seen() -> None:
    for line in (
        "logits.softmax(dim=1)",
        "torch.argmax(scores, 1)",
        "from torch.nn.functional import cross_entropy",
        "from torch.nn import CrossEntropyLoss as Loss",
        "getattr(torch, 'log_softmax')(logits)",
        "fit(rows, 'softmax')",
        "def f(softmax): ...",
        "Interface(softmax=True)",
    ):
        assert list(words_of_labels(ast.parse(line))), line
    assert not list(words_of_labels(ast.parse('"""The softmax of logits."""\noption = "--with-softmax"')))


def test_only_targets_says_what_follows_from_a_label() -> None:
    found = {
        (name, word): f"{name}:{line} {word}"
        for name, tree in modules().items()
        for word, line in words_of_labels(tree)
        if not name.startswith("finetune.targets.")
    }
    assert not [place for key, place in found.items() if key not in NOT_OF_LABELS]
    assert set(NOT_OF_LABELS) <= set(found), "these exceptions are not needed any more"


# --- the files -----------------------------------------------------------------------------------


def test_git_keeps_every_source_file() -> None:
    """``runs/`` in .gitignore, without a leading slash, would leave out ``finetune/runs``."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    command = [
        "git",
        "ls-files",
        "--others",
        "--ignored",
        "--exclude-standard",
        "--",
        *PACKAGES,
        "recipes",
        "tests",
        "docs",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    ignored = [
        name
        for name in result.stdout.splitlines()
        if name.endswith((".py", ".yaml", ".csv", ".md", ".typed"))
    ]
    assert ignored == []


MOST_FILES, MOST_LINES = 25, 400


def test_folders_and_files_stay_small() -> None:
    """A room that does not fit on a page, or a file that nobody reads whole, is two."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    crowded = {path.parent for path in files if len(list(path.parent.glob("*.py"))) > MOST_FILES}
    assert crowded == set()
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > MOST_LINES} == {}
