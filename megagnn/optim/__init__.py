"""Learning-rate schedules, weight averaging, and the optimizer of a run."""
