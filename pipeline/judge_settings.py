"""Settings of the judge, `[judge]`."""

import ipaddress
import re
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from pipeline.artifacts import Frozen


class JudgeConfig(Frozen):
    """A language model that compares answers; it can block a promotion, never cause one."""

    url: str = ""
    """OpenAI-compatible endpoint, as http://127.0.0.1:8000/v1; empty: no judge."""
    model: str = ""
    """Name of the model there."""
    api_key_env: str = ""
    """Variable that holds the key; its value is written nowhere."""
    records: int = Field(default=200, ge=1, le=10_000_000)
    """Most held-out records that are judged, those with the lowest hash."""
    timeout_seconds: float = Field(default=60.0, ge=0.01, le=86_400)
    """Longest wait for one answer."""

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not value or (usable and not re.search(r"[@?#\s\x00-\x1f]", value) and not value.endswith("/completions")):
            return value
        raise ValueError(
            "must be the http:// or https:// address of an OpenAI-compatible endpoint up to its version, without "
            "name, password, query and /chat/completions, such as http://127.0.0.1:8000/v1"
        )

    @field_validator("api_key_env")
    @classmethod
    def _is_a_variable(cls, value: str) -> str:
        if value and (not re.fullmatch(r"[A-Za-z_]\w*", value, re.ASCII) or value.upper().startswith("DROPFORGE_")):
            raise ValueError(
                "must be the name of an environment variable that holds the key, not the key itself, such as "
                "JUDGE_API_KEY; names with DROPFORGE_ are for settings"
            )
        return value

    @model_validator(mode="after")
    def _names_a_model(self) -> "JudgeConfig":
        if self.url and not self.model:
            raise ValueError("judge.url is set and judge.model is not: name the model that the endpoint is to ask")
        return self

    @property
    def on_this_machine(self) -> bool:
        """Whether the host in `url` is `localhost` or a loopback address; other names are not resolved."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"
