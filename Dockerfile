# One image for API, worker and migrations. PyTorch's CPU build by default; for NVIDIA GPUs its CUDA build, which carries the CUDA
# libraries, so that the base image is the same:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 --build-arg EXTRAS=quantised -t winnow-cuda:local .
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim-bookworm AS build
ARG CPU_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH_INDEX=${CPU_INDEX}
ARG EXTRAS=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PYTHON=/opt/winnow/bin/python
WORKDIR /src
# Without pip: the environment is copied, and what runs needs none.
RUN python -m venv --without-pip /opt/winnow
# The heaviest layers first; they change with the pinned versions only. The pin of PyTorch is the CPU build's: another index has
# other versions. Nothing but PyTorch is taken from that index.
COPY constraints.txt constraints-torch.txt ./
RUN if [ "${TORCH_INDEX}" = "${CPU_INDEX}" ]; then pin="-c constraints-torch.txt"; else pin=; fi \
    && pip install --no-deps --index-url "${TORCH_INDEX}" ${pin} torch
COPY pyproject.toml ./
RUN python -c "import sys, tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    print(*p['dependencies'], *(d for e in sys.argv[1:] for d in p['optional-dependencies'][e]), sep='\n')" \
    ${EXTRAS} > requirements.txt \
    && pip install -c constraints.txt -r requirements.txt
COPY README.md ./
COPY service service
COPY worker worker
COPY migrations migrations
RUN pip install --no-deps .

FROM python:${PYTHON_VERSION}-slim-bookworm
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
COPY --from=build /opt/winnow /opt/winnow
# An upload in progress may be as large as the largest dataset: for a disk (/var/tmp), not for memory (/tmp).
ENV PATH=/opt/winnow/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 TMPDIR=/var/tmp \
    HF_HOME=/var/lib/winnow/hub WINNOW_ARTIFACTS__URL=/var/lib/winnow/artifacts WINNOW_MODELS__FOLDER=/var/lib/winnow/models
USER 10001:10001
WORKDIR /var/lib/winnow
EXPOSE 8000
STOPSIGNAL SIGTERM
# Its requests get 20 seconds to end. The access log is the service's own.
CMD ["uvicorn", "service.app:create_app", "--factory", "--host", "0.0.0.0", "--port", "8000", "--no-access-log", \
     "--timeout-graceful-shutdown", "20"]
