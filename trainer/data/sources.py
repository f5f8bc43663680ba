"""Source files in order, and the units they are divided into.

A unit is what a worker tokenizes at a time: consecutive row groups of a Parquet file, a byte range
of a file of JSON lines, or a whole text or compressed file. Units depend only on the files and
unit_bytes, so the shards do not depend on the number of workers.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from nanogauge.errors import BadInput, RunFailed
from trainer.data.documents import COMPRESSIONS, FORMATS, Damaged, Unit, format_of
from trainer.data.hub import (
    Interrupted,
    as_interrupted,
    client_errors,
    fetch_file,
    file_info,
    first_line,
    silence_client,
    with_retries,
)
from trainer.data.manifest import Position, SourceFile

LOCAL_UNIT_BYTES = 2**19
REMOTE_UNIT_BYTES = 2**23
_SUFFIXES = tuple(form + packed for form in FORMATS for packed in ("", *COMPRESSIONS))


@dataclass(frozen=True)
class LocatedFile:
    source: SourceFile
    path: str
    """Local path, or URL."""
    remote: bool


class LocalSource:
    """A file, or all text files below a folder sorted by name."""

    revision: str | None = None
    unit_bytes = LOCAL_UNIT_BYTES

    def __init__(self, dataset: str) -> None:
        """Raise BadInput if there are no files, or one has no supported format."""
        self.dataset = dataset
        root = Path(dataset)
        folder = root if root.is_dir() else root.parent
        self._paths = sorted(filter(_is_text, root.rglob("*"))) if root.is_dir() else [root]
        if not self._paths:
            raise BadInput(f"{dataset} holds no text files ({', '.join(FORMATS)}).")
        self.names = [os.path.relpath(path, folder) for path in self._paths]
        for name in self.names:
            format_of(name)

    def locate(self, index: int) -> LocatedFile:
        """Return the location of a file; raise BadInput if it does not exist."""
        path = self._paths[index]
        try:
            size = path.stat().st_size
        except OSError as error:
            raise BadInput(f"cannot read {path}: {error.strerror}.") from None
        return LocatedFile(SourceFile(name=self.names[index], bytes=size), str(path), remote=False)


def _is_text(path: Path) -> bool:
    return path.name.endswith(_SUFFIXES) and not path.name.startswith((".", "_")) and path.is_file()


class HubSource:
    """The training files of a dataset on the hub; Parquet files are read by byte ranges."""

    def __init__(self, dataset: str, urls: Sequence[str], whole: bool) -> None:
        """`urls` are hf://datasets/OWNER/NAME@COMMIT/PATH; `whole` downloads whole files."""
        self.dataset = dataset
        start = f"hf://datasets/{dataset}@"
        if not all(url.startswith(start) for url in urls):
            raise BadInput(f"{dataset} lists files outside of itself, which is not supported.")
        parts = [url.removeprefix(start).partition("/") for url in urls]
        self.revision: str = parts[0][0]
        self.names = [path for _, _, path in parts]
        for name in self.names:
            format_of(name)
        self._whole = whole or not all(name.endswith(".parquet") for name in self.names)
        self.unit_bytes = LOCAL_UNIT_BYTES if self._whole else REMOTE_UNIT_BYTES

    def locate(self, index: int) -> LocatedFile:
        """Return the location of a file, after downloading it if it is needed as a whole.

        Raises:
            BadInput: if it does not exist.
            RunFailed: if it cannot be fetched.
        """
        from huggingface_hub import hf_hub_url

        name = self.names[index]
        info = file_info(self.dataset, name, self.revision)
        if info is None:
            raise BadInput(f"{self.dataset} no longer has the file {name}.")
        sha256 = info.lfs.sha256 if info.lfs is not None else None
        source = SourceFile(name=name, bytes=info.size, sha256=sha256)
        if self._whole:
            path = fetch_file(self.dataset, name, self.revision, sha256)
            return LocatedFile(source, str(path), remote=False)
        url = hf_hub_url(self.dataset, name, repo_type="dataset", revision=self.revision)
        return LocatedFile(source, url, remote=True)


TextSource = LocalSource | HubSource


def open_text_source(
    dataset: str, config: str | None, revision: str | None = None, whole: bool = False
) -> TextSource:
    """Open a local file or folder, or a dataset on the hub.

    Args:
        dataset: a path, or a repository on the hub.
        config: configuration of the dataset on the hub; None for its default.
        revision: commit or branch of the dataset; None for its newest commit.
        whole: download whole files into the client's cache and check their sha256.

    Raises:
        BadInput: if the dataset or the configuration does not exist.
        RunFailed: if the hub cannot be reached.
    """
    if Path(dataset).exists():
        if config is not None:
            raise BadInput("--name is for a dataset on the hub; give the folder of its files.")
        return LocalSource(dataset)
    silence_client()
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise BadInput("HF_HUB_OFFLINE is set: give the folder of the files as --dataset.")
    return HubSource(dataset, _list_training_files(dataset, config, revision), whole)


def _list_training_files(dataset: str, config: str | None, revision: str | None) -> list[str]:
    """Return the training files of a configuration as `datasets` lists them."""
    import datasets  # type: ignore[import-untyped,unused-ignore]

    def request() -> list[str]:
        try:
            builder = datasets.load_dataset_builder(dataset, name=config, revision=revision)
        except (FileNotFoundError, ValueError, RuntimeError) as error:
            raise BadInput(
                f"cannot open the dataset {dataset} {config or ''}: {first_line(error)}; "
                "give --dataset and --name as the hub lists them."
            ) from None
        except client_errors() as error:
            raise as_interrupted(error) or BadInput(
                f"the hub refuses {dataset} ({first_line(error)}); is HF_TOKEN needed?"
            ) from None
        files = (builder.config.data_files or {}).get("train")
        if not files:
            raise BadInput(f"the dataset {dataset} {config or ''} has no files of a train split.")
        return [str(file) for file in files]

    try:
        return with_retries(dataset, request)
    except RunFailed as error:
        raise RunFailed(
            f"cannot reach the dataset {dataset} ({error}); nothing was written: "
            "check the network, then run the same command again."
        ) from error


class UnitQueue:
    """Returns units in order from a start position, and locates the next file in a thread."""

    def __init__(
        self,
        source: TextSource,
        start: Position,
        known: tuple[SourceFile, ...],
        unit_bytes: int,
        column: str,
    ) -> None:
        """Start at `start`; raise BadInput if `known`, the files read by earlier runs, changed."""
        self._source, self._column, self._unit_bytes = source, column, unit_bytes
        if [file.name for file in known] != list(source.names[: len(known)]):
            raise BadInput(
                f"{source.dataset} has other files than when this preparation began; "
                "give the same source, or another --out."
            )
        self.files = list(known[: start.file])
        """Source files up to the one whose units are being returned."""
        self._known = known
        self._units: list[Unit] = []
        self._skip = start.unit
        self._next: Future[tuple[SourceFile, list[Unit]]] | None = None

    @property
    def exhausted(self) -> bool:
        return not self._units and len(self.files) == len(self._source.names)

    def poll(self, needed_bytes: float) -> Unit | None:
        """Return the next unit; None at the end, or while its file is being fetched.

        Args:
            needed_bytes: bytes of text still needed; no file beyond them is fetched.

        Raises:
            BadInput: if a file is missing, unreadable or has changed.
            RunFailed: if a file cannot be fetched.
        """
        while not self._units and self._next is not None and self._next.done():
            source, units = self._next.result()
            self._next = None
            index = len(self.files)
            if index < len(self._known) and self._known[index] != source:
                raise BadInput(
                    f"{source.name} is not the file that this preparation began with; "
                    "give the same source, or another --out."
                )
            self.files.append(source)
            self._units = units[self._skip :][::-1]
            self._skip = 0
        unit = self._units.pop() if self._units else None
        if (
            self._next is None
            and len(self.files) < len(self._source.names)
            and sum(unit.text_bytes for unit in self._units) < needed_bytes
        ):
            self._prefetch(len(self.files))
        return unit

    def _prefetch(self, index: int) -> None:
        """Start to locate a file in a daemon thread, which does not block the process's exit."""
        future: Future[tuple[SourceFile, list[Unit]]] = Future()

        def locate() -> None:
            try:
                future.set_result(self._units_of(index))
            except BaseException as error:
                future.set_exception(error)

        self._next = future
        threading.Thread(target=locate, daemon=True).start()

    def _units_of(self, index: int) -> tuple[SourceFile, list[Unit]]:
        located = self._source.locate(index)
        source = located.source

        def request() -> list[tuple[int, int, int]]:
            try:
                return _divide(located, self._column, self._unit_bytes)
            except Damaged as error:
                if located.remote:
                    raise Interrupted(str(error)) from None
                raise

        units = [
            Unit(index, number, source.name, located.path, source.bytes, located.remote, *unit)
            for number, unit in enumerate(with_retries(source.name, request))
        ]
        return source, units


def _divide(located: LocatedFile, column: str, unit_bytes: int) -> list[tuple[int, int, int]]:
    """Divide a file into units; return begin, end and approximate bytes of text of each."""
    source = located.source
    form, compression = format_of(source.name)
    if form == "parquet":
        from trainer.data.parquet import open_local, open_range_file, split_row_groups

        opened = (
            open_range_file(located.path, source.name, source.bytes)[1]
            if located.remote
            else open_local(located.path)
        )
        return split_row_groups(opened, column, source.name, unit_bytes)
    if form == "text" or compression is not None:
        return [(0, source.bytes, source.bytes)]
    begins = range(0, source.bytes, unit_bytes)
    return [(at, min(at + unit_bytes, source.bytes), unit_bytes) for at in begins]
