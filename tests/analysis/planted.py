"""Checkpoints whose updates are known by construction."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from effopd_kernels.analysis import cli
from effopd_kernels.analysis.roles import role_of

HERE = Path(__file__).parent
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


def lora(folder: Path, factors: Mapping[str, Tensor], **config) -> Path:
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {f"base_model.model.{name}": t.contiguous() for name, t in factors.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


SIGMA = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
PROFILE = (1.0, 1.0, 4.0, 4.0, 2.0, 2.0)  # by layer
ANGLES = {10: 60.0, 50: 30.0, 100: 0.0}  # degrees between a checkpoint's directions and the last one's
TOKENS = {3: 0.5, 7: 0.25, 11: 1e-4}  # relative shifts, at right angles to the embedding


def low_rank(step):
    """Rank 4 in every attention and MLP matrix, by the layer's profile, its left directions turned by an angle."""

    def update(name, weight):
        role = role_of(name)
        if name == "model.embed_tokens.weight":
            delta = torch.zeros_like(weight, dtype=torch.float64)
            for token, size in TOKENS.items():
                e = weight[token].double()
                side = torch.roll(e, 1)
                side -= (side @ e) / (e @ e) * e
                delta[token] = size * side * e.norm() / side.norm()
            return delta
        if role.part not in ("attention", "mlp") or weight.ndim < 2:
            return None
        u, v = directions(*weight.shape, 8, seed=sum(map(ord, name)))
        turned = math.cos(math.radians(ANGLES[step])) * u[:, :4] + math.sin(math.radians(ANGLES[step])) * u[:, 4:]
        return PROFILE[role.layer] * step / 100 * (turned * SIGMA) @ v[:, :4].T

    return update


def noise(step):
    """Every entry of every tensor, by a normal number."""

    def update(name, weight):
        generator = torch.Generator().manual_seed(step)
        return 0.01 * step * torch.randn(weight.shape, generator=generator, dtype=torch.float64)

    return update


def two_trajectories(folders: Path, out: Path) -> list[str]:
    """Arguments that compare both, their checkpoints out of order."""
    opd = ",".join(str(folders / "opd" / f"checkpoint-{step}") for step in sorted(ANGLES, reverse=True))
    rl = ",".join(str(folders / "rl" / f"saved{step}") for step in (1, 2))
    runs = ["--trajectory", f"opd={opd}", f"rl={rl}"]
    return ["updates", f"--base={folders / 'base'}", *runs, f"--output_dir={out}", "--rank=8", "--ks", "1", "4"]


def analyse(base: Path, *checkpoints: Path | str, out: Path) -> int:
    """The exit code of `effopd-analyze updates`; flags may follow the checkpoints."""
    return cli.main(["updates", *map(str, ("--base", base, "--checkpoints", *checkpoints, "--output_dir", out))])


def save_blank(figure, folder: Path, name: str) -> None:
    """In the place of `figures.save`, which takes most of the time of a small run."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
