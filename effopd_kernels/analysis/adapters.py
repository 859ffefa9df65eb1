"""LoRA adapters as checkpoints: ΔW = s·B·A, with no rounding to the base's dtype in between.

s is lora_alpha / r, or lora_alpha / √r with rsLoRA; both may differ by layer (``alpha_pattern``, ``rank_pattern``). A
folder ``effopd`` inside holds the companion that extrapolation left (`effopd_kernels.extrapolation.lora`); it adds.
"""

import math
import re
from numbers import Real
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..errors import UserError
from ..extrapolation.adapters import BASE, CHANGES_BASE, COMPANION
from ..tensor_files import EVERY
from .checkpoints import Checkpoint, read_json
from .wording import listed

CONFIG = "adapter_config.json"
# Variants of peft's LoraConfig whose weight is not W + s·B·A.
_VARIANTS = {
    "use_dora": "DoRA", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA", "kasa_config": "KaSA",
    "alora_invocation_tokens": "aLoRA",
}  # fmt: skip
# Settings of LoRA that may put more into an adapter than factors of whole weights.
_MORE = ("lora_bias", "trainable_token_indices", "target_parameters")
_FACTOR = re.compile(r"(.*)\.lora_(embedding_)?([AB])(\.weight)?$")
# Families of transformers with Conv1D layers, whose weights are (in, out), and the names of these layers.
_CONV1D_FAMILIES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_CONV1D = re.compile(r"\.(c_attn|q_attn|c_proj|c_fc)\.weight$")


class StoredFactors(NamedTuple):
    """Where the factors of one weight are stored."""

    file: Checkpoint
    a: str
    b: str
    scale: float
    transposed: bool  # the weight is (in, out): embeddings and Conv1D

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that they are to be added to."""
        n, m = self.file.shapes[self.a][0][1], self.file.shapes[self.b][0][0]
        return (n, m) if self.transposed else (m, n)


def is_adapter(path: str | Path) -> bool:
    return (Path(path) / CONFIG).is_file() and not (Path(path) / "model.safetensors").is_file()


class Adapter(Checkpoint):
    """A peft LoRA folder on a base. What it does not touch is the base's.

    Raises:
        UserError: as `Checkpoint`; another method than LoRA, or a variant such as DoRA; an initialisation, such as
            PiSSA, that changed the base; factors of tensors that the base does not have.
    """

    def __init__(self, path: str | Path, base: Checkpoint):
        self._factors: dict[str, list[StoredFactors]] = {}
        self._whole: dict[str, tuple[Checkpoint, str]] = {}  # modules_to_save
        for folder in (Path(path), Path(path) / COMPANION):
            if (folder / CONFIG).is_file():
                self._add(folder)
        super().__init__(path)
        self.config = base.config
        base.lengthen_names([*self._factors, *self._whole])  # an adapter's are the model's
        unknown = [name for name in self.adapted if name not in base.shapes]
        if unknown:
            config = read_json(self.path / CONFIG)
            if more := [key for key in _MORE if config.get(key)]:
                raise UserError(
                    f"{path} was trained with {more[0]}, which is not W + s·B·A: merge it into the model first"
                )
            raise UserError(
                f"{path} adapts tensors that the base {base.path} does not have: {listed(unknown)}; give the base that "
                "it was trained from, with a head of its own where that is adapted, or merge it into its model first"
            )
        self.shapes = dict(base.shapes)  # of what is adapted, as the adapter has them: `compare` looks whether they fit
        for name, factors in self._factors.items():
            factors[:] = (_as_the_weight_lies(f, name, base) for f in factors)
            for f in factors:
                self.shapes[name] = (f.shape, base.shapes[name][1])
        for name, (file, stored) in self._whole.items():
            self.shapes[name] = (file.shapes[stored][0], base.shapes[name][1])

    @property
    def adapted(self) -> list[str]:
        """The tensors that are not the base's."""
        return list(dict.fromkeys((*self._factors, *self._whole)))

    def pair(self, name: str, base: Tensor, rows: slice = EVERY) -> tuple[Tensor, Tensor | None]:
        """As `Checkpoint.pair`; the product is fp32 on its own, without the base's rounding."""
        product = sum(_product(f, rows) for f in self._factors.get(name, ()))
        if name in self._whole:  # an embedding under LoRA is saved with its base layer
            file, stored = self._whole[name]
            return file.read(stored, rows) + product, base
        return (product, None) if name in self._factors else (base, base)

    def alias(self, name: str, source: str) -> None:
        """A tied head moves with the embedding."""
        self.shapes[name] = self.shapes[source]
        for held in (self._factors, self._whole):
            if source in held:
                held[name] = held[source]

    def _add(self, folder: Path) -> None:
        config = read_json(folder / CONFIG)
        kinds = [kind for key, kind in _VARIANTS.items() if config.get(key)]
        if config.get("peft_type", "LORA") != "LORA" or kinds:
            kind = kinds[0] if kinds else config["peft_type"]
            raise UserError(f"{folder} is a {kind} adapter; only LoRA is W + s·B·A: merge it into the model first")
        start = str(config.get("init_lora_weights")).lower()
        if start.startswith(CHANGES_BASE):
            raise UserError(
                f"{folder} began with init_lora_weights={start}, which changed the base, so base + s·B·A is not its "
                "model: convert it with peft's save_pretrained(path_initial_model_for_weight_conversion=...), or merge "
                "it into the model it was trained in"
            )
        file = Checkpoint(folder)
        found: dict[str, dict[str, str]] = {}
        for stored in file.shapes:
            name = stored.removeprefix(BASE).replace(".base_layer.", ".")
            if match := _FACTOR.match(name):
                found.setdefault(match[1], {})[match[3]] = stored
                if match[2]:
                    found[match[1]]["embedding"] = stored
            else:
                self._whole[name] = (file, stored)
        for module, parts in found.items():
            if not {"A", "B"} <= set(parts):
                raise UserError(f"{folder} holds only one of the two LoRA factors of {module}")
            a, b = (file.shapes[parts[x]][0] for x in "AB")
            if not (len(a) == len(b) == 2 and a[0] == b[1] > 0):
                raise UserError(
                    f"the LoRA factors of {module} in {folder} are {a} and {b}; a matrix has (r, in) and (out, r)"
                )
            rank = a[0]
            try:
                alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
            except (AttributeError, re.error) as error:
                raise UserError(
                    f"alpha_pattern in {folder / CONFIG} is not one of names to numbers: {error}"
                ) from error
            if not isinstance(alpha, Real):
                raise UserError(f"lora_alpha of {module} in {folder / CONFIG} is {alpha!r}, not a number")
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            transposed = "embedding" in parts or bool(config.get("fan_in_fan_out"))
            self._factors.setdefault(f"{module}.weight", []).append(
                StoredFactors(file, parts["A"], parts["B"], scale, transposed)
            )


def _as_the_weight_lies(f: StoredFactors, name: str, base: Checkpoint) -> StoredFactors:
    """``f`` with ``transposed`` as the base stores the weight: by its shape or, if that is square, by the layer's name
    in families with Conv1D. Elsewhere the folder's fan_in_fan_out stands, though it is that of the layer peft made
    last.
    """
    turned, shape = f._replace(transposed=not f.transposed), base.shapes[name][0]
    if f.shape != turned.shape and shape in (f.shape, turned.shape):
        return f if shape == f.shape else turned
    if base.config.get("model_type") in _CONV1D_FAMILIES and "lora_embedding" not in f.a:
        return f._replace(transposed=bool(_CONV1D.search(name)))
    return f


def _product(f: StoredFactors, rows: slice) -> Tensor:
    b, a = f.file.read(f.b).float(), f.file.read(f.a).float()
    return f.scale * (b @ a[:, rows]).mT.contiguous() if f.transposed else f.scale * (b[rows] @ a)


def _by_pattern(pattern: dict | None, module: str, default: float) -> float:
    """peft's rule: the first key that is the module's name or its ending, as a regular expression."""
    matches = (value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(matches, default)
