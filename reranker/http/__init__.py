"""HTTP requests to rankings, and rankings to responses."""
