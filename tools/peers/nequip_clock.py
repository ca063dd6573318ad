"""The clock of NequIP's Lightning, named in nequip.yaml."""

from lightning.pytorch import Callback

from tools.peers import clock


class EpochClock(clock.EpochClock, Callback):
    """Processor seconds of each training epoch."""
