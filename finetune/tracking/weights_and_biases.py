"""Weights & Biases: files in the run folder, which ``wandb sync`` uploads, or online with WANDB_MODE=online.

Everything that the client collects by itself is switched off: standard output, machine, Git, source code,
packages, error reports. The "stop" button of its web page has no effect on the run.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping

os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read while it is imported

import wandb

from finetune.tracking.tracker import EPOCH_METRICS, PROJECT, End, TrackedRun

PATIENCE = 30.0
"""Seconds that a server has to answer before the run continues without it."""


class WeightsAndBiases:
    """Logs scalars by epoch, the recipe as configuration, and the final metrics as summary."""

    def __init__(self, run_info: TrackedRun, run_id: str) -> None:
        run_info.home.mkdir(exist_ok=True)  # or it would write to the system's temporary folder
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run_info.name),
            id=run_id or secrets.token_hex(4),
            resume="allow",
            dir=os.environ.get("WANDB_DIR", str(run_info.home)),
            config=dict(run_info.settings) | {"run_folder": run_info.folder},
            settings=_settings(),
        )

    @property
    def run_id(self) -> str:
        """The id that Weights & Biases gives to the run."""
        return str(self._run.id)

    def log_epoch(self, row: Mapping[str, float]) -> None:
        """Log one row of the history; it is written at once, and not with the next one."""
        values = {name: row[name] for name in EPOCH_METRICS}
        self._run.log(values, step=int(row["epoch"]), commit=True)

    def log_final(self, metrics: Mapping[str, float], epoch: int) -> None:
        """Put the final metrics into the summary, under ``final/``."""
        del epoch
        self._run.summary.update({f"final/{name}": value for name, value in metrics.items()})

    def close(self, end: End) -> None:
        """Upload what is left, if there is a server, and end the run there."""
        self._run.finish(exit_code=0 if end == "done" else 1)


def _settings() -> wandb.Settings:
    return wandb.Settings(
        mode=os.environ.get("WANDB_MODE", "offline"),
        symlink=False,
        reinit="create_new",  # another run of this process is another run
        allow_val_change=True,  # a run that is made longer
        console="off",
        silent=True,
        host="localhost",
        disable_git=True,
        disable_code=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        stop_fn=lambda: None,
        login_timeout=PATIENCE,
        init_timeout=PATIENCE,
        finish_timeout=PATIENCE,
        finish_timeout_raises=True,
    )
