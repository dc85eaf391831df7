"""What processes say to each other, with real processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from finetune.errors import DataError, ExitCode, FinetuneError, LostProcessError, UsageError
from finetune.system.distributed import SINGLE_PROCESS, Distributed
from finetune.system.rank import find_rank
from tests.processes import together
from tests.sweeps import slow_except


def test_the_main_process_decides_for_all() -> None:
    assert (
        together(lambda distributed: distributed.share(lambda: f"said by {distributed.rank}"), 3)
        == ["said by 0"] * 3
    )


def test_what_cannot_be_made_cannot_be_made_anywhere() -> None:
    def work(distributed: Distributed) -> str:
        def make() -> None:
            raise DataError("--data x", "it is not there", "Name another.")

        with pytest.raises(DataError, match="it is not there"):
            distributed.share(make)
        return distributed.share(lambda: "and they go on")

    assert together(work) == ["and they go on"] * 2


def test_each_makes_its_own_after_the_main_one() -> None:
    def work(distributed: Distributed) -> int:
        return distributed.first(lambda: distributed.rank)

    assert together(work) == [0, 1]


def test_sums_and_values_of_all() -> None:
    def work(distributed: Distributed) -> tuple[list[float], bool, bool, list[int]]:
        sums = distributed.sum(distributed.rank, 0.1)
        return (
            sums,
            distributed.any(distributed.rank == 1),
            distributed.any(False),
            distributed.collect(10 * distributed.rank),
        )

    assert together(work, 3) == [([3.0, pytest.approx(0.3)], True, False, [0, 10, 20])] * 3


@pytest.mark.sample(2)
@pytest.mark.parametrize("number", [0, 1, 2, 3, 7])
def test_items_come_in_order(number: int) -> None:
    def work(distributed: Distributed) -> list[int]:
        return list(distributed.merge(iter(range(distributed.rank, number, distributed.size))))

    assert together(work, 3) == [list(range(number)), [], []]


def test_an_error_of_one_ends_the_whole_after_the_others_have_come_to_their_end() -> None:
    def items(distributed: Distributed) -> Iterator[int]:
        yield distributed.rank
        if distributed.rank == 1:
            raise DataError("an image", "it is gone", "Bring it back.")
        yield distributed.rank

    def work(distributed: Distributed) -> tuple[list[int], str, str]:
        got: list[int] = []
        said = ""
        try:
            got.extend(distributed.merge(items(distributed)))
        except DataError as error:
            said = error.found
        return got, said, distributed.share(lambda: "next")

    main, *others = together(work, 3)
    assert main == ([0, 1, 2, 0], "it is gone", "next")
    assert others == [([], "", "next")] * 2


def test_whoever_stops_listening_does_not_leave_the_others_waiting() -> None:
    def work(distributed: Distributed) -> str:
        for item in distributed.merge(iter(range(distributed.rank, 9, distributed.size))):
            if item == 3:
                break
        return distributed.share(lambda: "next")

    assert together(work) == ["next"] * 2


def test_whoever_stops_listening_stops_the_others() -> None:
    made = 0

    def items(distributed: Distributed) -> Iterator[int]:
        nonlocal made
        for number in range(distributed.rank, 10_000, distributed.size):
            made += 1
            yield number

    def work(distributed: Distributed) -> int:
        for item in distributed.merge(items(distributed)):
            if item == 3:
                break
        return made

    assert max(together(work)) < 5_000


def test_a_failure_reaches_the_others_in_its_own_words() -> None:
    def work(distributed: Distributed) -> tuple[str, int] | None:
        if distributed.rank == 1:
            error = DataError("--data x", "it is not there", "Name another.")
            distributed.publish(error)
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            distributed.sum(1.0)
        except FinetuneError as error:
            return error.message, int(error.exit_code)
        return None

    said, nothing = together(work)
    assert (said, nothing) == (("process 1, --data x: it is not there", ExitCode.DATA), None)


def test_a_loss_keeps_being_one() -> None:
    def work(distributed: Distributed) -> FinetuneError | None:
        if distributed.rank == 1:
            distributed.publish(LostProcessError("training, step 7", "memory ran out", "Start it again."))
            return None
        return distributed.find_failure("gone")

    error, _ = together(work)
    assert isinstance(error, LostProcessError)
    assert error.message == "process 1, training, step 7: memory ran out"


@pytest.mark.slow
@pytest.mark.parametrize("killed", slow_except([1], [0, 1]))
def test_a_process_that_is_killed_is_missed(killed: int) -> None:
    def work(distributed: Distributed) -> str | None:
        if distributed.rank == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            distributed.collect(0)
        except LostProcessError as error:
            return error.found
        return None

    others = together(work)
    assert others[killed] is None
    assert "has ended or does not answer" in others[1 - killed]


@pytest.mark.slow
def test_waiting_outlasts_the_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.processes.TIMEOUT", 1.0)

    def work(distributed: Distributed) -> str:
        if distributed.rank == 1:
            time.sleep(3)
        distributed.wait()
        return distributed.share(lambda: time.sleep(3) or "patience")

    assert together(work) == ["patience"] * 2


def test_processes_of_one_machine_are_a_world_of_their_own() -> None:
    def work(distributed: Distributed) -> tuple[int, int]:
        return distributed.machine.rank, distributed.machine.size

    assert together(work) == [(0, 2), (1, 2)]


def test_machines_are_told_apart_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def name() -> str:
        return f"machine-{int(os.environ['RANK']) // 2}"

    monkeypatch.setattr("finetune.system.join.socket.gethostname", name)

    def work(distributed: Distributed) -> tuple[int, int, str, list[int]]:
        here = distributed.machine
        return (
            here.rank,
            here.size,
            here.share(lambda: f"from {distributed.rank}"),
            here.collect(distributed.rank),
        )

    def work_and_wait(distributed: Distributed) -> tuple[int, int, str, list[int]]:
        result = work(distributed)
        distributed.collect(0)  # the machines find each other by process 0: it must not leave before
        return result

    assert together(work_and_wait, 4) == [
        (0, 2, "from 0", [0, 1]),
        (1, 2, "from 0", [0, 1]),
        (0, 2, "from 2", [2, 3]),
        (1, 2, "from 2", [2, 3]),
    ]


def test_one_process_needs_nobody() -> None:
    assert SINGLE_PROCESS.share(lambda: 1) == 1
    assert SINGLE_PROCESS.sum(1, 2) == [1, 2]
    assert list(SINGLE_PROCESS.merge(iter("ab"))) == ["a", "b"]
    assert SINGLE_PROCESS.is_main and SINGLE_PROCESS.machine is SINGLE_PROCESS


# --- what launchers say --------------------------------------------------------------------------


def say(monkeypatch: pytest.MonkeyPatch, **words: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in words.items():
        monkeypatch.setenv(name, value)


def test_no_launcher_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, WORLD_SIZE="4")
    assert find_rank() is None


def test_the_words_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    say(
        monkeypatch,
        RANK="5",
        WORLD_SIZE="8",
        LOCAL_RANK="1",
        LOCAL_WORLD_SIZE="4",
        MASTER_ADDR="a",
        MASTER_PORT="1",
    )
    place = find_rank()
    assert place is not None
    assert (place.rank, place.size, place.local_rank, place.local_size) == (5, 8, 1, 4)


@pytest.mark.parametrize(
    "words",
    [
        {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"RANK": "zero", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
        {"RANK": "-1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
    ],
)
def test_a_launcher_that_contradicts_itself_is_refused(
    monkeypatch: pytest.MonkeyPatch, words: dict[str, str]
) -> None:
    say(monkeypatch, **words)
    with pytest.raises(UsageError):
        find_rank()
