"""A model in this process or a running service, behind one interface."""
