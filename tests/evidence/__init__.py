"""Tests of the evidence: benchmarks/evidence and the page it writes."""
