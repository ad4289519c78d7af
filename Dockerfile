# The tested environment.
# CPU:   docker build --build-arg TORCH_INDEX=<index of CPU builds> -t rlhf-recipes . && docker run -it rlhf-recipes
# CUDA:  docker build --build-arg BASE=nvidia/cuda:13.0.0-runtime-ubuntu24.04 -t rlhf-recipes .
#        docker run -it --gpus all -v "$PWD/outputs:/app/outputs" rlhf-recipes python recipes/dpo.py model=qwen3_4b
# What a run needs to know of you (HF_TOKEN) is given to `docker run`, never to the build. A folder of yours that is
# mounted must be writable by user 1000.
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
    && (getent passwd 1000 > /dev/null || useradd --create-home --uid 1000 recipes) \
    && install -d -o 1000 -g 1000 /app /app/outputs /cache
USER 1000
WORKDIR /app
ENV HOME=/app XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface PIP_NO_CACHE_DIR=1 PATH=/app/.venv/bin:$PATH
COPY --chown=1000:1000 pyproject.toml constraints.txt README.md SECURITY.md LICENSE Makefile ./
COPY --chown=1000:1000 conf conf
COPY --chown=1000:1000 recipes recipes
COPY --chown=1000:1000 rlhf_recipes rlhf_recipes
COPY --chown=1000:1000 tests tests
# What tests need holds what the demo needs.
RUN make TORCH_INDEX="$TORCH_INDEX" .venv/dev && touch .venv/demo
VOLUME ["/app/outputs", "/cache"]
CMD ["make", "demo"]
