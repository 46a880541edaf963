"""`python -m rtmdet_fast.cli`, as torchrun is told to start it, is `rtmdet-fast`."""

import sys

from rtmdet_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
