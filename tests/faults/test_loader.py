"""Decoding processes that die, fail, or have no room to hand over their batches: same bits, or a reason."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from finetune.data import loader as loader_module
from finetune.data import transforms as transforms_module
from finetune.data.dataset import Dataset, Sample
from finetune.data.discover import discover
from finetune.data.loader import Batch, ImageLoader, Placement
from finetune.data.split import SplitConfig
from finetune.data.transforms import build_train_transform
from finetune.data.workers import start_worker
from finetune.errors import EnvironmentFaultError, ExitCode
from finetune.runs.claim import locked
from pretrained.preprocessing import Preprocessing
from tests.conftest import Cli
from tests.data.test_loader import assert_same

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quick_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch waits five seconds for a batch or an end before it looks for dead processes; here less."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.3)


@pytest.fixture
def photos(image_folder: Path) -> Dataset:
    return discover(image_folder, SplitConfig(0.2, 0))


@dataclass(frozen=True)
class FaultyDataset(Dataset):
    """A data set where the way to some images breaks the process, as often as each has tokens."""

    at: tuple[str, ...] = ()
    tokens: Path = Path()
    fault: Callable[[], None] = lambda: None
    home: int = 0

    def file(self, sample: Sample) -> Path:
        if sample.path in self.at and os.getpid() != self.home and self._take_token(sample):
            self.fault()
        return super().file(sample)

    def _take_token(self, sample: Sample) -> bool:
        token = next(self.tokens.glob(f"{self.at.index(sample.path)}-*"), None)
        if token is not None:
            token.unlink()
        return token is not None


def die_of(number: signal.Signals, after: float = 0.0) -> Callable[[], None]:
    def die() -> None:
        time.sleep(after)
        os.kill(os.getpid(), number)

    return die


def fail_with(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise type(error)(*error.args)

    return fail


Build = Callable[..., ImageLoader]


@pytest.fixture
def build(photos: Dataset, tmp_path: Path) -> Iterator[Build]:
    """Loaders of 36 images in 8 batches; ``said`` is told what the user is."""
    loaders = []

    def build_one(
        fault: Callable[[], None] = lambda: None,
        times: int = 0,
        at: tuple[int, ...] = (17,),
        workers: int = 2,
        said: list[str] | None = None,
    ) -> ImageLoader:
        tokens = tmp_path / "tokens"
        tokens.mkdir(exist_ok=True)
        for position, number in product(range(len(at)), range(times)):
            (tokens / f"{position}-{number}").touch()
        samples = photos.of("train")
        facts = {"at": tuple(samples[index].path for index in at), "fault": fault, "home": os.getpid()}
        loader = ImageLoader(
            FaultyDataset(photos.root, photos.classes, photos.samples, tokens=tokens, **facts),  # type: ignore[arg-type]
            samples,
            build_train_transform(Preprocessing(img_size=16), "medium"),
            batch_size=5,
            placement=Placement(torch.device("cpu"), channels_last=False),
            workers=workers,
            seed=0,
            shuffle=True,
            warn=(said if said is not None else []).append,
        )
        loaders.append(loader)
        return loader

    yield build_one
    for loader in loaders:
        loader.close()


@pytest.fixture
def undisturbed(build: Build) -> list[Batch]:
    return list(build(workers=0).batches(epoch=1))


# --- processes that die --------------------------------------------------------------------------


@pytest.mark.sample(1)
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_process_that_dies_in_an_epoch_leaves_no_trace(
    build: Build, undisturbed: list[Batch], number: signal.Signals, times: int
) -> None:
    said: list[str] = []
    loader = build(die_of(number), times, said=said)
    assert_same(list(loader.batches(epoch=1)), undisturbed)
    assert len(said) == times
    assert all("a decoding process ended" in line and "replaced" in line for line in said)


@pytest.mark.slow
def test_deaths_with_batches_between_them_do_not_add_up(build: Build, undisturbed: list[Batch]) -> None:
    said: list[str] = []
    first = tuple(batch[0] for batch in build().plan(1))
    loader = build(die_of(signal.SIGKILL, after=0.2), 1, at=first[1:7], workers=1, said=said)
    assert_same(list(loader.batches(epoch=1)), undisturbed)
    assert len(said) == 6


@pytest.mark.slow
def test_deaths_for_ever_are_the_fault_of_the_machine(build: Build) -> None:
    said: list[str] = []
    first = build().plan(1)[0][0]
    with pytest.raises(EnvironmentFaultError, match="decoding with 2 processes: ") as fault:
        list(build(die_of(signal.SIGKILL), 99, at=(first,), said=said).batches(epoch=1))
    assert fault.value.exit_code == ExitCode.ENVIRONMENT == 78
    assert "--workers" in fault.value.fix
    assert len(said) == 3


def test_a_process_that_dies_between_two_epochs_leaves_no_trace(
    build: Build, undisturbed: list[Batch]
) -> None:
    loader = build()
    list(loader.batches(epoch=0))
    victim = multiprocessing.active_children()[0]
    os.kill(int(victim.pid or 0), signal.SIGKILL)
    victim.join()
    assert_same(list(loader.batches(epoch=1)), undisturbed)


def test_a_socket_that_a_dead_process_left_counts_as_its_death(
    build: Build, undisturbed: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end may be seen first where the memory of its last batch is fetched from it."""
    get = _MultiProcessingDataLoaderIter._try_get_data
    faults: list[Exception] = [ConnectionRefusedError(111, "x"), EOFError(), FileNotFoundError(2, "x")]

    def refuse(self: Any, *words: Any) -> Any:
        if faults and self._rcvd_idx > 0:
            raise faults.pop()
        return get(self, *words)

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_try_get_data", refuse)
    assert_same(list(build().batches(epoch=1)), undisturbed)
    assert not faults


def kill_a_child_and_work() -> None:
    os.kill(int(multiprocessing.active_children()[0].pid or 0), signal.SIGKILL)
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        torch.ones(50).sum()


@pytest.fixture
def fresh_handler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch sets its handler once a process; here it may do so again."""
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)


def test_the_handler_of_torch_would_raise_in_the_middle_of_a_step(
    fresh_handler: None, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why the loader takes that handler away: without this test nobody would know that it must."""
    monkeypatch.setattr(loader_module, "start_pass", iter)
    batches = build(times=0).batches()
    next(batches)
    with pytest.raises(RuntimeError, match="killed by signal"):
        kill_a_child_and_work()


def test_a_death_never_surfaces_in_the_middle_of_a_step(
    fresh_handler: None, build: Build, undisturbed: list[Batch]
) -> None:
    before = signal.getsignal(signal.SIGCHLD)
    batches = build().batches(epoch=1)
    seen = [next(batches)]
    kill_a_child_and_work()
    assert_same(seen + list(batches), undisturbed)
    assert signal.getsignal(signal.SIGCHLD) is before


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ZeroDivisionError("x"), OSError(5, "I/O")])
def test_an_error_of_the_work_is_no_death(build: Build, error: Exception) -> None:
    said: list[str] = []
    with pytest.raises(type(error), match="in fail"):  # the traceback of the process
        list(build(fail_with(error), 99, said=said).batches())
    assert said == []


# --- no room to hand batches over ----------------------------------------------------------------


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("words", "found", "remedy"),
    [
        (
            "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)",
            "No space left on device",
            "--shm-size",
        ),
        ("Too many open files. Communication is no longer possible.", "Too many open files", "ulimit -n"),
        ("received 0 items of ancdata", "Too many open files", "--ulimit nofile"),
    ],
)
def test_where_batches_cannot_be_handed_over_this_process_decodes(
    build: Build, undisturbed: list[Batch], words: str, found: str, remedy: str
) -> None:
    said: list[str] = []
    loader = build(fail_with(RuntimeError(words)), 99, said=said)
    assert_same(list(loader.batches(epoch=1)), undisturbed)
    assert_same(list(loader.batches(epoch=1)), undisturbed)
    (line,) = said
    assert "the training process decodes from here on" in line and f"({found})" in line and remedy in line


@pytest.mark.parametrize(
    "ends", [OSError(24, "Too many open files"), RuntimeError("received 0 items of ancdata")]
)
def test_open_files_that_run_out_in_the_pinning_thread_are_no_dead_process(
    build: Build,
    undisturbed: list[Batch],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ends: Exception,
) -> None:
    """As on a GPU, where a thread of torch's receives the batches; it ends with a traceback on stderr."""

    def _pin_memory_loop(*_: object) -> None:
        raise ends

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.utils.data._utils.pin_memory, "_pin_memory_loop", _pin_memory_loop)
    said: list[str] = []
    loader = build(said=said)
    loader._loader.pin_memory = True
    assert_same(list(loader.batches(epoch=1)), undisturbed)
    (line,) = said
    assert "(Too many open files)" in line and "ulimit -n" in line
    assert "Traceback" not in capsys.readouterr().err


def test_the_limit_of_open_files_is_raised(build: Build) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        list(build().batches())
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (
            65_536 if hard == -1 else min(hard, 65_536),
            hard,
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_where_no_process_can_be_started_this_one_decodes(
    build: Build, undisturbed: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    said: list[str] = []
    monkeypatch.setattr(os, "fork", refuse)
    assert_same(list(build(said=said).batches(epoch=1)), undisturbed)
    assert "Resource temporarily unavailable" in said[0]


# --- no process is left behind -------------------------------------------------------------------

HOLD = """
import multiprocessing, sys, time
from pathlib import Path
import torch
from finetune.data.discover import discover
from finetune.data.split import SplitConfig
from finetune.data.loader import ImageLoader, Placement
from finetune.data.transforms import build_eval_transform
from finetune.runs.claim import locked
from pretrained.preprocessing import Preprocessing

dataset = discover(Path(sys.argv[1]), SplitConfig(0.2, 0))
place = Placement(torch.device("cpu"), False)
view = build_eval_transform(Preprocessing(img_size=16))
loader = ImageLoader(
    dataset, dataset.of("train"), view, batch_size=4, placement=place, workers=2, seed=0, shuffle=True,
    persistent=True,
)
with locked(Path(sys.argv[2])):
    next(loader.batches())
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(60)
"""


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends them")
def test_no_decoding_process_outlives_a_killed_trainer_nor_keeps_its_lock(
    image_folder: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", HOLD, str(image_folder), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        workers = [int(word) for word in process.stdout.readline().split()]
        assert len(workers) == 2 and all(map(is_running, workers))
        process.kill()
    began = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - began < 1
    while any(map(is_running, workers)):
        assert time.monotonic() - began < 1
        time.sleep(0.01)


def test_a_process_whose_parent_is_gone_already_ends_at_once(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        start_worker(os.getpid(), 0)  # nobody is one's own parent
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_children_are_forked_whatever_the_default_of_python(build: Build) -> None:
    """Another parent than this process would end them at once."""
    loader: DataLoader[Any] = build()._loader
    assert loader.multiprocessing_context is not None
    assert loader.multiprocessing_context.get_start_method() == "fork"


# --- whole runs ----------------------------------------------------------------------------------


def words_of(tiny: Path, data: Path, output: Path) -> list[object]:
    settings = ("--epochs", 2, "--batch-size", 8, "--workers", 1, "-s", "full", "--set", "cache=off")
    return ["run", "-b", tiny, "-d", data, "-o", output, *settings]


def assert_same_result(one: Path, two: Path) -> None:
    for name in ("model/model.safetensors", "predictions.csv"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.mark.slow
def test_a_run_whose_decoding_process_is_killed_ends_in_the_same_bits(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli(*words_of(tiny, image_folder, tmp_path / "whole")).exit_code == 0
    decode, home, token = transforms_module.decode_image, os.getpid(), tmp_path / "token"
    token.touch()

    def die_once(path: Path, *settings: Any) -> Any:
        if os.getpid() != home and path.name == "007.jpg" and token.exists():
            token.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(path, *settings)

    monkeypatch.setattr(transforms_module, "decode_image", die_once)
    result = cli(*words_of(tiny, image_folder, tmp_path / "killed"))
    assert result.exit_code == 0, result.output
    assert result.stderr.count("warning: a decoding process ended") == 1
    assert_same_result(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unforeseen_error_leaves_its_traceback_in_the_log(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def a_bug_of_ours(*arguments: object) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(transforms_module, "decode_image", a_bug_of_ours)
    result = cli(*words_of(tiny, image_folder, tmp_path / "run"), "--workers", workers)
    assert result.exit_code == ExitCode.INTERNAL == 70
    assert "RuntimeError: no such thing" in result.stderr
    assert "Traceback" not in result.stderr
    log = (tmp_path / "run" / "run.log").read_text()
    assert "Traceback" in log and "in a_bug_of_ours" in log


def can_mount() -> bool:
    command = ["sh", "-c", "unshare -m mount -t tmpfs tmpfs /dev/shm"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="mounts are not for this user")
def test_a_run_with_a_tiny_dev_shm_goes_on_by_decoding_itself(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    """The queue of a decoding process would swallow this error, and the run would wait for ever."""
    assert cli(*words_of(tiny, image_folder, tmp_path / "whole")).exit_code == 0
    script = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    words = [sys.executable, "-m", "finetune", *map(str, words_of(tiny, image_folder, tmp_path / "small"))]
    command = ["unshare", "-m", "sh", "-c", script, "sh", *words]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("the training process decodes from here on") == 1
    before, words, _ = result.stderr.partition("warning: /dev/shm has 0 MB free")
    assert words and "--shm-size=1g" in result.stderr, "said before anything has failed"
    assert "epoch" not in before
    assert_same_result(tmp_path / "whole", tmp_path / "small")
