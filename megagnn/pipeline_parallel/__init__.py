"""Layers split over ranks: schedules as data, their proof and their cost without processes.

`actions` has the types and [Note: executor]; `schedules` and `conservative` make schedules; `grid` prints and
reads them, `program` adds messages, `validate` proves, `simulate` times, `timeline` draws; `split` divides
layers over stages and structures over micro-batches.
"""
