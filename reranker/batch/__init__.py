"""Rank many rows, resumable, on this machine or on a Ray cluster.

Another run continues an output only with the same manifest (`manifest`). Rows, scores, result records and totals are
the same code for both (`scoring`). Finished rows are found in two ways, because neither keeps the other's promises:

- On this machine (`journal`) a killed process loses no scored line: each line is appended when it is scored, and the
  next run continues after the last whole line. With parts, it would lose the lines of the unfinished one.
- Over Ray (`output`) parts finish in any order on any node: each is written whole, and the next run skips those with a
  record. A journal needs lines in order, and a file to append, truncate and lock, which an object store does not have.

Ray Data assigns parts to actors, sizes the pool of actors, holds back parts while all actors are busy, and shows
progress. Five things are done here because Ray Data 2.55 does not do them:

- Split and read the input (`parts`): its readers lose line numbers, fail a file for one bad row, and
  split differently on another cluster, so a part would not be the same part in the next run.
- Resume (`output`): its checkpoints (beta) need a unique id in every row and never compare input, options or model.
- Write (`output`): its writers know no bad rows, and nothing tells which rows of the input a file holds.
- Replace dead actors (`cluster`): with its own restarts some deaths leave a part or a node that it waits for forever.
- Return expected errors as values (`actor`): an exception is retried and arrives as pages of traceback.
"""
