"""The callbacks for transformers.Trainer and lightning report like the project's own loop."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import nanogauge as ng

STEPS = 30
EVALUATION_SECONDS = 0.5
torch.set_num_threads(1)


class Sequences(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(32) + index) % 64
        return {"input_ids": tokens, "labels": tokens}


def check(folder: Path, evaluations: int) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    assert (report["run"]["status"], report["run"]["steps_done"]) == ("finished", STEPS)
    lines = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(STEPS))
    evaluated = [line for line in lines if line["kind"] == "eval"]
    following = [line for line in steps if line["step"] in {e["step"] for e in evaluated}]
    assert min(line["step_seconds"] for line in following) < EVALUATION_SECONDS
    assert len(evaluated) == evaluations
    assert all(line["seconds"] > EVALUATION_SECONDS and 3 < line["val_loss"] < 5 for line in evaluated)
    return report


def test_a_transformers_trainer_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    from nanogauge.integrations.transformers import NanogaugeCallback

    class SlowToEvaluate(Trainer):
        def evaluation_loop(self, *args: Any, **settings: Any) -> Any:
            time.sleep(EVALUATION_SECONDS)
            return super().evaluation_loop(*args, **settings)

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    model = LlamaForCausalLM(config)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=10,
        save_steps=15,
        logging_steps=10,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = SlowToEvaluate(
        model=model,
        args=arguments,
        train_dataset=Sequences(256),
        eval_dataset=Sequences(8),
        callbacks=[NanogaugeCallback("trainer", folder=tmp_path)],
    )
    trainer.train()
    rows = {row["id"]: row for row in check(tmp_path / "trainer", evaluations=3)["rows"]}
    assert rows["tokens_per_step"]["measured"]["value"] == 4 * 2 * 32
    assert rows["parameters_total"]["analytic"]["expected"] == sum(p.numel() for p in model.parameters())


def test_a_lightning_trainer_is_measured(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    from nanogauge.integrations.lightning import LightningCallback

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(64, 32)
            self.head = torch.nn.Linear(32, 64)

        def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            logits = self.head(self.embed(batch["input_ids"]))
            return torch.nn.functional.cross_entropy(logits.mT, batch["labels"])

        def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
            if index == 0:
                time.sleep(EVALUATION_SECONDS)
            self.log("val_loss", self.training_step(batch))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-5)

    sizes = {"n_layer": 1, "n_embd": 32, "n_head": 2, "context": 32, "vocabulary": 64}
    spec = ng.RunSpec.gpt(**sizes, micro_batch=4, grad_accum=2, steps=STEPS, device="cpu")
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accumulate_grad_batches=2,
        val_check_interval=20,
        limit_val_batches=2,
        accelerator="cpu",
        **off,
        callbacks=[LightningCallback("lightning", spec, folder=tmp_path)],
    )
    loader = DataLoader(Sequences(256), batch_size=4)
    trainer.fit(Module(), loader, loader)
    check(tmp_path / "lightning", evaluations=3)
