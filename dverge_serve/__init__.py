"""DVERGE Serve: train, fuse, verify and serve image classifiers that will be attacked."""

import os

# ONNX Runtime keeps a device id and reports to its maker, unless told otherwise before its import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# A literal, because package metadata is absent inside a Bento's uninstalled copy.
__version__ = "0.1.0"
