# The MLflow server: PostgreSQL behind it, artifacts on S3, user names and passwords (basic-auth).
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS builder
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python3.11 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY docker/mlflow.lock /src/
# Of the compiled modules only those stay that the server imports.
RUN pip install --no-deps -r /src/mlflow.lock && find /opt/venv -name __pycache__ -prune -exec rm -rf {} + \
 && PYTHONDONTWRITEBYTECODE='' python -c 'import mlflow.server.fastapi_app, psycopg2, boto3'

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS server
RUN groupadd --gid 1000 mlflow && useradd --uid 1000 --gid 1000 --create-home mlflow \
 && echo "export PATH=/opt/venv/bin:\$PATH" > /etc/profile.d/mlflow.sh
COPY --from=builder /opt/venv /opt/venv
COPY --chmod=0555 docker/mlflow-server /usr/local/bin/mlflow-server
# Job execution is for evaluating language models, and would hold seven more processes.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 GIT_PYTHON_REFRESH=quiet HOME=/home/mlflow \
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true MLFLOW_HOST=0.0.0.0 MLFLOW_PORT=5000
USER 1000:1000
WORKDIR /home/mlflow
EXPOSE 5000
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=4 \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:5000/health', timeout=4).read()"]
LABEL org.opencontainers.image.title="lape-ray-mlflow" \
      org.opencontainers.image.description="MLflow server with PostgreSQL and S3 clients and authentication"
CMD ["mlflow-server"]
