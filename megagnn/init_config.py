"""The section [init]: what a run takes of the checkpoint that it begins with. See docs/fine-tuning.md."""

from dataclasses import field
from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from megagnn.overrides import Pairs


@dataclass(frozen=True, config=ConfigDict(use_attribute_docstrings=True, validate_default=True))
class InitConfig:
    """What of the checkpoint `init_from` a new run takes over; without `init_from` it has no effect."""

    weights: Literal["average", "model"] = "average"
    """The moving average of the checkpoint's weights, which its validation saw, or the weights themselves."""
    references: Literal["fit", "keep"] = "fit"
    """Reference energies: fitted anew on the training split, or those of the checkpoint's source of the same
    name, where elements that it lacks are fitted beside them."""
    new_sources: Pairs = field(default_factory=dict)
    """`keep`: {new = old}, for a source of the data the checkpoint's source whose references it keeps."""
    new_elements: Pairs = field(default_factory=dict)
    """{Si = "Ge"}: an element that the checkpoint lacks begins as another does; as the mean of all if not
    given."""
    new_levels: Pairs = field(default_factory=dict)
    """{new = old}: the same of levels of theory."""

    def __post_init__(self) -> None:
        if self.new_sources and self.references == "fit":
            raise ValueError(
                "init.new_sources says whose references are kept, but init.references is 'fit'; set it to "
                "'keep', or leave init.new_sources out"
            )
