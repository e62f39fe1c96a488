"""Rank many rows, resumable, on this machine or on a Ray cluster.

An output has one manifest and numbered parts. Another run continues it only with the same manifest, and skips the
finished parts. On this machine there is one part, written line by line (`journal`), which continues after its last
whole line; over Ray each part is written whole, to a disk or a store (`output`). Rows, scores, result records and
totals are the same code for both (`scoring`).

Ray Data assigns parts to actors, sizes the pool of actors, holds back parts while all actors are busy, and shows
progress. Five things are done here because Ray Data 2.55 does not do them:

- Split and read the input (`parts`): its readers lose line numbers, fail a file for one bad row, and
  split differently on another cluster, so a part would not be the same part in the next run.
- Resume (`output`): its checkpoints (beta) need a unique id in every row and never compare input, options or model.
- Write (`output`): its writers know no bad rows, and nothing tells which rows of the input a file holds.
- Replace dead actors (`cluster`): with its own restarts some deaths leave a part or a node that it waits for forever.
- Return expected errors as values (`actor`): an exception is retried and arrives as pages of traceback.
"""
