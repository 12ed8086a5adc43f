# An S3 server for one machine, not for production: JuiceFS's gateway over a folder and a SQLite file in /data.
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm
# hadolint ignore=DL3006
FROM ${BASE_IMAGE}
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
COPY docker/s3.lock /src/
RUN python3.11 -m venv /opt/venv && /opt/venv/bin/pip install --no-deps -r /src/s3.lock \
 && groupadd --gid 1000 s3 && useradd --uid 1000 --gid 1000 --create-home s3 && install -d -o s3 -g s3 /data
COPY --chmod=0555 docker/s3-server /usr/local/bin/s3-server
ENV PATH=/opt/venv/bin:$PATH HOME=/home/s3
USER 1000:1000
VOLUME /data
EXPOSE 9000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=4 \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9000/minio/health/live', timeout=4).read()"]
CMD ["s3-server"]
