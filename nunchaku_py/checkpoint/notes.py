"""What a file format could not keep of a model."""
from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Notes:
    """What could not be kept bit for bit: kind → (how many tensors, the largest change)."""

    changes: dict[str, tuple[int, float]] = field(default_factory=dict)

    def add(self, kind: str, change: float) -> None:
        count, largest = self.changes.get(kind, (0, 0.0))
        self.changes[kind] = (count + 1, max(largest, change))

    def __str__(self) -> str:
        if not self.changes:
            return "every tensor was kept bit for bit"
        return "\n".join(f"{count} {kind}" + (f": by {largest:.2g} at most" if largest else "")
                         for kind, (count, largest) in self.changes.items())
