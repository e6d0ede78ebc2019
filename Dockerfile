# One image for API, worker and migrations. CPU by default; for NVIDIA GPUs:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 -t winnow:cuda .
# PyTorch's own CUDA builds carry the CUDA libraries, so the base image is the same.
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim-bookworm AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/winnow
COPY constraints.txt constraints-torch.txt /src/
# The heaviest layer first: it changes only with the pinned versions.
RUN /opt/winnow/bin/pip install --index-url ${TORCH_INDEX} --extra-index-url https://pypi.org/simple \
    -c /src/constraints.txt -c /src/constraints-torch.txt torch
COPY pyproject.toml README.md /src/
COPY service /src/service
COPY worker /src/worker
COPY migrations /src/migrations
RUN /opt/winnow/bin/pip install -c /src/constraints.txt -c /src/constraints-torch.txt /src

FROM python:${PYTHON_VERSION}-slim-bookworm
RUN useradd --uid 10001 --create-home winnow \
    && install -d -o winnow -g winnow /var/lib/winnow /var/lib/winnow/artifacts /var/lib/winnow/models
COPY --from=build /opt/winnow /opt/winnow
ENV PATH=/opt/winnow/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    WINNOW_ARTIFACTS__URL=/var/lib/winnow/artifacts WINNOW_MODELS__FOLDER=/var/lib/winnow/models
USER winnow
WORKDIR /home/winnow
EXPOSE 8000
CMD ["uvicorn", "service.app:create_app", "--factory", "--host", "0.0.0.0", "--port", "8000"]
