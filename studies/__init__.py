"""Investigations that were done once: simulation, routing, growth, breakdown, a Ray cluster, and vLLM as a peer.

`python -m studies.<name>` runs one; tests/test_studies.py only imports them.
"""
