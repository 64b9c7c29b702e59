"""What methods over adapters share: the names of those that they act on."""

from __future__ import annotations

from dataclasses import dataclass

from ingraft.methods.contract import MethodConfig, tuple_of_names


@dataclass(frozen=True, kw_only=True)
class OverConfig(MethodConfig):
    """The options of a method over adapters; its modules are theirs.

    Attributes:
        adapters: names of the adapters to act on, attached under these names; at least two, all at the same places.
    """

    adapters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapters", tuple_of_names(self.adapters))
        super().__post_init__()

    def problems(self) -> list[str]:
        found: list[str] = []
        if len(set(self.adapters)) != len(self.adapters):
            found.append(f"adapters: a name stands more than once in {', '.join(self.adapters)}.")
        if self.target_modules is not None:
            found.append(f"{self.method}: its modules are those of the adapters it acts on; leave target_modules out.")
        return found


def members(config: OverConfig) -> tuple[str, ...]:
    """The adapters that it acts on (`Method.over`)."""
    return config.adapters
