"""Tests of the benchmark of the service: what the peers answer, the overload, the bars."""
