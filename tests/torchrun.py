"""Several processes by torchrun, which end in time or with a test that fails."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

TRAIN = ("-m", "rtmdet_fast", "train")


@contextmanager
def started(*command, processes=2, options=("--standalone",), **environment):
    """A running torchrun with its workers, all of which are gone afterwards."""
    words = [sys.executable, "-m", "torch.distributed.run", *options, "--nproc-per-node", processes, *command]
    process = subprocess.Popen(
        list(map(str, words)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its workers, which have sessions of their own
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()


def torchrun(*command, timeout=300, **options):
    """Exit code, output and errors of a torchrun, and the seconds that it took. An error where it does not end."""
    begun = time.monotonic()
    with started(*command, **options) as process:
        out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err), time.monotonic() - begun
