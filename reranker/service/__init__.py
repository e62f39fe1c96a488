"""Many clients in, fair batches out: asynchronous, HTTP."""
