"""Runs a script under the stand-in for `mmcv._ext`: python -m rtmdet_fast.compat.mmcv_ext SCRIPT [ARGUMENT ...]."""

import sys
from pathlib import Path

if __name__ == "__main__":
    del sys.argv[0]
    if not sys.argv:
        sys.exit("usage: python -m rtmdet_fast.compat.mmcv_ext SCRIPT [ARGUMENT ...]")
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    # In this namespace: what the script defines is looked for in the main module.
    exec(compile(Path(sys.argv[0]).read_bytes(), sys.argv[0], "exec"))
