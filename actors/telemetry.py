"""Whether requests are traced and where the traces go. The rest is in `actors.otel`, imported only where they are."""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from actors.errors import ConfigError

if TYPE_CHECKING:
    from actors.otel import Telemetry

_NEEDED = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


class TelemetryConfig(BaseModel):
    """Traces go to `endpoint`, an OpenTelemetry collector that takes OTLP over HTTP (protobuf); `/v1/traces` is added
    where the address does not end with it. `headers` go with every export. `sampling` is the share (0..1) of requests
    that are traced; a caller's `traceparent` has its own say. With `content` the prompts and answers are in the spans
    of the calls. `service` is the name of this server in the traces."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    endpoint: str
    headers: dict[str, SecretStr] = {}
    sampling: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 1.0
    content: bool = False
    service: Annotated[str, Field(min_length=1)] = "fugu"

    @property
    def url(self) -> str:
        """The address of the traces."""
        base = self.endpoint.rstrip("/")
        return base if base.endswith("/v1/traces") else f"{base}/v1/traces"

    @field_validator("endpoint")
    @classmethod
    def _plain_address(cls, value: str) -> str:
        if not re.match(r"https?://[^/\s]+", value):
            raise ValueError("must begin with http:// or https://")
        # An address is logged when it cannot be reached.
        if "@" in urlsplit(value).netloc or "?" in value or "#" in value:
            raise ValueError("must be an address without user, query or fragment; keys belong into `headers`")
        return value

    @field_validator("headers")
    @classmethod
    def _can_be_sent(cls, headers: dict[str, SecretStr]) -> dict[str, SecretStr]:
        for name, secret in headers.items():
            value = secret.get_secret_value()
            if not _TOKEN.fullmatch(name) or not value.isprintable() or not value.isascii():
                raise ValueError(f"header {name[:40]!r} cannot be sent: its name or its value has a wrong character")
        return headers


def check_installed(config: TelemetryConfig | None) -> None:
    """Raises:
    ConfigError: traces are wanted, and what sends them is not installed.
    """
    if config is None:
        return
    for module in _NEEDED:
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            raise ConfigError(
                f"telemetry: needs a package that is not installed ({module}): pip install 'fugu-ray[telemetry]'"
            )


def open_telemetry(config: TelemetryConfig | None, process: str) -> Telemetry | None:
    """What makes this process's spans; None where nothing is traced. `process` says which one it is.

    Raises:
        ConfigError: as `check_installed`.
    """
    if config is None:
        return None
    check_installed(config)
    from actors.otel import Telemetry

    return Telemetry(config, process)
