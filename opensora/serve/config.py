"""What a service is allowed to do, and the bounds of one request that follow from a checkpoint.

Bounds that are not configured are multiples of the shape that the model was trained on: a client
may ask for somewhat more than that, and never for what would occupy the device for a day.
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from opensora.config import Config
from opensora.errors import UsageError
from opensora.infer.pipeline import Shape

TOKEN_VARIABLE = "OPENSORA_SERVE_TOKEN"
MIN_TOKEN = 16
MAX_SEED = 2**53 - 1
"""The largest integer that every reader of JSON keeps exact (RFC 8259, section 6)."""


class ServeConfig(Config):
    """How a checkpoint is served."""

    host: str = Field(default="127.0.0.1", description="address; others than this machine's own "
                      "need a token")  # fmt: skip
    port: int = Field(default=8000, ge=0, le=65535, description="TCP port; 0 takes a free one")
    output: Path = Field(default=Path("outputs/serve"), description="folder of jobs and videos")
    queue: int = Field(default=8, ge=1, le=10_000, description="jobs that may wait; more get 429")
    queue_per_client: int | None = Field(
        default=None, ge=1, description="jobs of one address that may wait; no bound of its own"
    )
    proxy: ipaddress.IPv4Address | ipaddress.IPv6Address | None = Field(
        default=None, description="the proxy in front, whose X-Forwarded-For is believed"
    )
    keep: int = Field(default=200, ge=1, description="finished jobs kept; the oldest are removed")
    max_prompt: int = Field(default=2000, ge=1, description="characters of a prompt")
    max_steps: int = Field(default=100, ge=1, description="sampling steps")
    max_guidance: float = Field(default=30.0, gt=0, description="guidance scale")
    max_frames: int | None = Field(default=None, ge=1, description="frames; twice the trained")
    max_pixels: int | None = Field(
        default=None, ge=1, description="width x height; twice the trained"
    )
    max_work: int | None = Field(
        default=None,
        ge=1,
        description="width x height x frames x steps; the trained shape at `max_steps`",
    )
    max_body: int = Field(default=12 * 2**20, ge=1024, description="bytes of a request's body")
    max_reference_pixels: int = Field(
        default=4096 * 4096, ge=1, description="pixels of an uploaded picture"
    )
    head_seconds: float = Field(
        default=10.0, gt=0, description="the head of a request must have come by then"
    )
    body_seconds: float = Field(default=30.0, gt=0, description="a body must have come by then")
    decode_seconds: float = Field(
        default=20.0, gt=0, description="wall clock that decoding an upload may take"
    )
    decode_bytes: int = Field(
        default=2**30, ge=2**28, description="address space of the process that decodes it"
    )
    connections: int = Field(default=64, ge=1, description="connections at a time; more get 503")
    shutdown_seconds: float = Field(
        default=30.0, gt=0, description="how long a stop waits for the running step"
    )

    def check_exposure(self, token: str | None) -> None:
        """Refuse to listen to other machines without a token.

        Raises:
            UsageError: `host` is not of this machine alone, and there is no token.
        """
        if token is None and not is_loopback(self.host):
            raise UsageError(
                f"--host {self.host} can be reached from other machines, so a token is needed: "
                f"put one of at least {MIN_TOKEN} characters into {TOKEN_VARIABLE} or a "
                "--token-file, or leave --host at 127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Whether an address or name means this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(file: Path | None) -> str | None:
    """The token from a file, else from the environment, else None.

    Raises:
        UsageError: the file cannot be read, or the token is too short or not plain ASCII.
    """
    source = str(file) if file is not None else TOKEN_VARIABLE
    if file is not None:
        try:
            text = file.read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the token in {file} cannot be read: {error}") from None
    else:
        text = os.environ.get(TOKEN_VARIABLE, "")
        if not text:
            return None
    token = text.strip()
    if len(token) < MIN_TOKEN or not all("!" <= c <= "~" for c in token):
        raise UsageError(
            f"the token in {source} must be one line of at least {MIN_TOKEN} ASCII characters "
            "without spaces, such as those of: python -c 'import secrets; "
            "print(secrets.token_urlsafe())'"
        )
    return token


@dataclass(frozen=True)
class Bounds:
    """What one request may ask for.

    Attributes:
        num_pixels: width x height.
        work: width x height x frames x steps.
        side: of the picture, in pixels.
    """

    prompt: int
    steps: int
    guidance: float
    num_frames: int
    num_pixels: int
    work: int
    side: int
    fps: float = 120.0

    @classmethod
    def of(cls, config: ServeConfig, trained: Shape) -> Bounds:
        """The configured bounds, and for the others multiples of the trained shape."""
        area = trained.height * trained.width
        return cls(
            prompt=config.max_prompt,
            steps=config.max_steps,
            guidance=config.max_guidance,
            num_frames=config.max_frames or 2 * trained.num_frames,
            num_pixels=config.max_pixels or 2 * area,
            work=config.max_work or area * trained.num_frames * config.max_steps,
            side=4 * max(trained.height, trained.width),
        )
