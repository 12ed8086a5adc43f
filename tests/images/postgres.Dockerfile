# PostgreSQL for `make test-images` where its official image cannot be had; takes the same three variables.
ARG BASE_IMAGE
# hadolint ignore=DL3006
FROM ${BASE_IMAGE}
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends postgresql-15 && rm -rf /var/lib/apt/lists/* \
 && install -d -o postgres -g postgres /var/lib/postgresql/data
COPY --chmod=0555 tests/images/postgres-server /usr/local/bin/postgres-server
ENV PATH=/usr/lib/postgresql/15/bin:$PATH PGDATA=/var/lib/postgresql/data/pgdata
# hadolint ignore=DL3066
USER postgres
CMD ["postgres-server"]
