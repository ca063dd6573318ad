"""Which chunks and structures of a source are accepted, and the counts that become its provenance."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from megagnn.data.labels.chunks import Chunk
from megagnn.data.labels.sources import Source
from megagnn.data.record import Structure

STALL_CHUNKS = 20  # consecutive chunks that bring nothing new


@dataclass
class Tally:
    """Chunks of one source accepted so far, always the first ones: what a run of any other shape would accept
    too.
    """

    source: Source
    num: int
    num_chunks: int = 0
    num_structures: int = 0
    num_labelled: int = 0
    num_duplicates: int = 0
    num_idle: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    seen: set[str] = field(default_factory=set)
    kept: set[str] = field(default_factory=set)

    @property
    def done(self) -> bool:
        return self.num_structures >= self.num

    def accept(self, chunk: Chunk) -> list[Structure]:
        """Count the next chunk and return what it adds: no molecule an earlier chunk has, and no more than
        `num` in all.
        """
        fresh = [s for s in chunk.structures if self.source.repeats or s.group not in self.seen]
        added = fresh[: self.num - self.num_structures]
        self.seen.update(s.group for s in chunk.structures)
        self.kept.update(s.group for s in added)
        self.num_chunks += 1
        self.num_structures += len(added)
        self.num_labelled += chunk.num_labelled
        self.num_duplicates += chunk.num_duplicates + len(chunk.structures) - len(fresh)
        self.num_idle = 0 if fresh else self.num_idle + 1
        self.rejected.update(chunk.rejected)
        if self.num_idle >= STALL_CHUNKS and not self.done:
            raise ValueError(
                f"source {self.source.name} found no new molecule in {STALL_CHUNKS} chunks after "
                f"{self.num_structures} of {self.num} structures: its molecules are used up; lower --num "
                "or raise --per-group"
            )
        return added

    def wants(self, index: int) -> bool:
        """Whether chunk `index` is likely needed, if those before it hold as much as the accepted ones."""
        per_chunk = self.num_structures / self.num_chunks if self.num_chunks else 1.0
        return self.num_structures + (index - self.num_chunks) * per_chunk < self.num
