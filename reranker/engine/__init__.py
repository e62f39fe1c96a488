"""Text in, scores out: synchronous, without the web stack, usable alone."""
