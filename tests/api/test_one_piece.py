"""A reply leaves in one piece: whoever gets its head gets its body, though the server is killed in between."""

from __future__ import annotations

import socket
import struct

import pytest

from tests.conftest import RunningService

DATA_SEGMENTS_IN = 152  # bytes before `tcpi_data_segs_in` in Linux's struct tcp_info


def segments_in(connection: socket.socket) -> int:
    """How many packets with data have come."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
    return int(struct.unpack_from("I", info, DATA_SEGMENTS_IN)[0])


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="only Linux counts packets")
@pytest.mark.parametrize(
    ("request_line", "end"),
    [
        (b"GET /version", b"}"),
        (b"GET /nothing", b"}"),
        (b"HEAD /docs", b"\r\n\r\n"),
        (b"GET /docs", b"</html>\n    "),
    ],
    ids=["a reply", "a refusal", "a head alone", "a page"],
)
def test_head_and_body_are_one_packet(service: RunningService, request_line: bytes, end: bytes) -> None:
    port = int(service.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        for count in (1, 2, 3):  # of the same connection
            connection.sendall(request_line + b" HTTP/1.1\r\nHost: service\r\n\r\n")
            answer = b""
            while not answer.endswith(end):
                answer += connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 ")
            assert segments_in(connection) == count
