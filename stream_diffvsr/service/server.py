"""Start the server and run it until it is told to stop."""

from __future__ import annotations

import logging

from ..errors import VideoError
from .settings import Settings

log = logging.getLogger(__name__)


def run(settings: Settings) -> None:
    """Serve, and log the page's address once it can be opened; raise `VideoError` if the root is in use."""
    import uvicorn
    from filelock import FileLock, Timeout

    from .api import create

    settings.root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(settings.root / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise VideoError(
            f"another server is using {settings.root}: stop it, or choose another --root."
        ) from error

    class Server(uvicorn.Server):
        async def startup(self, sockets: list | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                port = self.servers[0].sockets[0].getsockname()[1]
                host = f"[{settings.host}]" if ":" in settings.host else settings.host
                log.info("open http://%s:%d/", host, port)

    with lock:
        Server(
            uvicorn.Config(
                create(settings),
                host=settings.host,
                port=settings.port,
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=5,
                timeout_keep_alive=75,  # longer than clients wait between polls
            )
        ).run()
