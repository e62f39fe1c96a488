#!/usr/bin/env bash
# Install OpenVINO and its exporter into an environment of its own, as a peer of benchmarks.engine:
#     benchmarks/environments/openvino.sh [FOLDER]
# torch is installed first, so that no dependency draws its CUDA build in; torchvision would not load beside it.
set -euo pipefail
folder=${1:-benchmarks/.cache/openvino}
python3 -m venv "$folder"
pip="$folder/bin/python -m pip install --quiet"
$pip torch==2.13.0
$pip torch==2.13.0 openvino==2026.4.1 openvino-tokenizers openvino-genai optimum-intel==2.2.0
"$folder/bin/python" -m pip uninstall --quiet --yes torchvision
