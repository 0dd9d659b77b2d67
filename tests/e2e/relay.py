"""A relay that makes a network longer: python -m tests.e2e.relay PORT HOST PORT ROUND_TRIP_SECONDS"""

from __future__ import annotations

import queue
import socket
import sys
import threading
import time

_Portion = tuple[float, bytes]


def main() -> None:
    port, host, target, seconds = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    with socket.create_server(("127.0.0.1", port)) as listener:
        while True:
            client, _ = listener.accept()
            server = socket.create_connection((host, target))
            for source, sink in ((client, server), (server, client)):
                sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                pipe: queue.Queue[_Portion] = queue.Queue(256)
                delay = float(seconds) / 2
                threading.Thread(target=take, args=(source, pipe, delay), daemon=True).start()
                threading.Thread(target=hand_on, args=(pipe, sink), daemon=True).start()


def take(source: socket.socket, pipe: queue.Queue[_Portion], delay: float) -> None:
    while True:
        data = source.recv(1 << 18)
        pipe.put((time.monotonic() + delay, data))
        if not data:
            return


def hand_on(pipe: queue.Queue[_Portion], sink: socket.socket) -> None:
    while True:
        due, data = pipe.get()
        time.sleep(max(0.0, due - time.monotonic()))
        if not data:
            return sink.shutdown(socket.SHUT_WR)
        sink.sendall(data)


if __name__ == "__main__":
    main()
