"""Checkpoints whose updates are known by construction."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 64, 160, 6, 50
SHAPES = {
    "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
    **{
        f"model.layers.{i}.{name}": shape
        for i in range(LAYERS)
        for name, shape in {
            "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            "self_attn.q_proj.bias": (HIDDEN,),
            "self_attn.k_proj.weight": (16, HIDDEN),
            "self_attn.v_proj.weight": (16, HIDDEN),
            "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
            "input_layernorm.weight": (HIDDEN,),
        }.items()
    },
    "model.norm.weight": (HIDDEN,),
    "lm_head.weight": (VOCABULARY, HIDDEN),
}


def base_weights(seed: int = 0, shapes: Mapping[str, tuple] = SHAPES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def moved(base: Mapping[str, Tensor], update: Callable[[str, Tensor], Tensor | None]) -> dict[str, Tensor]:
    """base + update(name, weight) where that is not None, in fp64 and rounded once."""
    out = {}
    for name, weight in base.items():
        delta = update(name, weight)
        out[name] = weight.clone() if delta is None else (weight.double() + delta).to(weight.dtype)
    return out


def directions(m: int, n: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Orthonormal (m, rank) and (n, rank), fp64."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.linalg.qr(torch.randn(s, rank, dtype=torch.float64, generator=generator))[0] for s in (m, n))


def write(folder: Path, tensors: Mapping[str, Tensor], config: dict | None = None, step: int | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    config = {"model_type": "qwen3", "tie_word_embeddings": False, **(config or {})}
    (folder / "config.json").write_text(json.dumps(config))
    if step is not None:
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


def write_sharded(folder: Path, tensors: Mapping[str, Tensor], shards: int = 3) -> Path:
    write(folder, {})
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n].contiguous() for n in names if files[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder
