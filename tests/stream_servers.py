"""Cameras of the network, as far as tests need them: HTTP that sends JPEGs one after another, and RTSP."""

import base64
import http.server
import socketserver
import struct
import threading
from contextlib import contextmanager

import cv2
import numpy as np

SIZE = (48, 64)  # height and width, multiples of 16, which RTP's JPEG has to have


def jpeg(value, size=SIZE):
    return cv2.imencode(".jpg", np.full((*size, 3), value, np.uint8))[1].tobytes()


def authorized(header, user):
    return user is None or header == f"Basic {base64.b64encode(user.encode()).decode()}"


@contextmanager
def serving(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def mjpeg_server(connections, user=None):
    """`connections`: for each connection in turn, the grey levels of its frames; further ones are refused with 503.

    Yields the address without its user, and the list of requested paths.
    """
    left, asked = list(connections), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if not authorized(self.headers["Authorization"], user):
                self.send_response(401)
                self.send_header("WWW-Authenticate", 'Basic realm="camera"')
                self.end_headers()
                return
            if self.path.partition("?")[0].endswith((".jpg", ".mp4")):
                self.send_response(200)
                self.send_header("Content-Length", str(len(left[0])))
                self.end_headers()
                self.wfile.write(left[0])
                return
            self.send_response(200 if left else 503)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            for value in left.pop(0) if left else ():
                data = jpeg(value)
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
                self.wfile.write(head.encode() + data + b"\r\n")

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    with serving(server):
        yield f"127.0.0.1:{server.server_port}", asked


@contextmanager
def rtsp_server(connections, user=None):
    """The same as RTSP, with JPEG (RFC 2435) in RTP in the connection itself; others than those listed are closed."""
    left, asked = list(connections), []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            while True:
                line = self.rfile.readline().decode()
                if not line.strip():
                    return
                method, address, _ = line.split()
                headers = {}
                while line := self.rfile.readline().decode().strip():
                    name, _, value = line.partition(":")
                    headers[name.strip()] = value.strip()
                asked.append((method, address))
                if not left:
                    return
                if not authorized(headers.get("Authorization"), user):
                    self.answer(headers, "401 Unauthorized", 'WWW-Authenticate: Basic realm="camera"')
                elif method == "OPTIONS":
                    self.answer(headers, "200 OK", "Public: DESCRIBE, SETUP, PLAY, TEARDOWN")
                elif method == "DESCRIBE":
                    sdp = "v=0\r\no=- 1 1 IN IP4 127.0.0.1\r\ns=camera\r\nt=0 0\r\nm=video 0 RTP/AVP 26\r\n"
                    sdp += "a=framerate:25\r\na=control:track\r\n"
                    self.answer(headers, "200 OK", "Content-Type: application/sdp", body=sdp)
                elif method == "SETUP" and "TCP" not in headers["Transport"]:
                    self.answer(headers, "461 Unsupported Transport")
                elif method == "SETUP":
                    self.answer(
                        headers, "200 OK", "Session: 7", "Transport: RTP/AVP/TCP;unicast;interleaved=0-1;ssrc=1"
                    )
                elif method == "PLAY":
                    self.answer(headers, "200 OK", "Session: 7", "RTP-Info: url=track;seq=0;rtptime=0")
                    for i, value in enumerate(left.pop(0)):
                        packet = rtp_packet(jpeg(value), i)
                        self.wfile.write(struct.pack(">cBH", b"$", 0, len(packet)) + packet)
                    return
                else:
                    return

        def answer(self, headers, status, *lines, body=""):
            lines = [f"RTSP/1.0 {status}", f"CSeq: {headers.get('CSeq', 0)}", *lines, f"Content-Length: {len(body)}"]
            self.wfile.write(("\r\n".join(lines) + "\r\n\r\n" + body).encode())

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    with serving(server):
        yield f"127.0.0.1:{server.server_address[1]}", asked


def rtp_packet(data, number):
    """A small JPEG, of the tables and sampling that OpenCV writes, in one packet of RTP."""
    tables, at = b"", 2
    while data[at + 1] != 0xDA:
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] == 0xDB:
            segment = data[at + 4 : at + 2 + length]
            tables += b"".join(segment[i + 1 : i + 65] for i in range(0, len(segment), 65))
        at += 2 + length
    at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    header = struct.pack(">BBHII", 0x80, 0x80 | 26, number, 3600 * number, 1)
    kind = struct.pack(">BBHBBBB", 0, 0, 0, 1, 255, SIZE[1] // 8, SIZE[0] // 8)
    return header + kind + struct.pack(">BBH", 0, 0, len(tables)) + tables + data[at:-2]
