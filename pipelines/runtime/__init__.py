"""What all stages use to run: the Ray session, the actor pool, job submission, progress bars and printed results.

A stage calls `actor_pool.do_shards`, which opens a session (`cluster`), starts actors, shows progress (`progress`) and
returns the sums of their counts. `job_submission` and `job_log` run a recipe on a remote cluster. `reports` and
`output` print results.
"""
