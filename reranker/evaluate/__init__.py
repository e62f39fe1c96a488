"""Measure what reranking gains on labelled data."""
