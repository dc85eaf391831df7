"""Read logged metrics back: with TensorBoard's and MLflow's own readers, and from wandb's records."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Series = dict[str, dict[int, list[float]]]
"""Values by metric and step; a step that was logged twice has two."""

BLOCK, HEADER = 32768, 7


def read_tensorboard(folder: Path) -> tuple[Series, dict[str, str]]:
    """Return all scalars and all texts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    series: Series = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            series.setdefault(name, {}).setdefault(event.step, []).append(event.value)
    texts = {
        name: events.Tensors(name)[-1].tensor_proto.string_val[0].decode()
        for name in events.Tags()["tensors"]
    }
    return series, texts


def read_mlflow(uri: str) -> tuple[Series, Any]:
    """Return all metrics of the only run, and the run."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    series: Series = {}
    for name in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, name):
            series.setdefault(name, {}).setdefault(metric.step, []).append(metric.value)
    return series, run


def _chunks(path: Path) -> Iterator[bytes]:
    """Yield the payloads of a file in LevelDB's log format, which follow a header of 7 bytes."""
    content, position, whole = path.read_bytes(), HEADER, b""
    while position < len(content):
        if BLOCK - position % BLOCK < HEADER:
            position += BLOCK - position % BLOCK
        _, size, kind = struct.unpack("<IHB", content[position : position + HEADER])
        whole += content[position + HEADER : position + HEADER + size]
        position += HEADER + size
        if kind in (1, 4):  # a full record, or the last chunk of one
            yield whole
            whole = b""


def read_wandb(folder: Path) -> tuple[Series, list[Any], dict[str, Any], str]:
    """Return the series, the run of each attempt, the summary, and all records as text."""
    from wandb.proto import wandb_internal_pb2

    series: Series = {}
    runs, summary, text = [], {}, ""
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for chunk in _chunks(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(chunk)
            text += str(record)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                runs.append(record.run)
            elif kind == "summary":
                summary |= {_key(item): json.loads(item.value_json) for item in record.summary.update}
            elif kind == "history":
                for item in record.history.item:
                    if not _key(item).startswith("_"):
                        steps = series.setdefault(_key(item), {})
                        steps.setdefault(record.history.step.num, []).append(json.loads(item.value_json))
    return series, runs, summary, text


def _key(item: Any) -> str:
    return str(item.key or ".".join(item.nested_key))
