"""Passwords in addresses: found, never shown, refused in a config; and which variables are sent to other processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lape_ray import config, tracking
from lape_ray.cli import exit_code, parse
from lape_ray.cluster.controller import variables
from lape_ray.config import (
    DataConfig,
    OptimConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
    TrainingConfig,
    from_dict,
    replace_fields,
    to_dict,
)
from lape_ray.recipes import recipe
from lape_ray.storage import listing
from lape_ray.values.redaction import first_line, is_secret, redacted, refuse_secret

ROOT = Path(__file__).parent.parent.parent
SECRET = "hunter2"
WITH_SECRET = [
    (f"http://ann:{SECRET}@host:5000/x", "http://host:5000/x"),
    (f"https://{SECRET}@host", "https://host"),
    (f"HTTPS://ann:a@b{SECRET}@host/", "HTTPS://host/"),
    (f"https://ann:a/b{SECRET}@host/x", "https://host/x"),
    (f"http://ann:{SECRET}@[::1]:5000", "http://[::1]:5000"),
    (f"postgresql://ann:{SECRET}@host/db", "postgresql://ann@host/db"),
    (f"postgresql+psycopg2://ann:1/{SECRET}@host/db", "postgresql+psycopg2://ann@host/db"),
    (f"postgresql://:{SECRET}@host/db", "postgresql://@host/db"),
    (f"mysql+pymysql://ann:{SECRET}@host:3306/db", "mysql+pymysql://ann@host:3306/db"),
    (f"s3://AKIA:{SECRET}@bucket/key", "s3://bucket/key"),
    (f"http://host/?x=1&token={SECRET}&y=2", "http://host/?x=1&token=***&y=2"),
    (f"postgresql://host/db?user=ann&password={SECRET}", "postgresql://host/db?user=ann&password=***"),
    (f"https://host/key?X-Amz-Signature={SECRET}", "https://host/key?X-Amz-Signature=***"),
]
WITHOUT = [
    "http://host:5000/a@b", "http://[::1]:5000/a@b", "https://host/a@b?x=c@d", "postgresql://ann@host/db",
    "mysql+pymysql://ann@host/db?read_default_file=/etc/my.cnf", "postgresql://host/db?sslkey=/k&passfile=/p",
    "sqlite:////home/a:b@c/mlflow.db", "file:///a:b@c", "s3://bucket/data@v1:2@3", "/data/a:b@c", "databricks://profile",
    "torchvision:resnet18:/weights.pth",
]  # fmt: skip


@pytest.mark.parametrize(("address", "shown"), WITH_SECRET, ids=[shown for _, shown in WITH_SECRET])
def test_a_password_is_taken_out_of_an_address(address: str, shown: str) -> None:
    assert redacted(address) == shown
    assert (
        redacted(f"GET '{address}' failed, see http://docs/x") == f"GET '{shown}' failed, see http://docs/x"
    )
    assert redacted(shown) == shown
    with pytest.raises(ValueError, match="was given with a password or token in it") as refusal:
        refuse_secret("address", address)
    assert SECRET not in str(refusal.value)
    assert f"address={shown!r}" in str(refusal.value)


@pytest.mark.parametrize("address", WITHOUT)
def test_other_addresses_stay_as_they_are(address: str) -> None:
    assert redacted(address) == address
    refuse_secret("address", address)


def test_a_password_with_a_space_is_refused() -> None:
    with pytest.raises(ValueError, match="PGPASSWORD") as refusal:
        refuse_secret("tracking_uri", f"postgresql://ann:{SECRET} {SECRET}@host/db")
    assert SECRET not in str(refusal.value)


def test_an_endpoint_without_a_scheme_is_one_all_the_same() -> None:
    """boto3's own error would show all of it."""
    refuse_secret("AWS_ENDPOINT_URL", "host:9000")
    with pytest.raises(ValueError, match="AWS_ENDPOINT_URL='http://host:9000' was given with") as refusal:
        refuse_secret("AWS_ENDPOINT_URL", f"ann:{SECRET}@host:9000")
    assert SECRET not in str(refusal.value)


def test_an_error_without_words_has_a_first_line() -> None:
    assert first_line(ValueError()) == "ValueError"
    assert first_line(ValueError(f"\nno http://a:{SECRET}@h\nmore")) == "no http://h"


VARIABLES = [
    ("AWS_SECRET_ACCESS_KEY", "x", True), ("AWS_ACCESS_KEY_ID", "x", True), ("AWS_SESSION_TOKEN", "x", True),
    ("MLFLOW_TRACKING_PASSWORD", "x", True), ("MLFLOW_TRACKING_TOKEN", "x", True), ("RAY_AUTH_TOKEN", "x", True),
    ("HF_TOKEN", "x", True), ("PGPASSWORD", "x", True), ("MYSQL_PWD", "x", True), ("OPENAI_API_KEY", "x", True),
    ("MLFLOW_TRACKING_URI", f"https://ann:{SECRET}@host", True), ("MLFLOW_TRACKING_URI", "https://host", False),
    ("https_proxy", f"http://ann:{SECRET}@host:3128", True), ("HTTPS_PROXY", f"ann:{SECRET}@host:3128", True),
    ("no_proxy", "localhost,127.0.0.1", False), ("http_proxy", "host:3128", False),
    ("AWS_ENDPOINT_URL", f"http://ann:{SECRET}@host", True), ("AWS_ENDPOINT_URL_S3", f"ann:{SECRET}@host:1", True),
    ("HF_ENDPOINT", f"ann:{SECRET}@host", True), ("AWS_ENDPOINT_URL", "host:9000", False),
    ("AWS_ENDPOINT_URL", "http://host:9000", False),
    ("MLFLOW_TRACKING_USERNAME", "trainer", False), ("AWS_REGION", "us-east-1", False), ("AWS_PROFILE", "mine", False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "secret"), VARIABLES)
def test_which_variables_are_secret(
    name: str, value: str, secret: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_secret(name, value) is secret
    monkeypatch.setenv(name, value)
    sent = name.startswith(("AWS_", "MLFLOW_")) and not secret
    assert variables().get(name) == (value if sent else None)


# --- configs ----------------------------------------------------------------------------------------------------

WEB, DATABASE, S3 = f"https://ann:{SECRET}@host", f"postgresql://ann:{SECRET}@host/db", f"s3://a:{SECRET}@b/c"
MAKE: list[tuple[Callable[[], object], str]] = [
    (lambda: TrackingConfig(uri=WEB), r"uri='https://host' .* MLFLOW_TRACKING_PASSWORD"),
    (lambda: TrackingConfig(uri=DATABASE), r"uri='postgresql://ann@host/db' .* PGPASSWORD"),
    (lambda: TrackingConfig(uri=f"mysql://a:{SECRET}@h/d"), "read_default_file=FILE"),
    (lambda: TrackingConfig(uri=f"https://host?token={SECRET}"), r"MLFLOW_TRACKING_TOKEN"),
    (lambda: RunConfig(storage=S3), r"storage='s3://b/c' .* AWS_SECRET_ACCESS_KEY"),
    (lambda: TrainingConfig(init_from=S3), "init_from"),
    (lambda: TrackingConfig(experiment=WEB), "experiment"),
    (lambda: DataConfig(train=S3), "train='s3://b/c'"),
    (lambda: DataConfig(val=S3), "val='s3://b/c'"),
    (lambda: OptimConfig(teacher=f"torchvision:resnet18:{S3}"), "teacher='torchvision:resnet18:s3://b/c'"),
    (lambda: TrainConfig(recipe=WEB), "recipe"),
    (lambda: replace_fields(recipe("smoke"), {"tracking.uri": WEB}), "uri="),
    (lambda: listing(S3), "address='s3://b/c' .* AWS_PROFILE"),
]


@pytest.mark.parametrize(("make", "message"), MAKE, ids=[message[:24] for _, message in MAKE])
def test_a_configured_password_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        make()
    assert SECRET not in str(refusal.value)


def test_every_text_of_a_config_is_looked_at() -> None:
    """A new field that may hold an address is refused as the others are."""
    for name, cls in config.SECTIONS.items():
        for field, kind in config.typing.get_type_hints(cls).items():
            if str in (kind, *config.typing.get_args(kind)):
                with pytest.raises(ValueError, match=f"{field}='s3://b/c' was given with a password"):
                    cls(**{field: S3})
                assert name


def test_a_record_of_before_is_read_without_its_password() -> None:
    values = to_dict(recipe("smoke"))
    values["tracking"]["uri"] = DATABASE
    assert from_dict(TrainConfig, values).tracking.uri == "postgresql://ann@host/db"


@pytest.mark.parametrize(
    "words",
    [
        ["demo", f"--tracking.uri={WEB}", "--dump"],
        ["demo", f"--optim.lr={WEB}"],
        [WEB],
        ["demo", f"--model.variant={WEB}"],
    ],
)
def test_a_command_line_with_a_password_ends_with_a_line_that_shows_none(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse(words, description="")
    output = "".join(capsys.readouterr())
    assert end.value.code == 2
    assert output.startswith("error: ")
    assert "https://host" in output
    assert SECRET not in output


@pytest.mark.parametrize(
    ("error", "code"), [(ValueError, 2), (OSError, 2), (RuntimeError, 1), (KeyError, 1)], ids=str
)
def test_what_a_job_prints_of_an_error_shows_no_password(
    error: type[Exception], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def job() -> None:
        raise error(f"no answer from {WEB}/api")

    assert exit_code(job) == code
    output = "".join(capsys.readouterr())
    assert "no answer from https://host/api" in output
    assert SECRET not in output
    assert ("Traceback" in output) == (code == 1)


# --- the tracking server ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "way_out"),
    [
        (WEB, "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        (DATABASE, "PGPASSWORD, or a file ~/.pgpass"),
    ],
)
def test_a_password_in_the_variable_of_the_server_is_refused(
    address: str, way_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(ValueError, match=f"MLFLOW_TRACKING_URI=.*{way_out}") as refusal:
        tracking.tracking_uri(TrainConfig())
    assert SECRET not in str(refusal.value)
    other = replace_fields(TrainConfig(), {"tracking.uri": "http://other"})
    assert tracking.tracking_uri(other) == "http://other", "an option stands for itself"


def test_a_password_in_the_address_of_s3_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", WEB)
    with pytest.raises(
        ValueError, match=r"AWS_ENDPOINT_URL='https://host' .* AWS_SECRET_ACCESS_KEY"
    ) as refusal:
        listing("s3://bucket/key")
    assert SECRET not in str(refusal.value)


def test_the_demo_refuses_a_password_before_it_is_on_a_jobs_command_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs/demo.py"), f"--home={tmp_path}", f"--tracking.uri={WEB}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == "", "nothing was started"
    assert "error: option='--tracking.uri=https://host' was given" in done.stderr
    assert SECRET not in done.stderr
