"""The edge operation of the EGNN: messages, their sums and the vector branch, in blocks of edges."""

from megagnn.models.egnn.edge.message import edge_message, edge_message_pair
from megagnn.models.egnn.edge.stages import BlockStages
from megagnn.models.egnn.edge.types import EdgeGraph, EdgeSpec, EdgeWeights

__all__ = ["BlockStages", "EdgeGraph", "EdgeSpec", "EdgeWeights", "edge_message", "edge_message_pair"]
