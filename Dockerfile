# Environment for train.py on a CUDA GPU. Mount the checkout; the NVIDIA Container Toolkit mounts the
# host's driver:
#   docker build -t nanogauge .
#   docker run --gpus all --ipc=host --user "$(id -u):$(id -g)" -v "$PWD:/work" nanogauge \
#       python train.py configs/rtx4070_fineweb.toml
FROM python:3.12-slim-bookworm

# torch.compile generates C++ at run time, for the CPU and around Triton's kernels.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/nanogauge
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY nanogauge ./nanogauge
# PyPI's torch for Linux is the CUDA build, with the CUDA libraries.
RUN pip install --no-cache-dir --constraint constraints.txt ".[train,wandb]"

# The container runs as the host's user: caches go to folders that any user can write.
ENV HOME=/tmp \
    XDG_DATA_HOME=/work/.nanogauge \
    PYTHONUNBUFFERED=1
# An unprivileged user
USER 65534
WORKDIR /work
CMD ["nanogauge", "--help"]
