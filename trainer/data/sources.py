"""The source's files in their order, and the units of work that they are taken apart into.

A unit is a run of row groups of a Parquet file, a range of bytes of a file of JSON lines, or a
whole file of text or a compressed one. Units depend on the files and on unit_bytes alone, never on
who reads them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nanogauge.errors import BadInput, RunFailed
from trainer.data.documents import Damaged, Unit, kind_of
from trainer.data.hub import (
    Interrupted,
    client_errors,
    fetch_file,
    interrupted,
    list_files,
    patiently,
    quiet,
    short,
)
from trainer.data.manifest import Position, SourceFile

LOCAL_UNIT_BYTES = 2**19
REMOTE_UNIT_BYTES = 2**23
_TEXT_COLUMN_KINDS = (".parquet", ".jsonl", ".ndjson", ".json", ".txt")
_SUFFIXES = tuple(kind + packed for kind in _TEXT_COLUMN_KINDS for packed in ("", ".gz", ".zst"))


@dataclass(frozen=True)
class Located:
    source: SourceFile
    path: str
    """where it is: a local path, or an address"""
    remote: bool


class Inputs(Protocol):
    """Files of texts, in order."""

    dataset: str
    config: str
    unit_bytes: int

    @property
    def revision(self) -> str | None: ...

    @property
    def names(self) -> Sequence[str]: ...

    def locate(self, index: int) -> Located:
        """Where a file is, fetched if it has to be as a whole.

        Raises:
            BadInput: if it is not there.
            RunFailed: if it cannot be fetched.
        """


class LocalInputs:
    """A file, or all files of texts below a folder, by name."""

    config = "local"
    revision: str | None = None
    unit_bytes = LOCAL_UNIT_BYTES

    def __init__(self, dataset: str, paths: Sequence[Path] | None = None) -> None:
        """Files below the folder `dataset`, those of `paths` if given.

        Raises:
            BadInput: if there are none.
        """
        self.dataset = dataset
        root = Path(dataset)
        self._root = root if root.is_dir() else root.parent
        if paths is None:
            paths = sorted(p for p in root.rglob("*") if _is_text(p)) if root.is_dir() else [root]
        if not paths:
            raise BadInput(
                f"{dataset} holds no files of texts; they end in {', '.join(_TEXT_COLUMN_KINDS)}, "
                "and but for .parquet may have .gz or .zst behind."
            )
        self._paths = paths
        self.names = [os.path.relpath(path, self._root) for path in paths]
        for name in self.names:
            kind_of(name)

    def locate(self, index: int) -> Located:
        path = self._paths[index]
        try:
            size = path.stat().st_size
        except OSError as error:
            raise BadInput(f"cannot read {path}: {error.strerror}.") from None
        return Located(SourceFile(name=self.names[index], bytes=size), str(path), remote=False)


def _is_text(path: Path) -> bool:
    return path.name.endswith(_SUFFIXES) and not path.name.startswith((".", "_")) and path.is_file()


class HubInputs:
    """The training files of a dataset on the hub. Of Parquet files only what is read is fetched."""

    def __init__(self, dataset: str, config: str, addresses: Sequence[str], whole: bool) -> None:
        """`addresses` are hf://datasets/OWNER/NAME@COMMIT/PATH; `whole` fetches whole files."""
        self.dataset, self.config = dataset, config
        start = f"hf://datasets/{dataset}@"
        if not all(address.startswith(start) for address in addresses):
            raise BadInput(f"{dataset} lists files outside of itself, which is not supported.")
        parts = [address.removeprefix(start).partition("/") for address in addresses]
        self.revision: str = parts[0][0]
        self.names = [path for _, _, path in parts]
        for name in self.names:
            kind_of(name)
        self._whole = whole or not all(name.endswith(".parquet") for name in self.names)
        self.unit_bytes = LOCAL_UNIT_BYTES if self._whole else REMOTE_UNIT_BYTES

    def locate(self, index: int) -> Located:
        from huggingface_hub import hf_hub_url

        name = self.names[index]
        told = next(list_files(self.dataset, [name], self.revision), None)
        if told is None:
            raise BadInput(f"{self.dataset} has no file {name} any more.")
        sha256 = told.lfs.sha256 if told.lfs is not None else None
        source = SourceFile(name=name, bytes=told.size, sha256=sha256)
        if self._whole:
            path = fetch_file(self.dataset, name, self.revision, sha256)
            return Located(source, str(path), remote=False)
        address = hf_hub_url(self.dataset, name, repo_type="dataset", revision=self.revision)
        return Located(source, address, remote=True)


def open_inputs(
    dataset: str, config: str | None, revision: str | None = None, whole: bool = False
) -> Inputs:
    """The files of a local file or folder, or of a dataset on the hub.

    Args:
        dataset: a path, or the name of a repository on the hub.
        config: configuration of the dataset; None for its default, or for all local files.
        revision: commit or branch of the dataset; None for its newest commit.
        whole: whether to fetch whole files, checked by their sha256, into the client's cache.

    Raises:
        BadInput: if there is no such dataset or configuration.
        RunFailed: if the hub cannot be reached.
    """
    if Path(dataset).exists():
        return LocalInputs(dataset, None if config is None else _of_card(Path(dataset), config))
    quiet()
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _cached(dataset, config, revision)
    config_name, addresses = _listed(dataset, config, revision)
    return HubInputs(dataset, config_name, addresses, whole)


def _cached(dataset: str, config: str | None, revision: str | None) -> Inputs:
    """What the hub's client holds of a dataset, without a connection."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                dataset, repo_type="dataset", revision=revision, local_files_only=True
            )
        )
    except client_errors():
        raise BadInput(
            f"HF_HUB_OFFLINE is set, and the client's cache holds nothing of {dataset}; "
            "unset it, or fetch the files first."
        ) from None
    inputs = LocalInputs(str(folder), None if config is None else _of_card(folder, config))
    inputs.dataset, inputs.revision = dataset, folder.name
    return inputs


def _of_card(folder: Path, config: str) -> list[Path]:
    """The training files of a configuration, as the card of a dataset in a folder lists them.

    Raises:
        BadInput: if it lists no such configuration, or none of its files are there.
    """
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    configs = (metadata_load(card) or {}).get("configs", []) if card.is_file() else []
    listed = {each["config_name"]: each.get("data_files", []) for each in configs}
    if config not in listed:
        raise BadInput(
            f"the card of {folder} lists no configuration {config!r}, only "
            f"{', '.join(listed) or 'none'}; give --name as it lists them, or none."
        )
    splits = listed[config]
    if not isinstance(splits, list) or not all(isinstance(each, dict) for each in splits):
        splits = [{"split": "train", "path": splits}]
    patterns: str | list[str] = next(
        (each["path"] for each in splits if each["split"] == "train"), []
    )
    if isinstance(patterns, str):
        patterns = [patterns]
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    if not paths:
        raise BadInput(f"{folder} holds none of the training files that {config} lists.")
    return paths


def _listed(dataset: str, config: str | None, revision: str | None) -> tuple[str, list[str]]:
    """The name of the configuration, and its training files as `datasets` lists them."""
    import datasets  # type: ignore[import-untyped,unused-ignore]

    def ask() -> tuple[str, list[str]]:
        try:
            builder = datasets.load_dataset_builder(dataset, name=config, revision=revision)
        except (FileNotFoundError, ValueError, RuntimeError) as error:
            raise BadInput(
                f"cannot open the dataset {dataset} {config or ''}: {short(error)}; "
                "give --dataset and --name as the hub lists them."
            ) from None
        except client_errors() as error:
            raise interrupted(error) or BadInput(
                f"the hub refuses {dataset} ({short(error)}); is HF_TOKEN needed?"
            ) from None
        files = (builder.config.data_files or {}).get("train")
        if not files:
            raise BadInput(f"the dataset {dataset} {config or ''} has no files of a train split.")
        return builder.config.name, [str(file) for file in files]

    try:
        return patiently(dataset, ask)
    except RunFailed as error:
        raise RunFailed(
            f"cannot reach the dataset {dataset} ({error}); nothing was written: "
            "check the network, then run the same command again."
        ) from error


class Planner:
    """Gives the units in order, from a position on.

    The next file is located, and fetched if it has to be, while the units of one are done.
    """

    def __init__(
        self,
        inputs: Inputs,
        start: Position,
        known: tuple[SourceFile, ...],
        unit_bytes: int,
        column: str,
    ) -> None:
        """`known`: files of an earlier call up to the start, which must be the same still.

        Raises:
            BadInput: if other files are there by now.
        """
        self._inputs, self._column, self._unit_bytes = inputs, column, unit_bytes
        if [file.name for file in known] != list(inputs.names[: len(known)]):
            raise BadInput(
                f"{inputs.dataset} has other files than when this preparation began; "
                "give the same source, or another --out."
            )
        self.files = list(known[: start.file])
        """files up to the one whose units are given now"""
        self._known = known
        self._units: list[Unit] = []
        self._skip = start.unit
        self._next: Future[tuple[SourceFile, list[Unit]]] | None = None

    @property
    def exhausted(self) -> bool:
        """Whether all units have been given."""
        return not self._units and len(self.files) == len(self._inputs.names)

    def poll(self, wanted_bytes: float) -> Unit | None:
        """The next unit; None if there is none, or its file has not been fetched yet.

        Args:
            wanted_bytes: text that is still needed; no file is fetched beyond that.

        Raises:
            BadInput: if a file is not there, cannot be read, or is not the one it was.
            RunFailed: if a file cannot be fetched.
        """
        while not self._units and self._next is not None and self._next.done():
            source, units = self._next.result()
            self._next = None
            place = len(self.files)
            if place < len(self._known) and self._known[place] != source:
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
            and len(self.files) < len(self._inputs.names)
            and sum(unit.text_bytes for unit in self._units) < wanted_bytes
        ):
            self._look_ahead(len(self.files))
        return unit

    def _look_ahead(self, place: int) -> None:
        """Locate a file aside: in a thread that does not keep the program from ending."""
        future: Future[tuple[SourceFile, list[Unit]]] = Future()

        def locate() -> None:
            try:
                future.set_result(self._locate(place))
            except BaseException as error:
                future.set_exception(error)

        self._next = future
        threading.Thread(target=locate, daemon=True).start()

    def _locate(self, place: int) -> tuple[SourceFile, list[Unit]]:
        located = self._inputs.locate(place)
        source = located.source

        def cut() -> list[tuple[int, int, int]]:
            try:
                return _cut(located, self._column, self._unit_bytes)
            except Damaged as error:
                if located.remote:
                    raise Interrupted(str(error)) from None
                raise

        units = [
            Unit(place, number, source.name, located.path, source.bytes, located.remote, *unit)
            for number, unit in enumerate(patiently(source.name, cut))
        ]
        return source, units


def _cut(located: Located, column: str, unit_bytes: int) -> list[tuple[int, int, int]]:
    """The units of a file: where each begins and ends, and its bytes of text."""
    source = located.source
    kind, compression = kind_of(source.name)
    if kind == "parquet":
        from trainer.data.documents import open_local, read_remote_footer, row_groups

        opened = (
            read_remote_footer(located.path, source.name, source.bytes)
            if located.remote
            else open_local(located.path)
        )
        return row_groups(opened, column, source.name, unit_bytes)
    if kind == "text" or compression is not None:
        return [(0, source.bytes, source.bytes)]
    begins = range(0, source.bytes, unit_bytes)
    return [(at, min(at + unit_bytes, source.bytes), unit_bytes) for at in begins]
