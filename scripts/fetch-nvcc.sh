#!/usr/bin/env bash
# Fetches what `--features cuda` and the kernel checks need, without root, into .toolchain/ (about 230 MB to download, 480 MB
# on disk; a folder that is there already is left alone). Versions are pinned: the wheels' own dependencies are not, and a newer
# nvvm writes PTX that an older ptxas refuses.
#   cuda-13.0   nvcc, cuobjdump and nvdisasm to look at code, libclang for scripts/bindings.sh
#   ptxas-12.9  assembles for drivers from R525 on (13.0's needs R580)
#   ptxas-12.0  proves that the PTX loads on the oldest driver we support
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p .toolchain

fetch() {
    local folder=.toolchain/$1
    shift
    if [ -d "$folder" ]; then
        return
    fi
    echo "fetching $folder"
    rm -rf "$folder.partial"
    # One pip run per folder: a second run does not merge into the same package folder.
    if ! python3 -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --root-user-action=ignore --only-binary=:all: \
        --target "$folder.partial" "$@"; then
        echo "error: pip could not fetch $*; python3 with pip and a connection to PyPI are needed" >&2
        exit 1
    fi
    mv "$folder.partial" "$folder"
}

fetch cuda-13.0 nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 \
    nvidia-cuda-cccl==13.0.85 nvidia-cuda-cuobjdump==13.2.86 nvidia-cuda-nvdisasm==13.2.86 libclang==18.1.1
fetch ptxas-12.9 nvidia-cuda-nvcc-cu12==12.9.86
fetch ptxas-12.0 nvidia-cuda-nvcc-cu12==12.0.140
.toolchain/cuda-13.0/nvidia/cu13/bin/nvcc --version | grep release
