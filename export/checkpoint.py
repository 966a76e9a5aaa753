"""Read a checkpoint lazily, whatever the container.

A diffusers folder (one file or sharded), ``.safetensors``, ``.pt``/``.pth``/``.bin``/``.ckpt``
(weights-only), and DeepSpeed training folders. Sizes and accounting are in
:mod:`gwp_edge.export.sizes` and :mod:`gwp_edge.export.accounting`; both are importable from here.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from gwp_edge.errors import SpecError
from gwp_edge.export._containers import Source, TensorInfo, open_source
from gwp_edge.export._locate import Located, is_named_ema, locate, read_json
from gwp_edge.export._names import Selection, select_names
from gwp_edge.export.accounting import Accounting, account, expected_tensors, unused_tensors
from gwp_edge.export.sizes import NetworkSizes, network_sizes

if TYPE_CHECKING:
    import torch

__all__ = [
    "Accounting",
    "Checkpoint",
    "NetworkSizes",
    "TensorInfo",
    "account",
    "expected_tensors",
    "network_sizes",
    "open_checkpoint",
    "open_module",
    "unused_tensors",
]

logger = logging.getLogger(__name__)

_HASH_BLOCK_BYTES = 1 << 22


class Checkpoint:
    """Named tensors in files, read one at a time. Any thread may call ``load``.

    Attributes:
        path: what was opened, as given.
        config: config.json beside the weights, or None.
        is_ema: the tensors are a moving average of the trained ones.
        dropped: reason by name in the file, for tensors that are no part of the network.
    """

    def __init__(
        self, path: Path, located: Located, sources: list[Source], selection: Selection
    ) -> None:
        self.path = path
        config = located.folder / "config.json"
        self._config_path = config if config.is_file() else None
        self.config: dict[str, Any] | None = read_json(config) if self._config_path else None
        self.is_ema = selection.is_ema
        self.dropped = selection.dropped
        self._located = located
        self._sources = sources
        owners = {name: source for source in sources for name in source.infos()}
        self._homes = {
            clean: (owners[original], original) for clean, original in selection.originals.items()
        }
        self._infos = {
            clean: TensorInfo(
                name=clean,
                shape=source.infos()[original].shape,
                dtype=source.infos()[original].dtype,
            )
            for clean, (source, original) in self._homes.items()
        }

    def names(self) -> tuple[str, ...]:
        """Return the names of all tensors, prefixes removed, sorted."""
        return tuple(sorted(self._infos))

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        """Return shape and element type of a tensor without reading it.

        Raises:
            SpecError: there is no such tensor.
        """
        if name not in self._infos:
            raise SpecError(f"{self.path}: no tensor {name} in the checkpoint")
        return self._infos[name]

    def load(self, name: str) -> torch.Tensor:
        """Read one tensor, in its stored element type, into memory of its own.

        Raises:
            SpecError: there is no such tensor, or the file cannot be read any more.
        """
        self.info(name)
        source, original = self._homes[name]
        return source.load(original)

    def load_finite(self, name: str) -> torch.Tensor:
        """Read one tensor and check its values.

        Raises:
            SpecError: a value is NaN or infinite, or as in :meth:`load`.
        """
        import torch

        tensor = self.load(name)
        finite = torch.isfinite(tensor)
        if not bool(finite.all()):
            n = tensor.numel() - int(finite.sum())
            raise SpecError(
                f"{self.path}: {name} has {n} of {tensor.numel()} values that are NaN or "
                "infinite; the training run diverged or the file is damaged"
            )
        return tensor

    def source_hashes(self, progress: Callable[[int], None] | None = None) -> dict[str, str]:
        """Return the sha256 of every file that was read, by file name.

        Args:
            progress: called with the number of bytes hashed since the last call.
        """
        files = [*self._located.files, self._located.index, self._config_path]
        return {f.name: _sha256(f, progress) for f in files if f is not None}

    @property
    def source_bytes(self) -> int:
        """Size of the weight files, bytes."""
        return sum(f.stat().st_size for f in self._located.files)

    def close(self) -> None:
        """Release the files; tensors that were loaded stay valid."""
        for source in self._sources:
            source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_checkpoint(path: Path, *, use_ema: bool = False) -> Checkpoint:
    """Open a trained network.

    Args:
        path: a file, a diffusers folder, or a training folder that holds one.
        use_ema: take the moving average of the weights instead of the weights.

    Raises:
        SpecError: the path, a file or the names in it do not make one network.
    """
    path = Path(path)
    located = locate(path, use_ema=use_ema)
    folder_is_ema = is_named_ema(path, located)
    with ExitStack() as on_error:
        sources = _open_all(located, on_error)
        names = [name for source in sources for name in source.infos()]
        selection = _selected(path, names, use_ema=use_ema and not folder_is_ema)
        checkpoint = Checkpoint(path, located, sources, selection)
        on_error.pop_all()
    checkpoint.is_ema |= folder_is_ema
    if checkpoint.is_ema:
        logger.warning("%s: the EMA copy of the weights is used", path)
    return checkpoint


def open_module(path: Path) -> Checkpoint:
    """Open another module's folder (a VAE) with its names as they stand.

    Raises:
        SpecError: there are no weights, no config.json, or the files cannot be read.
    """
    path = Path(path)
    located = locate(path)
    if not (located.folder / "config.json").is_file():
        raise SpecError(f"{located.folder}: no config.json beside the weights")
    with ExitStack() as on_error:
        sources = _open_all(located, on_error)
        originals = {name: name for source in sources for name in source.infos()}
        selection = Selection(originals=originals, dropped={}, is_ema=False)
        module = Checkpoint(path, located, sources, selection)
        on_error.pop_all()
    return module


def _selected(path: Path, names: list[str], *, use_ema: bool) -> Selection:
    try:
        selection = select_names(names, use_ema=use_ema)
    except SpecError as e:
        raise SpecError(f"{path}: {e}") from e
    roots = {clean.partition(".")[0] for clean in selection.originals}
    if not {"blocks", "patch_embedding"} <= roots:
        shown = ", ".join(names[:4]) or "no tensors at all"
        raise SpecError(
            f"{path}: not a GigaWorld-Policy network, expected blocks.* and patch_embedding.*; "
            f"it holds {shown}"
        )
    return selection


def _open_all(located: Located, on_error: ExitStack) -> list[Source]:
    sources: list[Source] = []
    for file in located.files:
        source = open_source(file)
        on_error.callback(source.close)
        sources.append(source)
    _check_index(located, sources)
    return sources


def _check_index(located: Located, sources: list[Source]) -> None:
    """Check that the index and its shards say the same."""
    listed = located.shard_of
    if listed is None:
        return
    found: dict[str, str] = {}
    for source in sources:
        for name in source.infos():
            if name in found:
                raise SpecError(
                    f"{located.index}: {name} is both in {found[name]} and in {source.path.name}"
                )
            found[name] = source.path.name
    wrong = sorted(n for n in listed.keys() | found.keys() if listed.get(n) != found.get(n))
    if wrong:
        n = wrong[0]
        raise SpecError(
            f"{located.index}: {len(wrong)} tensors are not where it says, first {n}: "
            f"listed in {listed.get(n, 'no shard')}, found in {found.get(n, 'no shard')}"
        )


def _sha256(path: Path, progress: Callable[[int], None] | None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()
