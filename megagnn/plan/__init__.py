"""Plans of training runs: memory, arithmetic, messages and time of a layout on a cluster, before the run."""
