"""The commands of `dn-dino`, see `cli.py`."""
