"""The SLURM script of docs/scaling.md: the time limit reaches the ranks and requeues the job."""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest
from commands import ROOT

STAND_INS = {
    # srun's tasks, which end with 1 when they are asked to stop, as torchrun does
    "srun": 'echo $$ > pid; trap "sleep 0.2; echo saved > checkpoint; exit 1" TERM\n'
    "echo running > state; for _ in $(seq $TENTHS); do sleep 0.1; done; exit $STATUS",
    "scancel": 'echo "$@" >> scancelled; kill -TERM "$(cat pid)"',
    "scontrol": 'test "$1" = show && echo first || { test -e checkpoint && echo "$@" > requeued; }',
}


@pytest.mark.parametrize(
    ("tenths", "status", "in_time"),
    [(100, 0, False), (5, 0, True), (5, 3, True)],
    ids=["its time is up", "finished", "failed"],
)
def test_a_job_is_requeued_only_at_its_time_limit(tmp_path: Path, tenths: int, status: int, in_time: bool) -> None:
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    guide = (ROOT / "docs/scaling.md").read_text()
    (script,) = re.findall(r"```\n(#!/bin/bash\n.*?)```", guide, re.S)
    (tmp_path / "job").write_text(script)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    variables |= {"SLURM_NNODES": "1", "TENTHS": str(tenths), "STATUS": str(status)}
    job = subprocess.Popen(["bash", "job"], cwd=tmp_path, env={**os.environ, **variables})
    while not (tmp_path / "state").exists():
        assert job.poll() is None
        time.sleep(0.02)
    if not in_time:
        job.terminate()
    assert job.wait(20) == (status if in_time else 1)
    assert (tmp_path / "requeued").exists() is not in_time
    if not in_time:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"
        assert (tmp_path / "scancelled").read_text() == "--signal=TERM 7\n"
