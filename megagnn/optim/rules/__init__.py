"""The optimizers of `optim.rule`, one line each."""

from megagnn.optim.rule import Rule
from megagnn.optim.rules.adamw import ADAMW
from megagnn.optim.rules.muon import MUON
from megagnn.optim.rules.soap import SOAP

RULES = {
    "adamw": Rule(ADAMW),
    "muon": Rule(ADAMW, MUON),
    "soap": Rule(ADAMW, SOAP),
}


def rule_of(name: str) -> Rule:
    """The optimizer of this name.

    Raises ValueError, which names those that there are.
    """
    if name not in RULES:
        raise ValueError(f"optim.rule must be one of {', '.join(RULES)}; got '{name}'")
    return RULES[name]
