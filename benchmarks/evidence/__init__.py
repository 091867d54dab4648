"""The paper's claims on our own runs: `python -m benchmarks.evidence`, or `make evidence`.

A *cell* is one training run with one seed, measured by one fixed protocol; it leaves one small JSON
file. `docs/results.md` is made from those files alone.
"""
