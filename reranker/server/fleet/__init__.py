"""Several workers on one host.

    context       WorkerContext: everything that a worker learns from its master, and the exit policy
    master        slots, generations and the shared folder, in gunicorn's master
    siblings      hand-off of connections to the least busy worker

The master keeps its state in `master.current`. A forked worker inherits the memory of the master, and the hook
`post_fork` sets `context.current` there. SIGUSR2 starts the next master through exec, which only the environment
survives: one internal variable, RERANKER_GENERATION, holds "<generation>:<folder>" for it.
"""
