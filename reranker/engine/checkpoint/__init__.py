"""Find a checkpoint by folder or hub name, read it, and refuse what cannot be served, in one line with the reason."""
