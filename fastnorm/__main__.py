"""The command line as ``python -m fastnorm``."""

import sys

from fastnorm.cli import main

if __name__ == "__main__":
    sys.exit(main())
