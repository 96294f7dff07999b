"""What all stages run on: the Ray session, the pool of actors, job submission, progress and reports."""
