"""Source files in order, and the units they are divided into.

A unit is what a worker tokenizes at a time: consecutive row groups of a Parquet file, a byte range of a file of JSON
lines, or a whole text or compressed file. Units depend only on the files and unit_bytes, so the shards do not depend on
the number of workers.
"""

import ast
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogauge.errors import BadInput, RunFailed
from nanogauge.files import open_regular
from nanogauge.shell import tool_command
from trainer.data.documents import COMPRESSIONS, FORMATS, Unit, format_of, read_documents
from trainer.data.hub import HUB, fetch_file, first_line, refuse_unwritable_cache, silence_client, with_retries
from trainer.data.manifest import Position, SourceFile
from trainer.data.tokenizer import HUB_NAME, without_surrogates

LOCAL_UNIT_BYTES = 2**19
REMOTE_UNIT_BYTES = 2**23
_SUFFIXES = tuple(form + packed for form in FORMATS for packed in ("", *COMPRESSIONS))
_PACKED = (".parquet", *COMPRESSIONS)
_PACKED_RATIO = 4  # bytes of text per byte of a compressed file, about
_HASHED_BLOCKS, _HASHED_BLOCK_BYTES = 64, 2**20


@dataclass(frozen=True)
class LocatedFile:
    source: SourceFile
    path: str
    """Local path, or hf:// URL."""


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

    @property
    def text_bytes(self) -> int:
        """Bytes of text, about: the sizes of the files, compressed ones multiplied."""
        return sum((_PACKED_RATIO if path.name.endswith(_PACKED) else 1) * path.stat().st_size for path in self._paths)

    def check(self, known: Sequence[SourceFile]) -> None:
        """Raise BadInput unless the source begins with the files that earlier runs read."""
        if [file.name for file in known] != self.names[: len(known)]:
            raise BadInput(
                f"{self.dataset} has other files than those that these shards were made of, which "
                "stay as they are; give the same source, or another --out."
            )
        for index, file in enumerate(known):
            if not _is_same(file, self.locate(index).source):
                raise BadInput(
                    f"{file.name} has changed: it is not the file that these shards were made of, "
                    "which stay as they are; bring it back, or give another --out for the new text."
                )

    def characters(self, column: str) -> str:
        """Return the characters of all documents, sorted."""
        found: set[str] = set()
        for index in range(len(self._paths)):
            for unit in _units_of(self.locate(index), index, column, self.unit_bytes):
                for text in read_documents(unit, column):
                    found.update(without_surrogates(text))
        return "".join(sorted(found))

    def locate(self, index: int) -> LocatedFile:
        """Return the location of a file; raise BadInput if it does not exist."""
        path = self._paths[index]
        try:
            size = path.stat().st_size
        except OSError as error:
            raise BadInput(f"cannot read {path}: {error.strerror}.") from None
        source = SourceFile(name=self.names[index], bytes=size, sha256=hash_file(path))
        return LocatedFile(source, str(path))


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file; above 64 MiB, of 64 evenly spread MiB and the size."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        room = size - _HASHED_BLOCKS * _HASHED_BLOCK_BYTES
        if room <= 0:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for block in range(_HASHED_BLOCKS):
            file.seek(block * _HASHED_BLOCK_BYTES + room * block // (_HASHED_BLOCKS - 1))
            digest.update(file.read(_HASHED_BLOCK_BYTES))
    return digest.hexdigest()


def _is_same(known: SourceFile, now: SourceFile) -> bool:
    hashes = {known.sha256, now.sha256} - {None}  # older manifests have none of local files
    return (known.name, known.bytes) == (now.name, now.bytes) and len(hashes) < 2


def _is_text(path: Path) -> bool:
    return path.name.endswith(_SUFFIXES) and not path.name.startswith((".", "_")) and path.is_file()


_HUB_URL = re.compile(r"hf://datasets/([^/@]+/[^/@]+)@([^/]+)/(.+)")


class HubSource:
    """The training files of a dataset on the hub; Parquet files are read by byte ranges."""

    def __init__(self, dataset: str, urls: Sequence[str]) -> None:
        """`urls` are hf://datasets/OWNER/NAME@COMMIT/PATH; one that moved has a new name there."""
        parts = [_HUB_URL.fullmatch(url) for url in urls]
        places = {part and part.group(1, 2) for part in parts}
        if len(places) != 1 or None in places:
            raise BadInput(f"{dataset} lists files outside of itself, which is not supported.")
        self.dataset, self.revision = next(place for place in places if place)
        self.names = [part[3] for part in parts if part]
        for name in self.names:
            format_of(name)
        self._whole = not all(name.endswith(".parquet") for name in self.names)
        self.unit_bytes = LOCAL_UNIT_BYTES if self._whole else REMOTE_UNIT_BYTES

    def locate(self, index: int) -> LocatedFile:
        """Return the location of a file, after downloading it if it is needed as a whole.

        Raises:
            BadInput: if it does not exist.
            RunFailed: if it cannot be fetched.
        """
        from huggingface_hub import HfApi

        name = self.names[index]
        listed = with_retries(
            self.dataset,
            lambda: HfApi().get_paths_info(self.dataset, [name], revision=self.revision, repo_type="dataset"),
            f"the hub refuses {self.dataset}",
        )
        if not listed:
            raise BadInput(f"{self.dataset} no longer has the file {name}.")
        info: Any = listed[0]
        sha256 = info.lfs.sha256 if info.lfs is not None else None
        source = SourceFile(name=name, bytes=info.size, sha256=sha256)
        if self._whole:
            return LocatedFile(source, str(fetch_file(self.dataset, name, self.revision, sha256)))
        return LocatedFile(source, f"{HUB}datasets/{self.dataset}@{self.revision}/{name}")


TextSource = LocalSource | HubSource
LocatedUnit = tuple[Unit, tuple[SourceFile, ...]]
"""A unit, and the source files up to its own."""


def is_local(dataset: str) -> bool:
    """Return whether a dataset is a local file or folder; False for a name on the hub.

    Raises:
        BadInput: for a name that is neither: the hub is not asked for it.
    """
    if Path(dataset).exists():
        return True
    owner, _, name = dataset.partition("/")
    on_hub = HUB_NAME.fullmatch(dataset) and name and not dataset.lower().endswith(_SUFFIXES)
    if not on_hub or Path(owner).is_dir():
        hint = "" if on_hub else ", and a dataset on the hub is OWNER/NAME"
        raise BadInput(f"there is no file or folder {dataset} here{hint}; check --dataset.")
    return False


def read_characters(dataset: str, column: str) -> str:
    """Return the characters of a local text, sorted; raise BadInput for a dataset on the hub."""
    if not is_local(dataset):
        raise BadInput("--tokenizer chars needs local files, as it reads all of them first.")
    return LocalSource(dataset).characters(column)


def open_text_source(dataset: str, config: str | None, revision: str | None = None) -> TextSource:
    """Open a local file or folder, or a dataset on the hub.

    Args:
        dataset: a path, or a repository on the hub.
        config: configuration of the dataset on the hub; None for its default.
        revision: commit or branch of the dataset; None for its newest commit.

    Raises:
        BadInput: if the dataset or the configuration does not exist.
        RunFailed: if the hub cannot be reached.
    """
    if is_local(dataset):
        if config is not None:
            raise BadInput("--name is for a dataset on the hub; give the folder of its files.")
        return LocalSource(dataset)
    silence_client()
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise BadInput("HF_HUB_OFFLINE is set: give the folder of the files as --dataset.")
    refuse_unwritable_cache(constants.HF_HUB_CACHE, "HF_HOME")
    return HubSource(dataset, _list_training_files(dataset, config, revision))


def _list_training_files(dataset: str, config: str | None, revision: str | None) -> list[str]:
    """Return the training files of a configuration as `datasets` lists them."""
    import datasets  # type: ignore[import-untyped,unused-ignore]

    def request() -> list[str]:
        try:
            builder = datasets.load_dataset_builder(dataset, name=config, revision=revision)
        except (FileNotFoundError, ValueError, RuntimeError) as error:
            raise BadInput(_why_not_open(dataset, config, error)) from None
        splits = builder.config.data_files or {}
        if not splits.get("train"):
            raise BadInput(
                f"the dataset {dataset} {config or ''} has no train split, only "
                f"{', '.join(map(str, splits)) or 'files that are no texts'}; download the files "
                "of one, and give their folder as --dataset."
            )
        return [str(file) for file in splits["train"]]

    try:
        return with_retries(dataset, request, f"the hub refuses {dataset}; is HF_TOKEN needed?")
    except RunFailed as error:
        raise RunFailed(
            f"cannot reach the dataset {dataset} ({error}); nothing was written: "
            "check the network, then run the same command again."
        ) from error


def _why_not_open(dataset: str, config: str | None, error: Exception) -> str:
    """Return a sentence that says why `datasets` cannot open a dataset, and what to do."""
    text = str(error)
    if "gated" in text:
        return (
            f"{dataset} is a gated dataset: accept the conditions on its page of the hub, then run "
            f"`{tool_command('hf', 'auth', 'login')}`, or set HF_TOKEN to a token of that account."
        )
    listed = re.search(r"available configs: (\[.*?\])", text, re.DOTALL)
    if config is None and listed is not None:
        names = ast.literal_eval(listed[1])
        shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if names[20:] else "")
        return f"{dataset} has several configurations; give one of them with --name: {shown}."
    return (
        f"cannot open the dataset {dataset} {config or ''}: {first_line(error)}; "
        "give --dataset and --name as the hub lists them."
    )


def units_from(
    source: TextSource, start: Position, known: Sequence[SourceFile], unit_bytes: int, column: str
) -> Iterator[LocatedUnit]:
    """Yield the units from a position on, each with the source files up to its own.

    A file is located when its first unit is asked for. `known` are the files that earlier runs read.

    Raises:
        BadInput: if a file is missing or unreadable.
        RunFailed: if a file cannot be fetched.
    """
    files = tuple(known[: start.file])
    for index in range(start.file, len(source.names)):
        located = source.locate(index)
        files += (located.source,)
        units = _units_of(located, index, column, unit_bytes)
        for unit in units[start.unit if index == start.file else 0 :]:
            yield unit, files


def _units_of(located: LocatedFile, index: int, column: str, unit_bytes: int) -> list[Unit]:
    """Return the units of a file; raises as `units_from`."""
    name = located.source.name
    ranges = (
        with_retries(name, lambda: _divide(located, column, unit_bytes), f"the hub refuses {name}")
        if located.path.startswith(HUB)
        else _divide(located, column, unit_bytes)
    )
    return [Unit(index, number, name, located.path, *each) for number, each in enumerate(ranges)]


def _divide(located: LocatedFile, column: str, unit_bytes: int) -> list[tuple[int, int, int]]:
    """Divide a file into units; return begin, end and approximate bytes of text of each."""
    source = located.source
    form, compression = format_of(source.name)
    if form == "parquet":
        from trainer.data.parquet import open_parquet, split_row_groups

        return split_row_groups(open_parquet(located.path, source.name), column, source.name, unit_bytes)
    if form == "text" or compression is not None:
        return [(0, source.bytes, source.bytes)]
    begins = range(0, source.bytes, unit_bytes)
    return [(at, min(at + unit_bytes, source.bytes), unit_bytes) for at in begins]
