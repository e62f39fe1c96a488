"""Rank many rows, resumable: on this machine or on a Ray cluster."""
