"""Tests of the leaves that every room shares."""
