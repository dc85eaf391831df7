"""The application: every route, below one layer that checks who asks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from finetune import __version__
from finetune.service.access import Access
from finetune.service.context import Context
from finetune.service.predictions.hosts import ModelHosts
from finetune.service.problems import add_handlers
from finetune.service.routes import datasets as data
from finetune.service.routes import health, inference, jobs, page
from finetune.service.routes import models as predictions
from finetune.service.settings import ServiceSettings
from finetune.service.store.datasets import DatasetStore
from finetune.service.store.folder import StoreFolder
from finetune.service.store.jobs import JobStore, UnknownError
from finetune.service.store.models import ModelStore
from finetune.service.store.tables import open_store
from finetune.service.store.uploads import Uploads
from finetune.service.submission import Submission
from finetune.service.work.dispatcher import Dispatcher
from finetune.service.work.executor import Executor


def create_app(settings: ServiceSettings, executor: Executor, say: Callable[[str], None]) -> FastAPI:
    """Return the application of a server.

    Args:
        settings: what the server is started with.
        executor: where jobs run.
        say: shows one line to whoever started the server.

    Raises:
        EnvironmentFaultError: the database is not reached.
        DiskError: the store cannot be written.
    """
    engine = open_store(settings.database or str(settings.store))
    folder, store = StoreFolder(settings.store), JobStore(engine)
    datasets = DatasetStore(engine, folder, store)
    models = ModelStore(engine, folder, store)
    hosts = ModelHosts(models, folder)
    uploads = Uploads(folder.uploads, settings.limits.upload_bytes)
    submission = Submission(settings.data_roots, datasets.find, lambda job: _find_model(folder, store, job))
    dispatcher = Dispatcher(store, folder, executor, say)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        uploads.remove_old()
        dispatcher.start()
        yield
        hosts.close()
        dispatcher.stop()
        engine.dispose()

    app = FastAPI(title="finetune", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.context = Context(settings, folder, store, datasets, uploads, models, hosts, submission)
    app.state.dispatcher = dispatcher
    app.add_middleware(Access, settings=settings)
    add_handlers(app)
    for part in (jobs, data, predictions, inference, health, page):
        app.include_router(part.router)
    return app


def _find_model(folder: StoreFolder, store: JobStore, job: str) -> Path:
    store.get(job)
    model = folder.job(job).run.model
    if not model.is_dir():
        raise UnknownError(f"job {job[:64]}", "it has no finished model", "Wait until it has succeeded.")
    return model
