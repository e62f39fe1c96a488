"""What `deploy/ray_batch.py` distributes: inputs cut into parts, a part's rows, their scores, the output folder."""
