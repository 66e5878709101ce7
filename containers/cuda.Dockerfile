# wegeft on NVIDIA GPUs. In the repository's root:
#   docker build -f containers/cuda.Dockerfile -t wegeft:cuda .
#   docker run --rm -it --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/workspace" wegeft:cuda train recipe.yaml
# PyTorch's wheels contain the CUDA libraries. The host provides the driver and the NVIDIA container toolkit.
FROM ghcr.io/astral-sh/uv:0.8.22 AS uv

FROM python:3.12.11-slim-bookworm
COPY --from=uv /uv /usr/local/bin/uv
# Triton, which `train.compile` and the fused kernels use, compiles with gcc at run time.
# Debian removes old versions of packages, so they are not pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/wegeft
COPY pyproject.toml setup.py README.md LICENSE constraints.txt ./
COPY recipes recipes
COPY wegeft_cli wegeft_cli
RUN uv venv /opt/venv \
    && uv pip install --no-cache --python /opt/venv/bin/python \
        --constraint constraints.txt '.[peft,vision,gguf,report,bitsandbytes,liger]'

ENV PATH=/opt/venv/bin:$PATH \
    HF_HOME=/workspace/.cache/huggingface \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 wegeft
USER 1000
WORKDIR /workspace
ENTRYPOINT ["wegeft"]
CMD ["--help"]
