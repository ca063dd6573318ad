"""Layers split over ranks: schedules as data, their proof and their cost without processes.

`actions` has the types, the messages and [Note: executor]; the files of `schedules` build schedules, which
`registry` finds by name; `validate` proves and prints them, `simulate` times, `timeline` draws; `stage`
divides layers over stages.
"""
