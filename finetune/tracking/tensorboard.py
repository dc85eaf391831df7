"""TensorBoard: event files in the run folder (``tensorboard --logdir runs``).

Records are written synchronously. TensorBoard's usual writers use a thread, which reports a full disk one
call later and with a traceback, and they import TensorFlow if it is installed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from finetune.tracking.tracker import EPOCH_METRICS, End, TrackedRun


class TensorBoard:
    """Writes scalars by epoch, and the recipe as text. A later attempt adds a file to the same folder."""

    run_id = ""

    def __init__(self, run_info: TrackedRun, run_id: str) -> None:
        del run_id  # TensorBoard identifies a run by its folder
        folder = run_info.home / "tensorboard"
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 1000}.{os.getpid()}"  # readers sort by name
        self._file = (folder / name).open("xb")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        for tag, text in (("recipe", run_info.recipe), ("folder", run_info.folder)):
            block = "".join(f"    {line}\n" for line in text.splitlines())  # a code block of Markdown
            self._write(summary=text_pb(tag, block))

    def log_epoch(self, row: Mapping[str, float]) -> None:
        """Write one row of the history."""
        self._scalars({name: row[name] for name in EPOCH_METRICS}, int(row["epoch"]))

    def log_final(self, metrics: Mapping[str, float], epoch: int) -> None:
        """Write the final metrics under ``final/``."""
        self._scalars({f"final/{name}": value for name, value in metrics.items()}, epoch)

    def close(self, end: End) -> None:
        """Close the file; TensorBoard does not record how a run ended."""
        del end
        self._file.close()

    def _scalars(self, metrics: Mapping[str, float], step: int) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(step=step, summary=Summary(value=values))

    def _write(self, **content: Any) -> None:
        """Write one event to the disk."""
        self._records.write(Event(wall_time=time.time(), **content).SerializeToString())
        self._file.flush()
