"""One vLLM instance computes prompts, another one answers: a proxy that sends requests to both.

    python proxy.py --port 8000 --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200

The prefill instance is asked for one token, which makes it store the prompt's KV. It says how many
tokens it has stored or is about to store; with that number the decode instance waits for them
(2 s at most), loads them and computes the rest. Where the prefill instance does not answer, the
decode instance computes all by itself.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout, web

PREFILL_SECONDS = 60.0
"""How long a prompt may take. What takes longer is computed by the decode instance."""

log = logging.getLogger("proxy")


class Proxy:
    """Forwards /v1/completions and /v1/chat/completions."""

    def __init__(self, prefill: str, decode: str) -> None:
        self._prefill, self._decode = prefill, decode

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """The decode instance's answer, as it comes."""
        body = await request.json()
        headers = {name: request.headers[name] for name in ("Authorization",)
                   if name in request.headers}  # fmt: skip
        async with ClientSession(headers=headers, timeout=ClientTimeout(total=None)) as session:
            announced = await self._announced(session, request.path, body)
            if announced:
                body["kv_transfer_params"] = announced
            async with session.post(self._decode + request.path, json=body) as reply:
                answer = web.StreamResponse(
                    status=reply.status, headers={"Content-Type": reply.headers["Content-Type"]}
                )
                await answer.prepare(request)
                async for part in reply.content.iter_any():
                    await answer.write(part)
                await answer.write_eof()
                return answer

    async def _announced(
        self, session: ClientSession, path: str, body: dict[str, Any]
    ) -> dict[str, Any] | None:
        """What the prefill instance tells the decode instance; None where it fails."""
        first = {**body, "max_tokens": 1, "stream": False}
        for key in ("stream_options", "min_tokens", "max_completion_tokens"):
            first.pop(key, None)
        limit = ClientTimeout(total=PREFILL_SECONDS)
        try:
            async with session.post(self._prefill + path, json=first, timeout=limit) as reply:
                reply.raise_for_status()
                return (await reply.json()).get("kv_transfer_params")
        except (ClientError, TimeoutError) as error:
            log.warning("no prefill: %r", error)
            return None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--prefill", required=True, help="URL of an instance with kv_producer")
    parser.add_argument("--decode", required=True, help="URL of an instance with kv_consumer")
    arguments = parser.parse_args()
    proxy = Proxy(arguments.prefill, arguments.decode)
    app = web.Application(client_max_size=1 << 30)
    app.router.add_post("/v1/completions", proxy.answer)
    app.router.add_post("/v1/chat/completions", proxy.answer)
    web.run_app(app, host=arguments.host, port=arguments.port, print=None)


if __name__ == "__main__":
    main()
