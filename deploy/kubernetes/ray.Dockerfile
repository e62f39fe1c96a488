# The image of the service plus Ray, for rayservice.yaml; the package reranker is in the base image:
#   docker build -t reranker . && docker build -t reranker-ray -f deploy/kubernetes/ray.Dockerfile deploy
ARG BASE_IMAGE=reranker
FROM ${BASE_IMAGE}
USER root
# KubeRay starts Ray in a login shell, which resets PATH; its probes use wget for Ray before 2.53.
RUN echo 'PATH=/opt/venv/bin:$PATH' > /etc/profile.d/venv.sh \
    && apt-get update \
    && apt-get install -y --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/*
COPY requirements-ray.txt deploy/
RUN pip install --no-cache-dir -r deploy/requirements-ray.txt
COPY *.py deploy/
ENV PYTHONPATH=/app
USER 10001:10001
