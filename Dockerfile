# The tested environment.
# CPU:   docker build --build-arg TORCH_INDEX=<index of CPU builds> -t rlhf-recipes . && docker run -it rlhf-recipes
# CUDA:  docker build --build-arg BASE=nvidia/cuda:13.0.0-runtime-ubuntu24.04 -t rlhf-recipes .
#        docker run -it --gpus all -v "$PWD/outputs:/app/outputs" rlhf-recipes python recipes/dpo.py model=qwen3_4b
# What a run needs to know of you (HF_TOKEN) is given to `docker run`, never to the build. A folder of yours that is
# mounted must be writable by user 1000, who writes into /app/outputs and /cache alone: code and packages are root's.
# Without an engine: tests/container.py carries the steps out in a folder.
ARG BASE=python:3.11-slim
FROM ${BASE}
ARG TORCH_INDEX=
ENV DEBIAN_FRONTEND=noninteractive
# Another base has other versions of these.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends git make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && (getent passwd 1000 > /dev/null || useradd --uid 1000 recipes) \
    && install -d -o 1000 -g 1000 /app/outputs /cache
WORKDIR /app
ENV PIP_NO_CACHE_DIR=1 PATH=/app/.venv/bin:$PATH
COPY pyproject.toml constraints.txt README.md SECURITY.md LICENSE Makefile ./
COPY conf conf
COPY recipes recipes
COPY rlhf_recipes rlhf_recipes
COPY tests tests
# A checkout may be readable by its owner alone. What tests need holds what the demo needs. Bytecode of the code,
# which nobody writes later.
RUN chmod -R go=rX . \
    && make TORCH_INDEX="$TORCH_INDEX" .venv/dev && touch .venv/demo \
    && .venv/bin/python -m compileall -q rlhf_recipes recipes
USER 1000
ENV HOME=/cache XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface
VOLUME ["/app/outputs", "/cache"]
CMD ["make", "demo"]
