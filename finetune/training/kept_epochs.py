"""The weights after some epochs of a training, which ``finetune explain evolution`` compares.

A file holds the tensors that training changes, of the network that is evaluated (the moving average, if there
is one); frozen ones are those of the result. The weights of a new head are as they are during training: for
standardised features (:mod:`finetune.training.standardize`).
"""

from __future__ import annotations

import safetensors.torch

from finetune.recipe import TrainingSettings
from finetune.runs.claim import create_folder
from finetune.runs.files import write_bytes
from finetune.runs.folder import RunFolder
from finetune.system.distributed import Distributed
from finetune.training.state import Progress, State


def keep_epoch(
    folder: RunFolder, settings: TrainingSettings, progress: Progress, state: State, distributed: Distributed
) -> None:
    """Write the weights after the current epoch if the recipe asks for them, on rank 0.

    An epoch that is trained again, after a rollback or an interruption, replaces its file.

    Raises:
        DiskError: they cannot be written.
    """
    number = progress.epoch + 1
    if number not in settings.keep_epochs or not distributed.is_main:
        return
    create_folder(folder.epochs)
    tensors = {name.removeprefix("model."): tensor for name, tensor in state.take_eval_weights().items()}
    write_bytes(folder.epoch(number), safetensors.torch.save(tensors))
