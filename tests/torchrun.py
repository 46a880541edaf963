"""Several processes by torchrun, which end in time or with a test that fails."""

import os
import subprocess
import sys


def torchrun(*command, processes=2, options=("--standalone",), timeout=400, **environment):
    """Exit code, output and errors of a torchrun. TimeoutExpired where it does not end; nothing of it is left then."""
    words = [sys.executable, "-m", "torch.distributed.run", *options, "--nproc-per-node", processes, *command]
    process = subprocess.Popen(
        list(map(str, words)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            process.terminate()  # upon which torchrun ends its workers, if need be after half a minute
            process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
