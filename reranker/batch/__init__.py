"""Rank many rows, resumable, on this machine or on a Ray cluster.

An output belongs to one manifest (`manifest`), with which alone another run continues it. Rows, scores, result records
and totals are the same code for both (`scoring`). How a run finds its place differs, because the promises do:

- Here (`journal`) a killed process loses no scored line. So every line is appended at once, and the next run continues
  after the last whole one. That needs order, appending, truncation and a lock.
- Over Ray (`output`) parts finish in any order on any node, on stores that offer none of these four. So a part is
  written whole, and the next run skips those with a record. As parts, lines here would be lost at each death.

Ray Data assigns parts to actors, sizes the pool of actors, holds back parts while all actors are busy, and shows
progress. Five things are done here because Ray Data 2.55 does not do them:

- Split and read the input (`parts`): its readers lose line numbers, fail a file for one bad row, and
  split differently on another cluster, so a part would not be the same part in the next run.
- Resume (`output`): its checkpoints (beta) need a unique id in every row and never compare input, options or model.
- Write (`output`): its writers know no bad rows, and nothing tells which rows of the input a file holds.
- Replace dead actors (`cluster`): with its own restarts some deaths leave a part or a node that it waits for forever.
- Return expected errors as values (`actor`): an exception is retried and arrives as pages of traceback.
"""
