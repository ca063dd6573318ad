"""Learning rate as a function of the step."""

import math

from megagnn.optim.config import OptimConfig


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """Learning rate of step 0..num_steps-1: linear warm-up, then the configured schedule.

    `cosine`: half a cosine from the peak to final_ratio * peak (Loshchilov and Hutter, ICLR 2017, eq. 5).
    `wsd`: stays at the peak, then falls linearly over the last decay_fraction of the steps. `constant`: stays
    at the peak.
    """
    peak = config.learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return peak
    if config.schedule == "wsd":
        decay_steps = max(1, round(config.decay_fraction * num_steps))
        left = min(1.0, (num_steps - step) / decay_steps)
        return peak * (config.final_ratio + (1 - config.final_ratio) * left)
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return peak * (config.final_ratio + (1 - config.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
