#!/usr/bin/env python3
"""A host that only says who it is, with NTLM by pyspnego: another hand's keys, seals and bindings for vmtide's client.

    ntlm_peer.py [--certificate PEM] MODE

MODE is `ntlm` (the mechanism alone) or `negotiate` (within SPNEGO). It prints its port, then serves until its standard input
ends. With VMTIDE_PEER_FAULT=tamper:2 the second answer of every connection has a bit changed; with plain:2 it is not sealed.

Driven by crates/vmtide-wsman/tests/peer.rs.
"""

import argparse
import base64
import hashlib
import os
import re
import ssl
import struct
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import spnego
from spnego.channel_bindings import GssChannelBindings

USER, PASSWORD, DOMAIN = "operator", "Pässw0rd €", "LAB"
BOUNDARY = b"--Encrypted Boundary"
ANSWER = """<s:Envelope xmlns:s="http://www.w3.org/2003/05/soap-envelope"><s:Header/><s:Body>
<wsmid:IdentifyResponse xmlns:wsmid="http://schemas.dmtf.org/wbem/wsman/identity/1/wsmanidentity.xsd">
<wsmid:ProtocolVersion>http://schemas.dmtf.org/wbem/wsman/1/wsman.xsd</wsmid:ProtocolVersion>
<wsmid:ProductVendor>pyspnego</wsmid:ProductVendor><wsmid:ProductVersion>{user} {count}</wsmid:ProductVersion>
</wsmid:IdentifyResponse></s:Body></s:Envelope>"""


class Peer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.context, self.count = None, 0

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        offered = self.headers.get("Authorization", "")
        if offered.startswith("Negotiate "):
            self.login(base64.b64decode(offered.split(" ", 1)[1]))
        elif self.context is None or not self.context.complete:
            self.answer(401)
        else:
            self.serve(body)

    def login(self, token):
        if self.context is None or self.context.complete:
            bindings = None
            if self.server.certificate:
                digest = hashlib.sha256(self.server.certificate).digest()
                bindings = GssChannelBindings(application_data=b"tls-server-end-point:" + digest)
            self.context = spnego.server(
                protocol=self.server.mode, channel_bindings=bindings, options=spnego.NegotiateOptions.use_ntlm
            )
        try:
            reply = self.context.step(token)
        except spnego.exceptions.SpnegoError as error:
            print(f"refused: {error}", file=sys.stderr, flush=True)
            self.context = None
            self.answer(401)
            return
        self.answer(200 if self.context.complete else 401, token=reply)

    def serve(self, body):
        self.count += 1
        sealed = self.headers["Content-Type"].startswith("multipart/encrypted")
        if sealed:
            parts = re.split(BOUNDARY + rb"(?:\r\n|--\r\n)", body, maxsplit=2)
            declared = int(re.search(rb"Length=(\d+)", parts[1]).group(1))
            stream = body.split(b"Content-Type: application/octet-stream\r\n", 1)[1][: -len(BOUNDARY + b"--\r\n")]
            size = struct.unpack("<I", stream[:4])[0]
            plain = self.context.unwrap_winrm(stream[4 : 4 + size], stream[4 + size :])
            if len(plain) != declared:
                raise ValueError(f"{len(plain)} bytes where {declared} were declared")
        else:
            plain = body
        if b"Identify" not in plain:
            raise ValueError("what came is no Identify")
        text = ANSWER.format(user=self.context.client_principal, count=self.count).encode()
        fault, _, at = os.environ.get("VMTIDE_PEER_FAULT", "").partition(":")
        faulty = str(self.count) == at
        if not sealed or (faulty and fault == "plain"):
            self.answer(200, text, "application/soap+xml;charset=UTF-8")
            return
        header, data, _padding = self.context.wrap_winrm(text)
        if faulty and fault == "tamper":
            data = data[:-1] + bytes([data[-1] ^ 1])
        kind = "application/HTTP-SPNEGO-session-encrypted"
        message = (
            BOUNDARY + b"\r\n\tContent-Type: " + kind.encode()
            + b"\r\n\tOriginalContent: type=application/soap+xml;charset=UTF-8;Length=%d\r\n" % len(text)
            + BOUNDARY + b"\r\n\tContent-Type: application/octet-stream\r\n"
            + struct.pack("<I", len(header)) + header + data + BOUNDARY + b"--\r\n"
        )
        self.answer(200, message, f'multipart/encrypted;protocol="{kind}";boundary="Encrypted Boundary"')

    def answer(self, status, body=b"", kind=None, token=None):
        self.send_response(status)
        if token is not None or status == 401:
            value = "Negotiate" + (" " + base64.b64encode(token).decode() if token else "")
            self.send_header("WWW-Authenticate", value)
        if kind:
            self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--certificate", help="PEM of a certificate and its key: serve TLS, and want logins bound to it")
    parser.add_argument("mode", choices=["ntlm", "negotiate"])
    options = parser.parse_args()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Peer)
    server.daemon_threads, server.mode, server.certificate = True, options.mode, None
    if options.certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(options.certificate)
        with open(options.certificate, encoding="ascii") as file:
            pem = re.search("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", file.read(), re.S).group(0)
        server.certificate = ssl.PEM_cert_to_DER_cert(pem)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as users:
        users.write(f"{DOMAIN}:{USER}:{PASSWORD}\n")
        users.flush()
        os.environ["NTLM_USER_FILE"] = users.name
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(server.server_port, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
