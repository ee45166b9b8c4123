"""``python -m anyattn`` is the command line."""

import sys

from anyattn.cli import main

if __name__ == "__main__":
    sys.exit(main())
