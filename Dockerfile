# The tested environment. CPU:  docker build -t rlhf-recipes . && docker run -it rlhf-recipes
# CUDA: docker build --build-arg BASE=nvidia/cuda:13.0.0-runtime-ubuntu24.04 -t rlhf-recipes . && docker run --gpus all ...
ARG BASE=python:3.11-slim
FROM ${BASE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends git make python3 python3-venv python3-pip \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE Makefile ./
COPY conf conf
COPY recipes recipes
COPY rlhf_recipes rlhf_recipes
COPY tests tests
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/python -m pip install --no-cache-dir --constraint constraints.txt --editable ".[dev]"
ENV PATH=/opt/venv/bin:$PATH
VOLUME ["/app/outputs", "/root/.cache"]
CMD ["python", "recipes/pipeline.py", "--help"]
