"""Text K/V of a prompt: everything that the network derives from the text alone.

A prompt is 64 rows, most of them zero. Text attention has no positions and no mask, so all zero
rows have one and the same key and value in every block, and z of them weigh as much as n rows with
``log(z / n)`` on their logits. A graph with T text rows thus serves every prompt of up to T - 1
non-zero rows exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gwp_edge.errors import SpecError
from gwp_edge.export.network import ActionPath, action_stream, streams
from gwp_edge.export.ops import WeightSource
from gwp_edge.export.precision import Recipe
from gwp_edge.export.torch_ops import TorchOps
from gwp_edge.spec import NetworkSpec, PolicySpec

N_PROMPT_ROWS = 64
# exp of it is 0 in float32 next to any logit that occurs, and float16 can hold it.
_NO_WEIGHT = -1e4
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def needed_rows(embeddings: Sequence[torch.Tensor]) -> int:
    """Return the smallest number of text rows T that serves every one of ``embeddings``.

    Args:
        embeddings: prompts, (64, text_dim) each.
    """
    return max(int(kept.sum()) + int(not bool(kept.all())) for kept in map(_nonzero, embeddings))


def collapse_padding(embedding: torch.Tensor, n_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the zero rows of a prompt.

    Args:
        embedding: (64, text_dim); zero rows may stand anywhere.
        n_rows: text rows T of the graphs.

    Returns:
        Rows (T, text_dim), the non-zero ones first, and their logit bias (T,).

    Raises:
        SpecError: the prompt is not finite, not of 64 rows, or has more non-zero rows than fit.
    """
    kept = _nonzero(embedding)
    n_kept = int(kept.sum())
    n_zero, n_padding = N_PROMPT_ROWS - n_kept, n_rows - n_kept
    if n_padding < min(n_zero, 1):
        raise SpecError(
            f"prompt has {n_kept} non-zero rows and {n_zero} zero rows, which need "
            f"{n_kept + min(n_zero, 1)} text rows; the graphs have {n_rows}: export it again "
            "together with this prompt"
        )
    rows = torch.zeros((n_rows, embedding.shape[1]))
    rows[:n_kept] = embedding[kept].to(torch.float32)
    bias = torch.zeros(n_rows)
    if n_padding:
        bias[n_kept:] = math.log(n_zero / n_padding) if n_zero else _NO_WEIGHT
    return rows, bias


def _nonzero(embedding: torch.Tensor) -> torch.Tensor:
    if embedding.ndim != 2 or len(embedding) != N_PROMPT_ROWS or embedding.shape[1] == 0:
        raise SpecError(
            f"prompt embedding: expected shape ({N_PROMPT_ROWS}, text_dim), "
            f"got {tuple(embedding.shape)}; pad it with zero rows"
        )
    if not bool(torch.isfinite(embedding).all()):
        raise SpecError("prompt embedding: holds NaN or infinite values; encode the prompt again")
    return (embedding != 0).any(dim=1)


def read_blocks(network: NetworkSpec) -> dict[str, int]:
    """Return how many blocks, from the first, read text in each stream.

    The prefix of the last block ends with its K/V, before text; actions run every block.
    """
    n = network.n_layers
    reads_all = action_stream(network).name
    return {s.name: n if s.name == reads_all else n - 1 for s in streams(network)}


def prompt_cache(
    weights: WeightSource, spec: PolicySpec, embedding: torch.Tensor, recipe: Recipe
) -> dict[str, torch.Tensor]:
    """Return the text K/V that the graphs take as inputs, one weight in memory at a time.

    Args:
        weights: the checkpoint.
        spec: sizes; ``n_text_rows`` is T.
        embedding: (64, text_dim).
        recipe: formats; K/V come in the one that attention computes in.

    Returns:
        ``prompt_k.S.i`` (heads, head_dim, T) and ``prompt_v.S.i`` (heads, T, head_dim) of every
        stream S and block i that reads text, and ``prompt_bias`` (T,) in float32.

    Raises:
        SpecError: the prompt does not fit the network.
    """
    network = spec.network
    if embedding.ndim == 2 and embedding.shape[1] != network.text_dim:
        raise SpecError(
            f"prompt embedding is {embedding.shape[1]} wide, the network takes "
            f"{network.text_dim}: it was made by another text encoder"
        )
    rows, bias = collapse_padding(embedding, network.n_text_rows)
    path = ActionPath(TorchOps(weights, recipe, eps=network.eps), spec)
    dtype = _DTYPES[recipe.of("blocks.0.attn1.qk")]
    blocks = read_blocks(network)
    cache = {"prompt_bias": bias}
    with torch.no_grad():
        for stream in streams(network):
            n_blocks = blocks[stream.name]
            if n_blocks == 0:
                continue  # not even the text embedder is read
            for i, kv in enumerate(path.prompt_kv(rows, len(rows), stream, n_blocks=n_blocks)):
                cache[f"prompt_k.{stream.name}.{i}"] = kv.k.to(dtype).contiguous()
                cache[f"prompt_v.{stream.name}.{i}"] = kv.v.to(dtype).contiguous()
    return cache
