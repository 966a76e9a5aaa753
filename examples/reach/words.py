"""Prompt embeddings of the example: a fixed random vector for each word.

The real models read prompts with a large language model; two short instructions do not need one.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

TEXT_DIM = 64


def embed(text: str) -> torch.Tensor:
    """Return the embedding of ``text``, float32, (number of words, TEXT_DIM)."""
    rows = []
    for word in text.lower().split():
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
        rows.append(np.random.default_rng(seed).standard_normal(TEXT_DIM))
    return torch.from_numpy(np.array(rows, np.float32))
