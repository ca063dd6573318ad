"""The pipeline schedules: every module of this package is imported when a schedule is looked up by name."""
