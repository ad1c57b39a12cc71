"""What one step of the engine gives to the world outside."""

from dataclasses import dataclass, field

from engine.protocol import Incident, TokenOutput


@dataclass(slots=True)
class StepResult:
    outputs: list[TokenOutput] = field(default_factory=list)
    incidents: list[Incident] = field(default_factory=list)
    failure: str = ""  # traceback of a failed launch, for the log
