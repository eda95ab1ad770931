"""``vmtide-rct``: the options of rct-service's own client, and some more."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any, Dict, List, Optional, TextIO

from . import __version__
from .client import AgentClient
from .download import DEFAULT_MAX_BYTES_PER_REQUEST, DownloadSummary, download_disk
from .errors import AgentError, UsageError

_EXAMPLES = """\
examples:
  vmtide-rct --base-url https://hv1:6677 --remote-vhd-path 'C:\\VMs\\web.vhdx' --show-rct-info
  vmtide-rct --base-url https://hv1:6677 --remote-vhd-path 'C:\\VMs\\web.vhdx' --local-disk-path web.raw
  vmtide-rct --base-url https://hv1:6677 --remote-vhd-path 'C:\\VMs\\web.vhdx' --local-disk-path web.raw --rct-id 'rctX:...'

The key comes from VMTIDE_AGENT_KEY or --auth-key-file; the certificate is checked by VMTIDE_AGENT_FINGERPRINT,
--fingerprint, --cert-path or the system's authorities.
exit codes: 0 done, 1 failed, 2 usage, 3 done with warnings, 4 wrong key or denied, 6 not found, 130 interrupted
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vmtide-rct",
        description="Bring a virtual disk here from vmtide's agent or rct-service: all of it, or what changed.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vmtide-rct {__version__}")
    parser.add_argument("--base-url", default="https://localhost:6677", metavar="URL", help="the agent [%(default)s]")
    key = parser.add_mutually_exclusive_group()
    key.add_argument("--auth-key", metavar="KEY", help="its key, which every user of this machine can see then")
    key.add_argument("--auth-key-file", metavar="FILE", help="the file with its key [the key in VMTIDE_AGENT_KEY]")
    parser.add_argument("--remote-vhd-path", required=True, metavar="PATH", help="the virtual disk on the agent's host")
    trust = parser.add_mutually_exclusive_group()
    trust.add_argument("--cert-path", metavar="FILE", help="authorities (PEM) to trust, or the agent's own certificate")
    trust.add_argument("--fingerprint", metavar="SHA256", help="the SHA-256 of its certificate [VMTIDE_AGENT_FINGERPRINT]")
    trust.add_argument("--insecure", action="store_true", help="take any certificate: whoever is on the way reads all")
    parser.add_argument("--rct-id", metavar="ID", help="only what changed since this tracking id")
    parser.add_argument(
        "--max-bytes-per-request",
        type=int,
        default=DEFAULT_MAX_BYTES_PER_REQUEST,
        metavar="BYTES",
        help="how much is asked for at once; 0 makes a request for every range [%(default)s]",
    )
    parser.add_argument("--freeze", action="store_true", help="read one moment of the disk, also while it is written")
    parser.add_argument("--resume", action="store_true", help="go on with a full download that was interrupted")
    parser.add_argument("--compress", action="store_true", help="have content compressed on the way")
    parser.add_argument("--retry-time", type=float, default=300.0, metavar="SECONDS", help="how long to wait for an agent that is gone [300]")
    parser.add_argument("--json", action="store_true", help="newline-delimited JSON; the last line is the summary")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--show-rct-info", action="store_true", help="show the disk and its change tracking")
    action.add_argument("--enable-rct", action="store_true", help="switch change tracking on")
    action.add_argument("--disable-rct", action="store_true", help="switch change tracking off; its ids are gone then")
    action.add_argument("--list-changes", action="store_true", help="show what changed since --rct-id")
    action.add_argument("--local-disk-path", metavar="FILE", help="bring the disk into this file (raw, sparse)")
    return parser


class _Output:
    """Text for people, or lines of JSON for programs."""

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self._as_json = as_json
        self._terminal: Optional[TextIO] = sys.stderr if not as_json and not quiet and sys.stderr.isatty() else None
        self._begun = time.monotonic()
        self._shown = 0.0

    def line(self, text: str) -> None:
        self._clear()
        if not self._as_json:
            print(text)

    def warning(self, text: str) -> None:
        self._clear()
        if self._as_json:
            print(json.dumps({"type": "warning", "message": text}))
        else:
            print(f"warning: {text}", file=sys.stderr)

    def summary(self, document: Dict[str, Any]) -> None:
        self._clear()
        if self._as_json:
            print(json.dumps({"type": "summary", **document}))

    def failed(self, text: str, code: int) -> int:
        self._clear()
        if self._as_json:
            print(json.dumps({"type": "error", "message": text, "exit_code": code}))
        else:
            print(f"error: {text}", file=sys.stderr)
        return code

    def progress(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._terminal is None or (now - self._shown < 0.2 and done < total):
            return
        self._shown = now
        rate = done / max(now - self._begun, 0.001)
        share = 100 * done // total if total else 100
        self._terminal.write(f"\r\x1b[K{share:3d} %  {_size(done)} of {_size(total)}  {_size(int(rate))}/s")
        self._terminal.flush()

    def _clear(self) -> None:
        if self._terminal is not None and self._shown:
            self._terminal.write("\r\x1b[K")
            self._terminal.flush()


def _size(count: int) -> str:
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def _key(args: argparse.Namespace) -> Optional[str]:
    if args.auth_key is not None:
        return str(args.auth_key)
    if args.auth_key_file is not None:
        with open(args.auth_key_file, encoding="utf-8") as file:
            return file.read(64 << 10).strip()
    return os.environ.get("VMTIDE_AGENT_KEY")


def _client(args: argparse.Namespace) -> AgentClient:
    fingerprint = args.fingerprint
    if fingerprint is None and args.cert_path is None and not args.insecure:
        fingerprint = os.environ.get("VMTIDE_AGENT_FINGERPRINT")
    return AgentClient(
        args.base_url,
        _key(args),
        ca_file=args.cert_path,
        fingerprint=fingerprint,
        insecure=args.insecure,
        retry_time=args.retry_time,
        compress=args.compress,
    )


def _info(client: AgentClient, path: str, output: _Output) -> int:
    info, state = client.info(path), client.tracking(path)
    kind = {2: "fixed", 3: "dynamic", 4: "differencing"}.get(info.provider_sub_type, "")
    image = {1: "ISO", 2: "VHD", 3: "VHDX", 4: "VHD set"}.get(info.virtual_storage_type, "disk")
    output.line(f"disk             {path}")
    output.line(f"kind             {image} {kind}".rstrip())
    output.line(f"virtual size     {_size(info.virtual_size)} ({info.virtual_size} bytes)")
    if info.parent_path:
        output.line(f"parent           {info.parent_path}")
    output.line(f"change tracking  {'on' if state.enabled else 'off'}")
    if state.most_recent_id:
        output.line(f"most recent id   {state.most_recent_id}")
        output.line(f"written since    {'yes' if state.newer_changes else 'no'}")
    output.summary({"disk": path, "info": vars(info), "rct": vars(state)})
    return 0


def _switch(client: AgentClient, path: str, enabled: bool, output: _Output) -> int:
    client.set_tracking(path, enabled)
    state = client.tracking(path)
    output.line(f"change tracking  {'on' if state.enabled else 'off'}")
    output.summary({"disk": path, "rct": vars(state)})
    return 0


def _list(client: AgentClient, path: str, tracking_id: Optional[str], output: _Output) -> int:
    if tracking_id is None:
        raise UsageError("--list-changes needs --rct-id")
    ranges = client.changes(path, tracking_id)
    for part in ranges:
        output.line(f"{part.offset} {part.length}")
    listed = [{"offset": part.offset, "length": part.length} for part in ranges]
    output.summary({"disk": path, "since": tracking_id, "changed_bytes": sum(p.length for p in ranges), "ranges": listed})
    return 0


def _download(client: AgentClient, args: argparse.Namespace, output: _Output) -> int:
    begun = time.monotonic()

    def run(**more: Any) -> DownloadSummary:
        return download_disk(
            client,
            args.remote_vhd_path,
            args.local_disk_path,
            tracking_id=args.rct_id,
            max_bytes_per_request=args.max_bytes_per_request,
            resume=args.resume,
            progress=output.progress,
            **more,
        )

    if args.freeze:
        with client.freeze([args.remote_vhd_path]) as moment:
            summary = run(moment=moment)
    else:
        summary = run()
    for warning in summary.warnings:
        output.warning(warning)
    output.line(
        f"{summary.level} download of {args.remote_vhd_path} to {summary.path}: {_size(summary.received_bytes)} in "
        f"{summary.ranges} ranges, after {time.monotonic() - begun:.1f} s"
    )
    if summary.tracking_id:
        output.line(f"tracking id for the next time: {summary.tracking_id}")
    output.summary({**vars(summary), "duration_ms": int((time.monotonic() - begun) * 1000)})
    return 3 if summary.warnings else 0


def _run(args: argparse.Namespace, output: _Output) -> int:
    if args.max_bytes_per_request < 0:
        raise UsageError("--max-bytes-per-request is 0 or more")
    with _client(args) as client:
        if args.show_rct_info:
            return _info(client, args.remote_vhd_path, output)
        if args.enable_rct or args.disable_rct:
            return _switch(client, args.remote_vhd_path, bool(args.enable_rct), output)
        if args.list_changes:
            return _list(client, args.remote_vhd_path, args.rct_id, output)
        return _download(client, args, output)


def main(arguments: Optional[List[str]] = None) -> int:
    """Runs the program. Returns its exit code."""
    args = _parser().parse_args(arguments)
    output = _Output(args.json, args.quiet)
    try:
        return _run(args, output)
    except AgentError as error:
        return output.failed(str(error), error.exit_code)
    except PermissionError as error:
        return output.failed(str(error), 4)
    except FileNotFoundError as error:
        return output.failed(str(error), 6)
    except (OSError, UnicodeDecodeError) as error:
        return output.failed(str(error), 1)
    except KeyboardInterrupt:
        return output.failed("interrupted", 130)


if __name__ == "__main__":
    sys.exit(main())
