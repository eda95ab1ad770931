#!/usr/bin/env python3
"""Applies a delta of vmtide to a raw disk image without vmtide.

Written from docs/delta-format.md alone, to prove that the document is enough. Slow, small, and strict: all of the
delta is checked before the image is written.

  apply_delta.py DELTA            says what the delta holds
  apply_delta.py DELTA IMAGE      applies it to a raw image, in place

Needs Python 3.9 with the packages blake3 and zstandard. Exit codes: 0 done, 1 not the right image, 2 usage, 5 damaged.
"""

import struct
import sys

import blake3
import zstandard

KINDS = {1: "data", 2: "zero", 3: "unallocated"}


class Damaged(Exception):
    pass


def need(condition, what):
    if not condition:
        raise Damaged(what)


def take(file, length):
    data = file.read(length)
    need(len(data) == length, "the delta is torn")
    return data


def short(data, length=16):
    return blake3.blake3(data).digest()[:length]


def read_header(file):
    prelude = take(file, 16)
    magic, version, _minor, length = struct.unpack("<8sHHI", prelude)
    need(magic == b"VMTDELTA" and version == 1, "not a delta of version 1")
    need(104 <= length <= 65536, "the header's length")
    raw = prelude + take(file, length - 16)
    need(short(raw[:-16]) == raw[-16:], "the header's digest")
    flags, sector, granularity, frame_bytes, before, after, created = struct.unpack("<IIIIQQQ", raw[16:56])
    need(flags & ~1 == 0 and 4096 <= frame_bytes <= 8 << 20 and max(before, after) < 2**56, "the header's values")
    names, at = [], 88
    for _ in range(4):
        (count,) = struct.unpack_from("<H", raw, at)
        need(count <= 4096 and at + 2 + count <= length - 16, "a name in the header")
        names.append(raw[at + 2:at + 2 + count].decode())
        at += 2 + count
    return raw, dict(zip(("base_id", "new_id", "vm", "disk"), names), before=before, after=after,
                     frame_bytes=frame_bytes)


def read_record(file):
    head = take(file, 96)
    need(head[:4] == b"VMTR" and short(head[:88], 8) == head[88:] and head[72:88] == bytes(16), "a record's head")
    kind, encoding, flags, count, stored, first, end, size = struct.unpack("<BBHIIQQQ", head[4:40])
    need(kind in (1, 2) and encoding in (0, 1) and flags in (0, 1), "a record's kind")
    need(count <= 65536 and stored <= 8 << 20, "a record's sizes")
    body = take(file, count * 16 + stored)
    need(short(body) == head[40:56], "a record's body")
    return head, body, kind, encoding, flags, count, first, end, size


def frames(file, whole, header, positions):
    """Yields (extents, data, base digest), and ends after the end record; answers with that record's position."""
    at_disk, total = 0, [0] * 6
    while True:
        position = file.tell()
        head, body, kind, encoding, flags, count, first, end, size = read_record(file)
        whole.update(head)
        if kind == 2:
            return position, body, total
        need(count > 0 and at_disk <= first < end <= header["after"], "frames out of order")
        need(size <= header["frame_bytes"], "a frame's data")
        extents, at = [], first
        for index in range(count):
            offset, packed = struct.unpack_from("<QQ", body, index * 16)
            extent = (offset, packed & (2**56 - 1), KINDS.get(packed >> 56))
            need(extent[2] and extent[1] and offset >= at and offset + extent[1] <= end, "an extent")
            need(index or offset == first, "the first extent")
            at = offset + extent[1]
            extents.append(extent)
            total[("data", "zero", "unallocated").index(extent[2]) + 2] += extent[1]
        data = body[count * 16:]
        if encoding == 1:
            data = zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
        need(at == end and len(data) == size, "a frame is not what its head says")
        need(sum(length for _, length, kind in extents if kind == "data") == size, "a frame's data extents")
        total[0] += 1
        total[1] += count
        total[5] += len(body) - count * 16
        positions.append((first, position))
        yield extents, data, head[56:72] if flags else None
        at_disk = end


def walk(path, visit):
    """Checks a delta from beginning to end, calling `visit` with every frame."""
    with open(path, "rb") as file:
        raw, header = read_header(file)
        whole, positions = blake3.blake3(raw), []
        generator = frames(file, whole, header, positions)
        while True:
            try:
                visit(header, *next(generator))
            except StopIteration as stop:
                end_position, index, total = stop.value
                break
        trailer = take(file, 128)
        need(trailer[:8] == b"VMTDTAIL" and trailer[72:96] == bytes(24), "the trailer")
        *sums, said_end, stride, entries = struct.unpack("<7QII", trailer[8:72])
        stride_now = 1
        while len(positions[::stride_now]) > 65536:
            stride_now *= 2
        wanted = b"".join(struct.pack("<QQ", *entry) for entry in positions[::stride_now])
        need(sums == total and said_end == end_position, "the trailer's sums")
        need(index == wanted and stride == stride_now and entries * 16 == len(index), "the index")
        whole.update(trailer[:96])
        need(whole.digest() == trailer[96:] and not file.read(1), "the digest of the whole")
    return header, total, trailer[96:].hex()


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    header, total, digest = walk(sys.argv[1], lambda *_: None)
    print(header, dict(zip(("frames", "extents", "data", "zero", "unallocated", "stored"), total)), digest)
    if len(sys.argv) == 2:
        return
    with open(sys.argv[2], "r+b") as image:
        if image.seek(0, 2) != header["before"]:
            sys.exit("the image does not have the size of the delta's base")

        def check(header, extents, _data, base_digest):
            held = b""
            for offset, length, kind in extents:
                if kind == "data":
                    image.seek(offset)
                    held += image.read(min(length, max(0, header["before"] - offset))).ljust(length, b"\0")
            if base_digest is not None and short(held) != base_digest:
                sys.exit("the image is not the delta's base")

        def write(_header, extents, data, _base_digest):
            at = 0
            for offset, length, kind in extents:
                image.seek(offset)
                if kind == "data":
                    image.write(data[at:at + length])
                    at += length
                else:
                    for done in range(0, length, 1 << 20):
                        image.write(bytes(min(1 << 20, length - done)))

        walk(sys.argv[1], check)
        image.truncate(max(header["before"], header["after"]))
        walk(sys.argv[1], write)
        image.truncate(header["after"])


try:
    main()
except (Damaged, zstandard.ZstdError, UnicodeDecodeError, struct.error) as error:
    print(f"{sys.argv[1]}: damaged: {error}", file=sys.stderr)
    sys.exit(5)
