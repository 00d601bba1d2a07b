"""The text worlds, each a file with the same few names (worlds/README.md). No torch in here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Observation:
    """What the agent sees. `text` is GiGPO's anchor state; `admissible` is what a prompt lists."""

    text: str
    task: str
    task_type: str  # the bucket of its skills and the line of its result in a table
    admissible: tuple = ()
    world: str = "alfworld"
