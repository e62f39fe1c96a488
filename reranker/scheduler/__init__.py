"""Many concurrent requests in, fair batches out: asyncio, no torch, no HTTP."""
