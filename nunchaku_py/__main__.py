"""`python -m nunchaku_py` is the command `nunchaku-py`."""
import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
