"""One file per model family: what differs between the models that the engine computes."""
