"""The thin trainer behind `effopd-train`, on TRL. Needs `pip install effopd-kernels[train]`."""

from .callback import EffOPDCallback
from .config import OPDConfig
from .errors import NonFiniteLossError, UserError
from .loss import FusedLoss, restore_trl_loss, use_fused_loss
from .trainer import OPDTrainer

__all__ = [
    "EffOPDCallback",
    "FusedLoss",
    "NonFiniteLossError",
    "OPDConfig",
    "OPDTrainer",
    "UserError",
    "restore_trl_loss",
    "use_fused_loss",
]
