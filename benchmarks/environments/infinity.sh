#!/usr/bin/env bash
# Install Infinity into an environment of its own, as a peer of benchmarks.servers:
#     benchmarks/environments/infinity.sh [FOLDER]
# Its own pins: it imports optimum's BetterTransformer, which newer releases of optimum and transformers do not have.
set -euo pipefail
folder=${1:-benchmarks/.cache/infinity}
python3 -m venv "$folder"
pip="$folder/bin/python -m pip install --quiet"
$pip torch==2.13.0
$pip "infinity-emb[server,torch,optimum]==0.0.78" "transformers<4.49" "optimum<1.25" "sentence-transformers<4" "click<8.2" \
    onnx onnxruntime "pyarrow<20" "datasets<4"  # of ONNX Runtime's engine; NumPy is older than 2
