"""`python -m rtmdet_fast` is `rtmdet-fast`."""

import sys

from rtmdet_fast.cli import main
from rtmdet_fast.cli.processes import leave_the_others

if __name__ == "__main__":
    code = main()
    leave_the_others(code)
    sys.exit(code)
