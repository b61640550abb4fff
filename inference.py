"""`dn-dino predict` from a checkout, with its former flags: `python inference.py --help`."""

import sys

from models.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
