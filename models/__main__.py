"""`python -m models`: the command `dn-dino` in a checkout."""

import sys

from .cli import main

sys.exit(main())
