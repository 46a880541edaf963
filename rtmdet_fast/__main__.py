"""`python -m rtmdet_fast` is `rtmdet-fast`."""

import sys

from rtmdet_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
