"""`python -m memfit`, for launchers that take a module: `torchrun -m memfit run ...`."""

import sys

from memfit.cli import main

if __name__ == "__main__":
    sys.exit(main())
