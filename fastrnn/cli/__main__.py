"""`python -m fastrnn.cli` is the command `fastrnn`."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
