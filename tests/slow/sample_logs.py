"""A short log of each form that report.py imports, by its flag."""

from __future__ import annotations

LOG_STEPS = 50


def _nanogpt_log() -> str:
    lines = []
    for step in range(0, LOG_STEPS + 1, 10):
        if step % 50 == 0:
            lines.append(f"step {step}: train loss {9 - step / 20:.4f}, val loss 9.1000")
        lines.append(f"iter {step}: loss {9 - step / 20:.4f}, time 3900.00ms, mfu 12.50%")
    return "\n".join(lines) + "\n"


def _nanochat_log() -> str:
    lines = ["Vocab size: 65,536"]
    for step in range(LOG_STEPS):
        if step % 20 == 0:
            lines.append(f"Step {step:05d} | Validation bpb: {2 - step / 100:.4f}")
        lines.append(
            f"step {step:05d}/{LOG_STEPS:05d} ({2 * step:.2f}%) | loss: {9 - step / 20:.6f} | "
            f"lrm: 1.00 | dt: 1500.00ms | tok/sec: 349,525 | bf16_mfu: 41.20 | epoch: 1 pq: 9 "
            f"rg: 772 | total time: {max(step - 10, 0) / 40:.2f}m | eta: 3.1m"
        )
    return "\n".join([*lines, "Peak memory usage: 9436.49MiB", "Total training time: 1.23m", ""])


def _build_nanogpt_log() -> str:
    lines = []
    for step in range(LOG_STEPS):
        if step % 25 == 0:
            lines.append(f"validation loss: {9 - step / 20:.4f}")
        lines.append(
            f"step {step:5d} | loss: {9 - step / 20:.6f} | lr 6.0000e-04 | norm: 1.2345 | "
            "dt: 2000.00ms | tok/sec: 262144.00"
        )
    return "\n".join(lines) + "\n"


def _wandb_history() -> str:
    lines = ["_step,_runtime,_timestamp,iter,train/loss,val/loss,lr,mfu"]
    lines += [
        f"{n},{30 + 101 * n},{1.7e9 + 101 * n},{25 * n},{9 - n},{9.5 - n},0.001,12.5"
        for n in range(3)
    ]
    return "\n".join(lines) + "\n"


LOGS = {
    "--nanogpt-log": _nanogpt_log(),
    "--nanochat-log": _nanochat_log(),
    "--build-nanogpt-log": _build_nanogpt_log(),
    "--wandb-history": _wandb_history(),
}
