"""Sources of raw images, one module each, behind the protocol of `base.Source`."""

from __future__ import annotations

from data_tools.sources.base import Source
from data_tools.sources.cifar import open_cifar
from data_tools.sources.digits import open_digits
from data_tools.sources.folder import FolderSource
from data_tools.sources.idx import open_idx
from data_tools.sources.imagenet import ImageNetSource
from data_tools.sources.npz import open_npz
from data_tools.sources.parquet import ParquetSource
from data_tools.sources.webdataset import WebDatasetSource
from trainer.errors import ConfigError

SOURCES = ("digits", "idx", "cifar10", "cifar100", "folder", "npz", "webdataset", "imagenet", "parquet")


def open_source(source: str, path: str, name: str, class_list: list[str] | None) -> Source:
    """The source by its name. Raises UserError where it is unknown, or its files are missing or damaged."""
    if source == "digits":
        return open_digits()
    if source == "idx":
        return open_idx(path, name)
    if source in ("cifar10", "cifar100"):
        return open_cifar(path, int(source.removeprefix("cifar")))
    if source == "folder":
        return FolderSource(path, class_list)
    if source == "npz":
        return open_npz(path)
    if source == "webdataset":
        return WebDatasetSource(path)
    if source == "imagenet":
        return ImageNetSource(path, class_list)
    if source == "parquet":
        return ParquetSource(path, class_list)
    raise ConfigError(f"data.source={source}: must be one of {', '.join(SOURCES)}")
