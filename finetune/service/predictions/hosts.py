"""The processes of the models that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from threading import Lock

from finetune.service.predictions.serving import Answer, HostClosedError, ModelHost, Picture
from finetune.service.store.folder import StoreFolder
from finetune.service.store.models import ModelStore, ModelVersion


class ModelHosts:
    """The processes of the models that were asked for, one for the latest version of each.

    Args:
        models: the models.
        folder: files of the store.
    """

    def __init__(self, models: ModelStore, folder: StoreFolder) -> None:
        self._models, self._folder = models, folder
        self._hosts: dict[str, tuple[ModelVersion, ModelHost]] = {}
        self._starting: dict[str, Lock] = {}
        self._lock = Lock()

    def find(self, name: str) -> tuple[ModelVersion, ModelHost]:
        """Return the version of a model that answers, and its host; the first request starts its process.

        Raises:
            UnknownError: there is no such model.
            EnvironmentFaultError: it cannot be loaded.
        """
        wanted = self._models.get(name)
        with self._lock:
            if (found := self._hosts.get(name)) is not None and found[0].version >= wanted.version:
                return found
            starting = self._starting.setdefault(name, Lock())
        with starting:  # requests of other models do not wait for this one
            with self._lock:
                found = self._hosts.get(name)
            if found is None or found[0].version < wanted.version:
                folder = self._folder.model(name, wanted.version)
                host = ModelHost(folder, self._folder.model_log(name))
                with self._lock:
                    self._hosts[name] = (wanted, host)
                if found is not None:
                    found[1].close()  # after it has answered what it was asked before
                return wanted, host
            return found

    def submit(
        self, name: str, pictures: Sequence[Picture]
    ) -> tuple[ModelVersion, ModelHost, Sequence[Future[Answer]]]:
        """Queue images at the model's host; return the version that answers, its host, and the answers.

        Raises:
            UnknownError: there is no such model.
            EnvironmentFaultError: it cannot be loaded.
        """
        while True:
            version, host = self.find(name)
            with suppress(HostClosedError):  # a newer version took over in between
                return version, host, host.submit(pictures)

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            hosts, self._hosts = [*self._hosts.values()], {}
        for _, host in hosts:
            host.close()
