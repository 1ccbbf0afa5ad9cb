"""Lightning's trainer as experiments and tests want it."""

import logging
from typing import Any

from lightning.pytorch import Trainer


def quiet_trainer(**arguments: Any) -> Trainer:
    """A trainer on one device that says and keeps nothing but what `arguments`, Lightning's own, ask for."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    # Of several devices, each would run the whole command, and images that they do not divide would count twice.
    return Trainer(**{"devices": 1, **silent, **arguments})
