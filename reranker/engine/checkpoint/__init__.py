"""A folder or a hub name: what it holds, or one line why it cannot be served."""
