"""`python -m dverge_serve`: the same command as `dverge`."""

import sys
from pathlib import Path

# `python -m` puts the working folder first on the path, where a user's own `training.py` would
# hide ours. The folder that holds this package is found without it.
if sys.path and Path(sys.path[0] or ".").resolve() != Path(__file__).resolve().parents[1]:
    del sys.path[0]

from dverge_serve.cli import main

main()
