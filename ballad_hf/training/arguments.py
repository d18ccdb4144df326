"""What a run is told, one dataclass a stage, each checked where it is made."""

from dataclasses import dataclass


@dataclass
class PhaseAArguments:
    """Continued pretraining of the towers (phase A)."""

    epochs: int = 50
    batch_size: int = 512
    learning_rate: float = 1e-5


@dataclass
class PhaseBArguments:
    """Balanced adapting over cached features (phase B)."""

    epochs: int = 10
    batch_size: int = 512
    learning_rate: float = 0.2
