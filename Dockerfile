# docker build -t reranker .                                       PyTorch with CUDA 13 (several GB): driver 580 or newer
# docker build -t reranker . --build-arg TORCH_INDEX=...           from another index:
#   https://download.pytorch.org/whl/cu126                         CUDA 12.6: older drivers and GPUs (docs/operations.md)
#   https://download.pytorch.org/whl/cpu                           without CUDA, as docker-compose.cpu.yml builds it
# The base needs Python 3.11 or newer with venv; CUDA itself comes with PyTorch, the driver with the host.
ARG BASE_IMAGE=python:3.11-slim-bookworm
FROM ${BASE_IMAGE}

RUN groupadd --gid 10001 reranker \
    && useradd --uid 10001 --gid 10001 --home-dir /cache --create-home --shell /usr/sbin/nologin reranker \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /app

# Layers that are rebuilt only when a pin changes. Every file has its hash of requirements.lock (make lock), which holds
# those of PyPI. Another index has other files of PyTorch and CUDA, such as torch 2.13.0+cpu, and other packages of CUDA:
# from there torch is installed first, by its exact pin and without a hash, and everything else by hash.
COPY requirements.txt requirements.lock ./
ARG TORCH_INDEX=""
# On a GPU the layers are compiled at start-up, which needs a C compiler; without one they run uncompiled.
RUN case "$TORCH_INDEX" in */cpu|*/cpu/) ;; *) apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* ;; esac
RUN if [ -n "$TORCH_INDEX" ]; then pip install --no-cache-dir --index-url "$TORCH_INDEX" \
    "$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.txt)"; fi
RUN awk -v other="$TORCH_INDEX" \
    '/^[a-z]/ {keep = !(other && /^(torch|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==/)} keep' requirements.lock >/tmp/lock \
    && pip install --no-cache-dir --no-deps --require-hashes -r /tmp/lock && rm /tmp/lock && pip check

# The home is the volume: libraries store models and compiled kernels there; the rest may be read-only.
ENV HOME=/cache \
    HF_HOME=/cache/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
COPY app.py config.py gunicorn.conf.py LICENSE ./
COPY reranker/ reranker/
COPY models/demo/ models/demo/
# A checkout under umask 027 or 077 has files that only their owner can read.
RUN find /app ! -perm -o=r -exec chmod a+rX {} +

USER 10001:10001
EXPOSE 6006
STOPSIGNAL SIGTERM
# The first token is read from the environment, so that no process list shows it. The start period is LOAD_TIMEOUT's
# default, because the first start downloads the model. A connection to 0.0.0.0 or :: reaches this container itself.
HEALTHCHECK --interval=30s --timeout=5s --start-period=30m --retries=3 CMD ["python", "-c", "\
import http.client, sys\n\
from reranker.environment import get\n\
try:\n\
    host, port, tokens = map(get, ('HOST', 'PORT', 'ACCESS_TOKEN'))\n\
    token = next((t.strip() for t in tokens.split(',') if t.strip()), '')\n\
    server = http.client.HTTPConnection(host or '0.0.0.0', int(port or 6006), timeout=4)\n\
    server.request('GET', '/health', headers={'Authorization': 'Bearer ' + token} if token else {})\n\
    answer = server.getresponse()\n\
except Exception as error:\n\
    sys.exit('no answer: ' + type(error).__name__)\n\
print(answer.status, answer.read(200).decode(errors='replace'))\n\
sys.exit(0 if answer.status == 200 else 1)\n\
"]
CMD ["gunicorn", "-c", "gunicorn.conf.py", "app:app"]
