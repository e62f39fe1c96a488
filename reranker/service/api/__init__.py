"""One module a dialect: wire models, translate in, translate out; no scoring logic."""
