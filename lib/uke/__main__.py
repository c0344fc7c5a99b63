"""`python -m uke`: see `uke.cli.main`."""

import sys

from uke.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
