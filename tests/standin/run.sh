#!/usr/bin/env bash
# run.sh [ARGUMENTS OF PYTHON]: run Python with the CUDA build of torch on the stand-in for a card.
# The environment (4.7 GB) and the stand-in are made first where they are missing or out of date;
# the exit status is 75 if the packages cannot be installed.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$here/../..
folder=${XDG_CACHE_HOME:-$HOME/.cache}/nanogauge/standin
venv=$folder/venv
lib=$folder/lib

install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
others="numpy nvidia-ml-py pydantic rich jinja2 platformdirs tiktoken safetensors pytest pytest-xdist
  hypothesis"
torch=$(sed -n 's/^torch==//p' "$root/constraints.txt")
stamp="torch $torch $others"
if [ "$(cat "$venv/made" 2>/dev/null)" != "$stamp" ]; then
  echo "installing torch for CUDA in $venv ..." >&2
  rm -rf "$venv"
  # Three equal signs: the package index's build, which is the one for CUDA, not a local one for CPUs.
  # shellcheck disable=SC2086  # a list of words
  "${PYTHON:-python3}" -m venv "$venv" && install "torch===$torch" &&
    install --constraint "$root/constraints.txt" $others && echo "$stamp" >"$venv/made" || exit 75
fi

compile() { gcc -O1 -w -fPIC -I"$cuda" -I"$triton/include" -c "$1" -o "$2"; }
built=$(cat "$here"/*.[ch] "$here/../fake_nvml.c" "$venv/made" | sha256sum)
if [ "$(cat "$lib/built" 2>/dev/null)" != "$built" ]; then
  site=$(echo "$venv"/lib/python3*/site-packages)
  cuda=$site/nvidia/cu13/include
  triton=$site/triton/backends/nvidia
  mkdir -p "$lib"
  compile "$here/card.c" "$lib/card.o"
  # What torch imports of CUDA and cuBLAS, or Triton and torch name in their code, and card.c lacks.
  {
    nm -D --undefined-only "$site"/torch/lib/lib{torch_cuda,c10_cuda,caffe2_nvrtc,torch_python}*.so |
      sed -nE 's/.* U (_*cuda[A-Z]\w*|cu[A-Z]\w*|cublas\w*)(@.*)?$/\1/p'
    grep -aohE '\bcu[A-Z]\w*[a-z0-9]\b' "$triton/driver.c" "$site/torch/lib/libc10_cuda.so"
  } | sort -u >"$lib/wanted"
  nm --defined-only "$lib/card.o" | awk '{print $3}' | sort -u >"$lib/written"
  {
    echo 'void standin_log(const char *, ...);'
    comm -23 "$lib/wanted" "$lib/written" |
      sed 's/.*/long &(void) { static int said; if (!said++) standin_log("STUB &"); return 0; }/'
  } >"$lib/stubs.c"
  compile "$lib/stubs.c" "$lib/stubs.o"
  gcc -shared -Wl,-soname,libcuda.so.1 -o "$lib/libcuda.so.1" "$lib/card.o" "$lib/stubs.o" -ldl -lpthread
  gcc -shared -fPIC -Wl,-soname,libnvidia-ml.so.1 -o "$lib/libnvidia-ml.so.1" "$here/../fake_nvml.c" -lm
  echo "$built" >"$lib/built"
fi

export LD_PRELOAD=$lib/libcuda.so.1 LD_LIBRARY_PATH=$lib TRITON_LIBCUDA_PATH=$lib
[ $# = 0 ] || exec "$venv/bin/python" "$@"
