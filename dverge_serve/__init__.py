"""DVERGE Serve: train, fuse, verify and serve image classifiers that will be attacked."""

# A literal, because package metadata is absent inside a Bento's uninstalled copy.
__version__ = "0.1.0"
