"""What a cluster can do: a TOML file with its devices, links, disks, power and price (docs/planning.md)."""

import dataclasses
import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megagnn.overrides import STRICT, check_keys, explain, tomllib

FOLDER = Path(__file__).parent / "clusters"
Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, config=STRICT)
class Device:
    """A GPU, or all the cores that one rank has."""

    name: str
    kind: Literal["gpu", "cpu"]
    memory_gb: PositiveFloat
    """1e9 bytes; of a CPU, the machine's memory over its devices."""
    usable: Share
    """Share of the memory that tensors may take: what remains is the libraries' and fragments."""
    float64: PositiveFloat
    """Peak of matrix products, 1e12 operations a second, as PyTorch makes them by default."""
    float32: PositiveFloat
    bfloat16: PositiveFloat
    memory_gbps: PositiveFloat
    """1e9 bytes a second."""
    watts: PositiveFloat


@dataclass(frozen=True, config=STRICT)
class Link:
    """What one device can send while all send, in one direction."""

    gbps: PositiveFloat
    """1e9 bytes a second."""
    latency_us: NonNegativeFloat

    def seconds(self, num_bytes: float, num_messages: float = 1.0) -> float:
        return num_bytes / (1e9 * self.gbps) + 1e-6 * self.latency_us * num_messages


@dataclass(frozen=True, config=STRICT)
class Node:
    """What the devices of a node share; rates are of one device while all are at work."""

    devices: PositiveInt
    link: Link
    """Between its devices."""
    host_memory_gb: PositiveFloat
    """Beside the devices', of each; with CPUs it is theirs."""
    host_gbps: PositiveFloat
    """Between a device and the host's memory."""
    disk_gbps: PositiveFloat
    watts: NonNegativeFloat
    """Of all but the devices."""


@dataclass(frozen=True, config=STRICT)
class Efficiency:
    """Shares of the peaks that a run reaches: assumptions until they are measured."""

    products: Share = 0.5
    memory: Share = 0.7
    links: Share = 0.7


@dataclass(frozen=True, config=STRICT)
class Cluster:
    """Nodes of one kind."""

    name: str
    num_nodes: PositiveInt
    """That there are, at most."""
    device: Device
    node: Node
    network: Link
    """Between nodes, of each device."""
    efficiency: Efficiency = dataclasses.field(default_factory=Efficiency)
    cooling: Annotated[float, Field(ge=1)] = 1.0
    """Power of the hall over that of the machines."""
    device_hour: NonNegativeFloat | None = None
    """Price of a device for an hour, in the currency of the file's comment."""

    @property
    def num_devices(self) -> int:
        return self.num_nodes * self.node.devices

    @property
    def memory_limit(self) -> float:
        """Bytes that a rank's tensors may take."""
        return 1e9 * self.device.memory_gb * self.device.usable

    def rate(self, dtype: str) -> float:
        """Operations of products a second that are reached."""
        peak: float = getattr(self.device, dtype)
        return 1e12 * peak * self.efficiency.products

    @property
    def memory_rate(self) -> float:
        """Bytes a second that are reached."""
        return 1e9 * self.device.memory_gbps * self.efficiency.memory

    def link(self, size: int, stride: int, num_ranks: int) -> Link:
        """Between the ranks of a group of so many, neighbours so far apart; the ranks of the run fill one
        node after another. Slower than the peak by `efficiency.links`."""
        link = self.node.link if self.is_within_node(size, stride, num_ranks) else self.network
        return Link(link.gbps * self.efficiency.links, link.latency_us)

    def is_within_node(self, size: int, stride: int, num_ranks: int) -> bool:
        """Whether every such group lies on one node: of three ranks each, on nodes of eight, one does not."""
        devices = self.node.devices
        return num_ranks <= devices or devices % (size * stride) == 0

    def watts(self, num_devices: int) -> float:
        """Of so many devices, with their share of nodes and of cooling, at full power."""
        return num_devices * (self.device.watts + self.node.watts / self.node.devices) * self.cooling


def load_cluster(name: str | Path) -> Cluster:
    """A cluster by its name, one of megagnn/plan/clusters/, or by a file.

    Raises:
        ValueError: neither is there, no TOML, or values that cannot be; names the nearest.
    """
    path, known = Path(name), sorted(p.stem for p in FOLDER.glob("*.toml"))
    if path.suffix != ".toml" and str(name) in known:
        path = FOLDER / f"{name}.toml"
    if not path.is_file():
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ValueError(
            f"--cluster {name} is no file and none of {', '.join(known)}; {hint}name one of them"
        )
    try:
        return cluster_of(tomllib.loads(path.read_text()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def cluster_of(values: dict[str, Any]) -> Cluster:
    """A cluster of nested dictionaries, as TOML gives them. Raises ValueError as `load_cluster`."""
    check_keys(Cluster, values)
    try:
        return TypeAdapter(Cluster).validate_python(values)
    except ValidationError as error:
        raise ValueError("\n".join(map(explain, error.errors()))) from None
