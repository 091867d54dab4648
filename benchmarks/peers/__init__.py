"""Servers of others, written as their own documentation shows, to stand beside ours."""
