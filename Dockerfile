# nanogauge on a CUDA GPU. The driver stays on the host, and the NVIDIA Container Toolkit hands it in:
#   docker build -t nanogauge .
#   docker run --gpus all --ipc=host --user "$(id -u):$(id -g)" -v "$PWD:/work" nanogauge \
#       nanogauge-train configs/rtx4070_fineweb.toml
FROM python:3.12-slim-bookworm

# torch.compile makes C++ at run time, for the processor and around Triton's kernels.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/nanogauge
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY *.py ./
COPY nanogauge ./nanogauge
COPY trainer ./trainer
COPY configs ./configs
COPY examples ./examples
COPY predictions ./predictions
# The index's torch for Linux is the one for CUDA, its libraries included.
RUN pip install --no-cache-dir --constraint constraints.txt .

# Whoever runs it owns what it writes: caches lie where every user may write.
ENV HOME=/tmp \
    XDG_DATA_HOME=/work/.nanogauge \
    PYTHONUNBUFFERED=1
# nobody; by number, which is known without the image's list of users
USER 65534
WORKDIR /work
CMD ["nanogauge-plan", "--help"]
