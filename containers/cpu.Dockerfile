# wegeft on CPUs. In the repository's root:
#   docker build -f containers/cpu.Dockerfile -t wegeft:cpu .
#   docker run --rm -it --user "$(id -u):$(id -g)" -v "$PWD:/workspace" wegeft:cpu train recipe.yaml
FROM ghcr.io/astral-sh/uv:0.8.22 AS uv

FROM python:3.12.11-slim-bookworm
COPY --from=uv /uv /usr/local/bin/uv

WORKDIR /opt/wegeft
COPY pyproject.toml setup.py README.md LICENSE constraints.txt ./
COPY recipes recipes
COPY wegeft_cli wegeft_cli
# PyTorch's CPU build is a tenth of the size of the CUDA build.
RUN uv venv /opt/venv \
    && uv pip install --no-cache --python /opt/venv/bin/python --torch-backend cpu \
        --constraint constraints.txt '.[peft,vision,gguf,report]'

ENV PATH=/opt/venv/bin:$PATH \
    HF_HOME=/workspace/.cache/huggingface \
    PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 wegeft
USER 1000
WORKDIR /workspace
ENTRYPOINT ["wegeft"]
CMD ["--help"]
