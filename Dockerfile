# Two images of one source. Target api: the API, migrations and the operator's commands, without PyTorch. Target worker: the worker,
# with PyTorch's CPU build by default; for NVIDIA GPUs with its CUDA build and bitsandbytes, which carry the CUDA libraries, so that
# the base image is the same:
#   docker build --target worker --build-arg REQUIREMENTS=worker-cuda --build-arg TORCH_INDEX= .
# What is installed has the hashes of requirements/, which `make lock` writes.
ARG BASE=python:3.11.16-slim-bookworm@sha256:528257d48c1da0dcecc2e725d1ae34498d60c965f1241e39cd6a85a8859bdf84

FROM ${BASE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
# Without pip: the environment is copied, and needs none at runtime.
RUN python -m venv --without-pip /opt/winnow
COPY requirements requirements

FROM build AS build-wheel
RUN pip install --require-hashes -r requirements/build.txt
COPY pyproject.toml README.md ./
COPY migrations migrations
COPY winnow winnow
COPY service service
COPY worker worker
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

FROM build AS build-api
RUN pip --python /opt/winnow/bin/python install --require-hashes -r requirements/api.txt
COPY --from=build-wheel /wheels /wheels
RUN pip --python /opt/winnow/bin/python install --no-deps --no-index /wheels/*.whl

FROM build AS build-worker
ARG REQUIREMENTS=worker-cpu
# Where the CPU build of PyTorch is; PyPI has the CUDA build.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip --python /opt/winnow/bin/python install --require-hashes ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} \
    -r "requirements/${REQUIREMENTS}.txt"
COPY --from=build-wheel /wheels /wheels
RUN pip --python /opt/winnow/bin/python install --no-deps --no-index /wheels/*.whl

FROM ${BASE} AS runtime
ARG VERSION=0.1.0
ARG REVISION=
LABEL org.opencontainers.image.title="Winnow" \
      org.opencontainers.image.description="Data selection as a service for fine-tuning language models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# Volumes take over the owner of the folders that they are mounted on.
RUN groupadd --gid 10001 winnow \
    && useradd --uid 10001 --gid winnow --no-create-home --home-dir /var/lib/winnow --shell /usr/sbin/nologin winnow \
    && install -d -o winnow -g winnow /var/lib/winnow /var/lib/winnow/artifacts /var/lib/winnow/models /var/lib/winnow/hub \
    && pip uninstall --yes --quiet --root-user-action ignore setuptools wheel pip
# An upload in progress may be as large as the largest dataset: for a disk (/var/tmp), not for memory (/tmp).
ENV PATH=/opt/winnow/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 TMPDIR=/var/tmp \
    HF_HOME=/var/lib/winnow/hub WINNOW_ARTIFACTS__URL=/var/lib/winnow/artifacts WINNOW_MODELS__FOLDER=/var/lib/winnow/models
USER 10001:10001
WORKDIR /var/lib/winnow
STOPSIGNAL SIGTERM

FROM runtime AS worker
COPY --from=build-worker /opt/winnow /opt/winnow
CMD ["celery", "-A", "worker.celery_app", "worker", "-P", "threads", "-c", "1", "--without-gossip", "--without-mingle", \
     "--loglevel", "INFO"]

FROM runtime AS api
COPY --from=build-api /opt/winnow /opt/winnow
EXPOSE 8000
# Its requests get 20 seconds to end.
CMD ["python", "-m", "service.serve", "--host", "0.0.0.0", "--port", "8000"]
