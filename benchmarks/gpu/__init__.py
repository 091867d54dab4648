"""What needs a GPU, in minutes.

    python -m benchmarks.gpu smoke [cuda|cpu] [CHECK...]    # every CUDA path once
    python -m benchmarks.gpu steps [--device cuda]          # one DVERGE step at every layer

Run `smoke` first on a new machine: twenty checks, none of which stops the next. On `cpu` it is a
rehearsal, and the checks that need a GPU are skipped. `steps` times the published step beside ours,
eager and recorded as a CUDA graph.
"""
