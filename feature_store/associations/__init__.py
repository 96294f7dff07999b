"""Feature associations: one file per statistic, one job that assembles the tables."""
