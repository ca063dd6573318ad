"""The clock of SchNetPack's Lightning, named in experiment/painn.yaml."""

from pytorch_lightning import Callback

from tools.peers import clock


class EpochClock(clock.EpochClock, Callback):
    """Processor seconds of each training epoch."""
