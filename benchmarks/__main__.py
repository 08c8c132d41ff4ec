"""`python -m benchmarks` is `fastrnn bench`."""

import sys

from fastrnn.bench.commands import main

if __name__ == "__main__":
    sys.exit(main())
