"""Many trainings at once: which are still to be run, where, and what became of each."""
