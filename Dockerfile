# The layer and its benchmark on an NVIDIA GPU. Not built where this file was written: there was no
# Docker and no GPU there.
#
#   docker build --tag jax-moe .
#   docker run --rm --gpus all jax-moe                       # which backend runs here, and why
#   docker run --rm --gpus all jax-moe python bench_main.py --workloads=1,80
#
# The host needs NVIDIA's driver, 580 or newer, and nvidia-container-toolkit. CUDA itself comes with
# JAX's wheels; with driver 525 or newer: docker build --build-arg CUDA=cuda12 .
FROM python:3.12-slim

ARG CUDA=cuda13
# git: the benchmark's results name the commit that was measured.
RUN apt-get update && apt-get install --yes --no-install-recommends git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /jax-moe
COPY . .
RUN pip install --no-cache-dir --constraint tools/developed_with.txt \
    --editable ".[${CUDA},triton,torch,bench]"

CMD ["python", "-c", "import jax_moe; print(jax_moe.describe())"]
