"""A server for tests of kills: the real one, with a short lease and jobs that count to thirty.

python -m tests.service.chaos_server STORE DATABASE PORT
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from finetune.launch.supervisor import own_command
from finetune.service import server
from finetune.service.settings import Limits, ServiceSettings
from finetune.service.store import jobs
from finetune.service.store.folder import JobFolder
from finetune.service.store.jobs import Job
from finetune.service.work import dispatcher
from finetune.service.work.executor import LocalExecution, LocalExecutor

COUNT = """
mkdir -p $OUT
trap 'exit 75' TERM
n=$(cat $OUT/count 2>/dev/null || echo 0)
while [ $n -lt 30 ]; do
  n=$((n + 1)); echo $n > $OUT/.part; mv $OUT/.part $OUT/count; sleep 0.1
done
mkdir -p $OUT/model
seq 1 $((n * SEED)) > $OUT/.part; mv $OUT/.part $OUT/model/model.safetensors
printf '{"state": "done", "message": "finished", "exit_code": 0}' > $OUT/.part
mv $OUT/.part $OUT/outcome.json
"""
"""A job that goes on from its checkpoint; its result depends on its seed alone."""


class Counting(LocalExecutor):
    """Starts the counting script where the real one starts ``finetune run``, by the same first program."""

    def start(self, job: Job, folder: JobFolder) -> LocalExecution:
        folder.path.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OUT": str(folder.run.path), "SEED": str(job.recipe["seed"])}
        code = f"""
import os, signal
from finetune.system.signals import end_with_parent
end_with_parent({os.getpid()}, signal.SIGTERM)
os.execv("/bin/sh", ["sh", "-c", {COUNT!r}])
"""
        with folder.log(job.attempt).open("ab") as log:
            process = subprocess.Popen(
                [own_command()[0], "-c", code],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return LocalExecution(process, None)


def main() -> None:
    """Serve until a signal, or a kill."""
    store, database, port = sys.argv[1:]
    jobs.LEASE = dispatcher.LEASE = 2.0
    dispatcher.WAITS = (0.05,) * 1000  # a killed job is tried again for as long as the test kills
    server.LocalExecutor = Counting  # type: ignore[misc]
    limits = Limits(requests_per_minute=1_000_000)
    server.serve(ServiceSettings(Path(store), database, port=int(port), slots=3, limits=limits), print)


if __name__ == "__main__":
    main()
