"""`python -m gate`: the command, where its script is not on PATH."""

import sys

from gate.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
