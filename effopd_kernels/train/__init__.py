"""The thin trainer behind `effopd-train`, on TRL. Needs `pip install effopd-kernels[train]`."""

from importlib.util import find_spec

from ..errors import UserError
from .errors import NonFiniteLossError, NotInstalledError

if missing := [name for name in ("trl", "peft", "matplotlib", "rich") if find_spec(name) is None]:
    raise NotInstalledError(f"effopd_kernels.train needs {', '.join(missing)}: pip install effopd-kernels[train]")

from .callback import EffOPDCallback
from .config import OPDConfig
from .loss import FusedLoss, restore_trl_loss, use_fused_loss
from .trainer import OPDTrainer

__all__ = [
    "EffOPDCallback",
    "FusedLoss",
    "NonFiniteLossError",
    "NotInstalledError",
    "OPDConfig",
    "OPDTrainer",
    "UserError",
    "restore_trl_loss",
    "use_fused_loss",
]
