"""Making damaged shards again from their source, and only those."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from nanogauge.errors import BadInput, RunFailed
from trainer.data.manifest import Manifest, Shard
from trainer.data.prepare import Order, crew_of, prepare
from trainer.data.resuming import EarlierOutput
from trainer.data.shards import read_manifest
from trainer.data.verify import damage_of

REPAIRED = ".repaired"


def repair(folder: Path, workers: int) -> int:
    """Make every damaged or missing shard again, just as it was; the exit status.

    Raises:
        BadInput: if there is no manifest, or it does not tell where its shards begin.
        RunFailed: if the source gives other tokens than it did; the shard stays as it is.
    """
    manifest = read_manifest(folder)
    damaged = [s for s in manifest.shards if damage_of(folder, s, manifest) is not None]
    for shard in damaged:
        print(f"making {shard.file} again", file=sys.stderr, flush=True)
        _make_again(folder, manifest, shard, workers)
    print(f"{len(damaged)} of {len(manifest.shards)} shards were made again in {folder}.")
    return 0


def _make_again(folder: Path, manifest: Manifest, shard: Shard, workers: int) -> None:
    settings = manifest.settings
    if settings is None or shard.begins is None:
        raise BadInput(
            f"{folder / 'manifest.json'} does not tell where in the source {shard.file} begins; "
            "repair the folder it was joined from, or delete it and fetch it again."
        )
    aside = folder / REPAIRED
    order = Order(
        out=aside,
        tokens=shard.tokens,
        val_tokens=0,
        shard_tokens=shard.tokens,
        dataset=manifest.dataset,
        config=None if manifest.dataset_config == "default" else manifest.dataset_config,
        workers=workers,
        text_column=settings.text_column,
        tokenizer=manifest.tokenizer,
        pattern=settings.pattern or "gpt2",
    )
    as_if = manifest.model_copy(
        update={
            "shards": (),
            "total_tokens": 0,
            "complete": False,
            "settings": settings.model_copy(update={"val_tokens": 0, "shard_tokens": shard.tokens}),
        }
    )
    try:
        earlier = EarlierOutput(aside, as_if, False, (), shard.begins)
        with crew_of(order) as crew:
            made = prepare(order, lambda _: None, crew, earlier)
        if [new.sha256 for new in made.shards] != [shard.sha256]:
            raise RunFailed(
                f"{manifest.dataset} gives other tokens for {shard.file} than it did; its files "
                "or the tokenizer have changed."
            )
        (aside / made.shards[0].file).replace(folder / shard.file)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
