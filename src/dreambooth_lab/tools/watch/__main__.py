"""A page that shows several runs during training:

    export DREAMBOOTH_WATCH_TOKEN=$(python -c 'import secrets; print(secrets.token_urlsafe())')
    python -m dreambooth_lab.tools.watch                        # on this or another reachable machine
    python -m dreambooth_lab webhook=watch preview.enabled=true …

The browser asks for a name and a password: any name, and the token. Nothing is written to disk. The connection is not encrypted:
from another machine, use ssh -L 8765:localhost:8765, or a reverse proxy with TLS.
"""

from __future__ import annotations

import ipaddress
import os
import sys
from importlib.util import find_spec
from typing import Annotated

import typer

from ...config import ConfigError
from ..common import cli

SHORTEST = 16  # minimum characters of a token


application = cli.app()


@application.command(help=cli.text(__doc__))
def main(
    host: Annotated[str, typer.Option(help="address to listen on; default: only this machine")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port")] = 8765,
    token_env: Annotated[str, typer.Option(help="environment variable that holds the token")] = "DREAMBOOTH_WATCH_TOKEN",
) -> None:
    absent = [name for name in ("starlette", "uvicorn") if not find_spec(name)]
    token = os.environ.get(token_env, "")
    if absent:
        raise ConfigError(f"{' and '.join(absent)} not installed; pip install 'dreambooth-lab[watch]'")
    if len(token) < SHORTEST:
        make = f"export {token_env}=$(python -c 'import secrets; print(secrets.token_urlsafe())')"
        raise ConfigError(f"--token_env names {token_env}, which has no token of at least {SHORTEST} characters; {make}")
    serve(host, port, token)


def serve(host: str, port: int, token: str) -> None:
    import uvicorn

    from .app import build

    print(f"http://{host}:{port}: any name, and the token as password; runs send with webhook=watch", flush=True)
    if not _is_loopback(host):
        print("warning: the token is visible in this network's traffic; prefer ssh -L", file=sys.stderr, flush=True)
    uvicorn.run(build(token), host=host, port=port, access_log=False, log_level="warning", server_header=False,
                limit_concurrency=64, timeout_graceful_shutdown=1)  # fmt: skip


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    cli.run(application)
