#!/usr/bin/env python3
"""Restores a disk from a vmtide repository without vmtide.

Written from docs/repository-format.md alone, to prove that the document is enough, and as the last
resort of somebody who has a repository and nothing else. Reads only. Slow, small, and strict:
whatever is not as the document says is refused, and every byte is verified before it is written.

  restore.py REPO                        lists restore points
  restore.py REPO POINT                  lists the disks of one
  restore.py REPO POINT DISK OUT         restores a disk to a new raw image, sparse

POINT is an id, the beginning of one, or VM@latest. The password comes from VMTIDE_PASSWORD, from
--password-file, or from the terminal. Needs Python 3.9 with the packages blake3, cryptography,
zstandard and argon2-cffi (or cryptography 44 or newer for Argon2).
Exit codes: 0 done, 1 failed, 2 usage, 4 wrong password or denied, 5 damaged, 6 not found.
"""

import argparse
import datetime
import getpass
import json
import os
import re
import struct
import sys
from collections import OrderedDict

import blake3
import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

BLOCK = 4096
HEADER = TRAILER = 64
TAG = 16
DIRECTORY_SECTION = 2**64 - 1
ID = re.compile("[0-9a-f]{32}")
# Decompressed frames kept in memory, at most 4 MiB each.
FRAMES_KEPT = 48


class Failure(Exception):
    """Ends the program with one line and an exit code."""

    def __init__(self, code, text):
        super().__init__(text)
        self.code = code


def damaged(name, detail):
    return Failure(5, f"damaged {name}: {detail}")


def unsupported(name, what):
    return Failure(1, f"{name}: unsupported {what}")


def not_found(what):
    return Failure(6, f"{what} not found")


def checksum(data):
    return blake3.blake3(data).digest()


def need(condition, name, detail):
    if not condition:
        raise damaged(name, detail)


def decompress(name, data, limit):
    """One zstd frame of at most `limit` bytes, whatever its header claims."""
    try:
        content = zstandard.ZstdDecompressor().stream_reader(data).read(limit + 1)
    except zstandard.ZstdError as error:
        raise damaged(name, f"zstd: {error}") from None
    need(len(content) <= limit, name, f"decompresses to more than {limit} bytes")
    return content


def leb128(name, data):
    """The unsigned LEB128 numbers in `data`."""
    value = shift = 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte & 0x80:
            need(shift < 64, name, "a number is too long")
        else:
            need(shift == 7 or byte != 0, name, "a number is longer than it must be")
            need(value < 2**64, name, "a number is too large")
            yield value
            value = shift = 0
    need(shift == 0, name, "the last number is cut")


# ---------------------------------------------------------------- configuration and keys (§4, §5)


def document(name, data, kind, members):
    """A JSON object in clear with a checksum at its end."""
    need(len(data) <= 64 << 10, name, "longer than 64 KiB")
    body, tail = data[:-47], data[-47:]
    need(
        tail[:13] == b',"checksum":"' and tail[-2:] == b'"}',
        name,
        "it does not end in a checksum",
    )
    need(tail[13:45] == checksum(body)[:16].hex().encode(), name, "checksum does not match")
    try:
        value = json.loads(body + b"}")
    except ValueError as error:
        raise damaged(name, str(error)) from None
    need(isinstance(value, dict) and value.get("format") == kind, name, f"not a {kind}")
    if value.get("version") != 1:
        raise unsupported(name, f"version {value.get('version')}")
    need(set(value) == members, name, "unknown or missing members")
    return value


def hex_bytes(name, text, length):
    need(
        isinstance(text, str) and re.fullmatch("[0-9a-f]{%d}" % (2 * length), text),
        name,
        f"not {2 * length} hex digits",
    )
    return bytes.fromhex(text)


def argon2id(password, salt, memory_kib, iterations, lanes):
    try:
        from argon2.low_level import Type, hash_secret_raw
    except ImportError:
        from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

        kdf = Argon2id(
            salt=salt, length=32, iterations=iterations, lanes=lanes, memory_cost=memory_kib
        )
        return kdf.derive(password)
    return hash_secret_raw(
        password, salt, iterations, memory_kib, lanes, 32, Type.ID, version=19
    )


ALPHABET = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def canonical(password):
    """The 47 characters of a recovery key, however it is written; any other password as it is (§5.1)."""
    text = password.upper().translate(bytes.maketrans(b"OIL", b"011"), b"- \t\r\n")
    symbols = [ALPHABET.find(byte) for byte in text]
    if len(symbols) != 40 or -1 in symbols:
        return password
    for number in range(8):
        check = 0
        for symbol in reversed(symbols[5 * number : 5 * number + 4]):
            check = (check ^ symbol) << 1
            check ^= 0b100101 if check & 32 else 0
        if check ^ (number + 1) != symbols[5 * number + 4]:
            return password
    return b"-".join(text[5 * number : 5 * number + 5] for number in range(8))


class Repository:
    def __init__(self, path, password):
        self.path = path
        if not os.path.isfile(os.path.join(path, "vmtide.repo")):
            raise not_found(f"repository at {path}")
        name = "vmtide.repo"
        data = self.read(name)
        members = "format version id created chunk_size_bytes encryption master_key checksum"
        config = document(name, data, "vmtide repository", set(members.split()) - {"checksum"})
        self.id = hex_bytes(name, config["id"], 16)
        self.chunk_size = config["chunk_size_bytes"]
        need(
            self.chunk_size in [1 << bits for bits in range(14, 21)],
            name,
            "chunk_size_bytes is impossible",
        )
        self.sealed = config["encryption"] == "aes-256-gcm"
        if self.sealed:
            need(config["master_key"] is None, name, "master_key in clear")
            master = self.unlock(data, password())
        elif config["encryption"] == "none":
            master = hex_bytes(name, config["master_key"], 32)
        else:
            raise unsupported(name, f"encryption {config['encryption']!r}")
        derive = lambda context: blake3.blake3(master, derive_key_context=context).digest()
        self.chunk_id_key = derive("vmtide v1 chunk id")
        self.object_root = derive("vmtide v1 object key")

    def file(self, name):
        return open(os.path.join(self.path, name), "rb")

    def read(self, name):
        with self.file(name) as file:
            return file.read((64 << 10) + 1)

    def names(self, directory):
        try:
            return sorted(filter(ID.fullmatch, os.listdir(os.path.join(self.path, directory))))
        except FileNotFoundError:
            return []

    def unlock(self, config_data, password):
        """The master key from the first slot that opens (§5)."""
        slots, problem = [], None
        password = canonical(password)
        names = self.names("keys")
        # Of too many, which anybody can put there, those that were there first.
        age = lambda digits: os.stat(os.path.join(self.path, "keys", digits)).st_mtime_ns
        names = sorted(names, key=age)[:64] if len(names) > 64 else names
        for digits in names:
            try:
                slots.append(self.slot(digits))
            except Failure as failure:
                problem = failure
        slots = [slot for slot in slots if slot["repository"] == self.id.hex()]
        if not slots:
            raise problem or damaged("keys/", "no key slot is left")
        slots.sort(key=lambda slot: slot["kdf"]["memory_kib"] * slot["kdf"]["iterations"])
        for slot in slots:
            kdf = slot["kdf"]
            salt = bytes.fromhex(kdf["salt"])
            key = argon2id(password, salt, kdf["memory_kib"], kdf["iterations"], kdf["lanes"])
            associated = (
                b"vmtide key slot" + bytes.fromhex(slot["id"]) + checksum(config_data)
            )
            sealed = bytes.fromhex(slot["sealed_master_key"])
            try:
                return AESGCM(key).decrypt(bytes(12), sealed, associated)
            except InvalidTag:
                continue
        raise Failure(4, f"wrong password for {self.path}: no key slot opens with it")

    def slot(self, digits):
        name = f"keys/{digits}"
        members = "format version id repository label created kdf sealed_master_key"
        slot = document(name, self.read(name), "vmtide key slot", set(members.split()))
        need(slot["id"] == digits, name, "it has another slot's id")
        kdf = slot["kdf"]
        members = "algorithm version memory_kib iterations lanes salt"
        need(isinstance(kdf, dict) and set(kdf) == set(members.split()), name, "kdf")
        if (kdf["algorithm"], kdf["version"]) != ("argon2id", 19):
            raise unsupported(name, f"key derivation {kdf['algorithm']!r}")
        for member, limit in [("memory_kib", 256 << 10), ("iterations", 64), ("lanes", 16)]:
            value = kdf[member]
            need(type(value) is int and 0 < value <= limit, name, f"{member} is {value!r}")
        need(kdf["memory_kib"] * kdf["iterations"] <= 4 << 20, name, "its key costs too much")
        hex_bytes(name, kdf["salt"], 16)
        hex_bytes(name, slot["sealed_master_key"], 48)
        return slot


# ------------------------------------------------------------------------- binary objects (§3)

OBJECTS = {
    "pack": (b"VMTIDEPK", lambda digits: f"packs/{digits[:2]}/{digits}"),
    "map": (b"VMTIDEMP", lambda digits: f"maps/{digits}"),
    "point": (b"VMTIDEPT", lambda digits: f"points/{digits}"),
    "hold": (b"VMTIDEHD", lambda digits: f"holds/{digits}"),
    "release": (b"VMTIDEHR", lambda digits: f"released/{digits}"),
    "forward": (b"VMTIDEFW", lambda digits, owner: f"forward/{owner}/{digits}"),
    "judgement": (b"VMTIDERJ", lambda digits, owner: f"revoked/{owner}/judgement-{digits}"),
    "damaged": (b"VMTIDEDM", lambda digits: f"damaged/{digits}"),
    "healed": (b"VMTIDEHL", lambda digits: f"healed/{digits}"),
}
MAX_DIRECTORY = {kind: 256 << 20 if kind == "map" else 16 << 20 for kind in OBJECTS}


class Object:
    """A binary object: its header and trailer checked, its directory in memory."""

    def __init__(self, repository, kind, object_id, owner=None):
        magic, name = OBJECTS[kind]
        self.name = name(object_id.hex(), owner.hex()) if owner else name(object_id.hex())
        self.file = repository.file(self.name)
        size = os.fstat(self.file.fileno()).st_size
        need(size >= HEADER + TRAILER, self.name, f"only {size} bytes long")
        self.header = self.at(0, HEADER)
        version = struct.unpack_from("<H", self.header, 8)[0]
        if self.header[:8] == magic and version != 1:
            raise unsupported(self.name, f"version {version}")
        expected = struct.pack(
            "<8sHHI16s16s16s",
            magic,
            1,
            1 if repository.sealed else 0,
            repository.chunk_size,
            object_id,
            repository.id,
            owner or bytes(16),
        )
        need(self.header == expected, self.name, "its header is not its own")
        trailer = self.at(size - TRAILER, TRAILER)
        magic_end, offset, length, self.first, self.second = struct.unpack_from(
            "<8sQQII", trailer
        )
        need(magic_end == b"VMTIDEND", self.name, "no trailer at its end")
        need(
            offset >= HEADER
            and offset + length + TRAILER == size
            and length <= MAX_DIRECTORY[kind],
            self.name,
            "its directory is not before its trailer",
        )
        self.directory_offset = offset
        self.directory = self.at(offset, length)
        need(
            trailer[32:] == checksum(self.header + self.directory + trailer[:32]),
            self.name,
            "the hash of its directory does not match",
        )
        self.cipher = None
        if repository.sealed:
            key = blake3.blake3(magic + object_id, key=repository.object_root).digest()
            self.cipher = AESGCM(key)
        self.overhead = TAG if self.cipher else 0

    def at(self, offset, length):
        data = os.pread(self.file.fileno(), length, offset)
        need(len(data) == length, self.name, f"ends before {length} bytes at {offset}")
        return data

    def open_section(self, number, stored, associated=b""):
        if not self.cipher:
            return stored
        nonce = struct.pack("<Q4x", number)
        try:
            return self.cipher.decrypt(
                nonce, stored, self.header + struct.pack("<Q", number) + associated
            )
        except InvalidTag:
            raise damaged(self.name, f"section {number} does not open") from None

    def section(self, number, offset, length, expected, associated=b""):
        """A section outside the directory, verified by its checksum and its tag."""
        need(
            offset >= HEADER and offset + length <= self.directory_offset,
            self.name,
            f"section {number} is outside the object",
        )
        stored = self.at(offset, length)
        need(
            checksum(stored)[: len(expected)] == expected,
            self.name,
            f"section {number} at {offset} does not match its checksum",
        )
        return self.open_section(number, stored, associated)

    def pack_table(self, stored, associated=b""):
        table = self.open_section(DIRECTORY_SECTION, stored, associated)
        need(len(table) == 16 * self.second, self.name, "its pack table has another length")
        return [table[at : at + 16] for at in range(0, len(table), 16)]


# -------------------------------------------------------- packs, forwards, maps, points (§6 to §10)


class Pack:
    def __init__(self, repository, pack_id):
        self.repository = repository
        self.object = Object(repository, "pack", pack_id)
        name, directory = self.object.name, self.object.directory
        frames, chunks = self.object.first, self.object.second
        need(
            len(directory) == 32 * frames + 34 * chunks + self.object.overhead,
            name,
            "its directory has another length",
        )
        table = self.object.open_section(DIRECTORY_SECTION, directory[32 * frames :])
        self.chunks = [struct.unpack_from("<32sH", table, 34 * n) for n in range(chunks)]
        # Per frame: first ordinal, end ordinal, its number, its row, its first chunk.
        self.frames, ordinal, chunk = [], 0, 0
        end = HEADER
        for number in range(frames):
            row = struct.unpack_from("<QIHBB16s", directory, 32 * number)
            need(row[0] == end, name, f"frame {number} is not after the one before")
            end += row[1]
            need(1 <= row[2] <= 4096 and row[3] <= 1 and row[4] == 0, name, f"frame {number}")
            need(chunk + row[2] <= chunks, name, "its frames have more chunks than it")
            lengths = [blocks for _, blocks in self.chunks[chunk : chunk + row[2]]]
            need(all(1 <= blocks <= 1024 for blocks in lengths), name, "a chunk's length")
            need(sum(lengths) * BLOCK <= 4 << 20, name, f"frame {number} is too large")
            self.frames.append((ordinal, ordinal + sum(lengths), number, row, chunk))
            ordinal += sum(lengths)
            chunk += row[2]
        need(chunk == chunks, name, "its frames have fewer chunks than it")
        need(end == self.object.directory_offset, name, "something is after its frames")

    def frame_of(self, ordinal):
        low, high = 0, len(self.frames)
        while low < high:
            middle = (low + high) // 2
            if self.frames[middle][1] <= ordinal:
                low = middle + 1
            else:
                high = middle
        need(low < len(self.frames), self.object.name, f"it has no block {ordinal}")
        return self.frames[low]

    def content(self, frame):
        """The blocks of a frame, each chunk compared with its id."""
        first, end, number, (offset, length, count, compression, _, expected), chunk = frame
        name = self.object.name
        associated = struct.pack("<HBB", count, compression, 0)
        content = self.object.section(number, offset, length, expected, associated)
        size = (end - first) * BLOCK
        if compression == 1:
            content = decompress(name, content, size)
        need(len(content) == size, name, f"frame {number} has another length")
        at = 0
        for chunk_id, blocks in self.chunks[chunk : chunk + count]:
            part = content[at : at + blocks * BLOCK]
            found = blake3.blake3(part, key=self.repository.chunk_id_key).digest()
            need(found == chunk_id, name, f"a chunk in frame {number} is not what its id says")
            at += len(part)
        return content


def read_forwards(repository, pack_id):
    """Runs of all forwards of a pack that was moved; none where there is no forward."""
    runs = []
    for digits in repository.names(f"forward/{pack_id.hex()}"):
        try:
            runs.append(read_forward(repository, pack_id, bytes.fromhex(digits)))
        except FileNotFoundError:
            pass
    return runs


def read_forward(repository, pack_id, forward_id):
    """Runs (first ordinal, end, pack, new first ordinal) of a pack that was moved."""
    forward = Object(repository, "forward", forward_id, pack_id)
    name, directory = forward.name, forward.directory
    need(len(directory) == 40, name, "its directory has another length")
    length = struct.unpack_from("<Q", directory)[0]
    need(HEADER + length == forward.directory_offset, name, "something is after its runs")
    content = forward.section(0, HEADER, length, directory[8:40])
    content = decompress(name, content, 16 << 20)
    table = content[: 16 * forward.second]
    need(len(table) == 16 * forward.second, name, "its pack table is cut")
    packs = [table[at : at + 16] for at in range(0, len(table), 16)]
    numbers = list(leb128(name, content[len(table) :]))
    need(len(numbers) == 4 * forward.first, name, "it has another number of runs")
    runs, end = [], 0
    for at in range(0, len(numbers), 4):
        gap, count, pack, ordinal = numbers[at : at + 4]
        need(count >= 1 and pack < len(packs), name, f"run {at // 4}")
        runs.append((end + gap, end + gap + count, packs[pack], ordinal))
        end += gap + count
    return runs


def read_map_segment(repository, segment_id):
    """Runs (first block, end, pack or None for zeros, first ordinal), sorted."""
    segment = Object(repository, "map", segment_id)
    name, directory = segment.name, segment.directory
    table = directory[: 48 * segment.first]
    need(segment.first >= 1 and len(table) == 48 * segment.first, name, "its page table is cut")
    packs = segment.pack_table(directory[len(table) :], checksum(table))
    runs, offset_expected, last = [], HEADER, 0
    for number in range(segment.first):
        first, end, offset, length, count, expected = struct.unpack_from(
            "<QQQII16s", table, 48 * number
        )
        need(offset == offset_expected and length <= 266240, name, f"page {number}")
        need(first >= last and 1 <= count <= 4096, name, f"page {number}")
        offset_expected += length
        content = segment.section(number, offset, length, expected)
        numbers = leb128(name, decompress(name, content, 256 << 10))
        at = first
        for n in range(count):
            try:
                gap, blocks, pack = next(numbers), next(numbers), next(numbers)
                ordinal = next(numbers) if pack else 0
            except StopIteration:
                raise damaged(name, f"page {number} is cut") from None
            need(blocks >= 1 and (n or not gap), name, f"run {n} of page {number}")
            need(pack <= len(packs), name, f"run {n} of page {number} names no pack")
            need(ordinal + blocks <= 2**32 or not pack, name, f"run {n} of page {number}")
            at += gap
            runs.append((at, at + blocks, packs[pack - 1] if pack else None, ordinal))
            at += blocks
        need(next(numbers, None) is None, name, f"something follows the runs of page {number}")
        need(at == end and end < 2**48, name, f"page {number} ends elsewhere")
        last = end
    need(offset_expected == segment.directory_offset, name, "something is after its pages")
    return runs


def overlay(newer, older):
    """Both, sorted, with the newer over the older."""
    result, at = [], 0
    for first, end, pack, ordinal in older:
        while at < len(newer) and newer[at][1] <= first:
            result.append(newer[at])
            at += 1
        while first < end:
            if at == len(newer) or newer[at][0] >= end:
                result.append((first, end, pack, ordinal))
                break
            if first < newer[at][0]:
                result.append((first, newer[at][0], pack, ordinal))
            covered = newer[at][1]
            if covered <= end:
                result.append(newer[at])
                at += 1
            ordinal += max(covered - first, 0)
            first = max(first, covered)
    return result + newer[at:]


def read_record(repository, kind, object_id, owner=None):
    """The name and the JSON of an object that is one sealed document (§9)."""
    record = Object(repository, kind, object_id, owner)
    name, directory = record.name, record.directory
    need(len(directory) == 40, name, "its directory has another length")
    length = struct.unpack_from("<Q", directory)[0]
    need(HEADER + length == record.directory_offset, name, "something is after its content")
    need((record.first, record.second) == (0, 0), name, "its counts are not zero")
    content = record.section(0, HEADER, length, directory[8:])
    try:
        return name, json.loads(decompress(name, content, 8 << 20))
    except ValueError as error:
        raise damaged(name, f"its JSON: {error!r}") from None


def checked_point(name, value):
    try:
        for disk in value["disks"]:
            disk["map"] = [hex_bytes(name, digits, 16) for digits in disk["map"]]
            need(type(disk["size_bytes"]) is int and disk["size_bytes"] >= 0, name, "size_bytes")
            need(isinstance(disk["id"], str), name, "id of a disk")
        hex_bytes(name, value["id"], 16)
        return {**value, "vm": str(value["vm"]), "time": str(value["time"])}
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(name, f"its JSON: {error!r}") from None


def read_point(repository, point_id):
    point = checked_point(*read_record(repository, "point", point_id))
    need(point["id"] == point_id.hex(), f"points/{point_id.hex()}", "it has another point's id")
    return point


def read_held_point(repository, hold_id):
    """The restore point that a hold in force keeps (§9.1), or None."""
    name, value = read_record(repository, "hold", hold_id)
    if hold_id.hex() in repository.names("released"):
        try:
            release, content = read_record(repository, "release", hold_id)
            if content.get("id") == hold_id.hex():
                return None
        except (Failure, FileNotFoundError, AttributeError) as error:
            print(f"restore.py: passed over: {error}", file=sys.stderr)
    need(value.get("id") == hold_id.hex(), name, "it has another hold's id")
    try:
        until = value["until"]
        if until is not None:
            end = datetime.datetime.fromisoformat(until.split(".")[0].rstrip("Z") + "+00:00")
            if end <= datetime.datetime.now(datetime.timezone.utc):
                return None
        return checked_point(name, value["record"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(name, f"its JSON: {error!r}") from None


def read_all(repository, kind):
    """The name and the JSON of all records of a kind that can be read; and whether some cannot."""
    found, complete = {}, True
    for digits in repository.names(kind):
        try:
            found[digits] = read_record(repository, kind, bytes.fromhex(digits))
        except FileNotFoundError:
            pass  # Removed meanwhile.
        except Failure as failure:
            print(f"restore.py: passed over: {failure}", file=sys.stderr)
            complete = False
    return found, complete


# What is on record of a pack that is missing or does not open (§10.1).
WHOLE_PACK = (0, 2**32 - 1)


def read_damaged(repository):
    """What is on record as damaged (§10.1): (first ordinal, end) by pack; and whether all is known."""
    damaged_parts = {}
    found, complete = read_all(repository, "damaged")
    replaced = set()
    for _, value in found.values():
        if isinstance(value, dict) and isinstance(value.get("replaces"), list):
            replaced.update(map(str, value["replaces"]))
    for digits, (name, value) in found.items():
        try:
            for part in value["parts"] if digits not in replaced else ():
                first = part["first_block"]
                parts = damaged_parts.setdefault(hex_bytes(name, part["pack"], 16), [])
                parts.append((first, first + part["blocks"]))
        except (Failure, ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"restore.py: passed over: {name}: {error!r}", file=sys.stderr)
            complete = False
    return damaged_parts, complete


def read_healed(repository):
    """Runs (first ordinal, end, pack, new first ordinal) of packs that were damaged (§10.1)."""
    healed = {}
    for name, value in read_all(repository, "healed")[0].values():
        try:
            packs = [hex_bytes(name, pack, 16) for pack in value["packs"]]
            for old, first, count, new, target in value["runs"]:
                need(count >= 1, name, "an empty run")
                healed.setdefault(packs[old], []).append(
                    (first, first + count, packs[new], target)
                )
        except (Failure, ValueError, KeyError, TypeError, IndexError) as error:
            print(f"restore.py: passed over: {name}: {error!r}", file=sys.stderr)
    return healed


class Reader:
    """Reads blocks of packs, wherever prune has moved them."""

    def __init__(self, repository):
        self.repository = repository
        self.packs = OrderedDict()
        self.forwards = {}
        self.frames = OrderedDict()
        self.healed = read_healed(repository)
        self.damaged, self.damage_is_known = read_damaged(repository)

    def find(self, pack_id, ordinal, count):
        """The pack that a block is read from, the ordinal in it, and for how many blocks that holds:
        the original, unless it is on record as damaged or cannot be opened (§10.1)."""
        # Place, how many runs and forwards led there, whether a run did.
        queue, later, known = [((pack_id, ordinal), 0, False)], [], {(pack_id, ordinal)}
        on_record = failure = None
        while queue or later:
            late = not queue
            step = (later if late else queue).pop(0)
            (pack_id, ordinal), passed, by_run = step

            def add(target, run, position, passed=passed):
                if passed == 16 or target in known or len(known) == 64:
                    return False
                known.add(target)
                queue.insert(position, (target, passed + 1, run))
                return True

            if not late and self.healed:
                runs = self.healed.get(pack_id, [])
                parts = self.damaged.get(pack_id, [])
                edges = [edge - ordinal for run in runs + parts for edge in run[:2]]
                count = min([count] + [edge for edge in edges if edge > 0])
                over = [run for run in runs if run[0] <= ordinal < run[1]]
                for first, _, target, new in over:
                    add((target, new + ordinal - first), True, len(queue))
                doubtful = over and not self.damage_is_known
                if doubtful or any(first <= ordinal < end for first, end in parts):
                    later.append(step)
                    continue
            try:
                pack = self.pack(pack_id)
                if pack is None:
                    targets, count = self.moved(pack_id, ordinal, count)
                    name = OBJECTS["pack"][1](pack_id.hex())
                    # Any that leads to a pack is right (§10); the first is looked at first.
                    added = [add(target, by_run, 0) for target in reversed(targets)]
                    need(any(added), name, "moved too often, or in a circle")
                    continue
                pack.frame_of(ordinal)
            except (Failure, OSError) as error:
                # What became of the original says more than what became of a second place.
                if failure is None or (failure[1] and not by_run):
                    failure = (error, by_run)
                continue
            # That the pack opens speaks against a record that it does not.
            over = [part for part in self.damaged.get(pack_id, []) if part[0] <= ordinal < part[1]]
            if not late or (over and all(part == WHOLE_PACK for part in over)):
                return pack_id, ordinal, count
            on_record = on_record or (pack_id, ordinal)
        if on_record:
            return *on_record, count
        raise failure[0]

    def moved(self, pack_id, ordinal, count):
        """Where a block of a pack that was moved went by each of its forwards, and for how many
        blocks that holds."""
        places = []
        for forward in self.forwards[pack_id]:
            for first, end, target, new in forward:
                if first <= ordinal < end:
                    places.append((target, new + ordinal - first))
                    count = min(count, end - ordinal)
        name = OBJECTS["pack"][1](pack_id.hex())
        need(places, name, f"no forward says where block {ordinal} went")
        return places, count

    def pack(self, pack_id):
        """The pack, or None where it was moved."""
        if pack_id in self.forwards:
            return None
        if pack_id not in self.packs:
            try:
                self.packs[pack_id] = Pack(self.repository, pack_id)
            except FileNotFoundError:
                forwards = read_forwards(self.repository, pack_id)
                if not forwards:
                    raise damaged(OBJECTS["pack"][1](pack_id.hex()), "missing") from None
                self.forwards[pack_id] = forwards
                return None
            while len(self.packs) > 32:
                self.packs.popitem(last=False)[1].object.file.close()
        self.packs.move_to_end(pack_id)
        return self.packs[pack_id]

    def read(self, pack_id, ordinal, count):
        """Yields the content of `count` blocks in parts."""
        while count:
            found_id, found, most = self.find(pack_id, ordinal, count)
            pack = self.pack(found_id)
            frame = pack.frame_of(found)
            content = self.frame(found_id, pack, frame)
            part = min(most, frame[1] - found)
            at = (found - frame[0]) * BLOCK
            yield content[at : at + part * BLOCK]
            ordinal, count = ordinal + part, count - part

    def frame(self, pack_id, pack, frame):
        key = (pack_id, frame[2])
        if key not in self.frames:
            self.frames[key] = pack.content(frame)
            while len(self.frames) > FRAMES_KEPT:
                self.frames.popitem(last=False)
        self.frames.move_to_end(key)
        return self.frames[key]


# ------------------------------------------------------------------------------------ commands


def restore(repository, disk, out):
    blocks = -(-disk["size_bytes"] // BLOCK)
    need(len(disk["map"]) <= 64, f"disk {disk['id']}", "its map has more than 64 segments")
    runs = []
    for segment_id in disk["map"]:
        try:
            runs = overlay(runs, read_map_segment(repository, segment_id))
        except FileNotFoundError:
            raise damaged(f"maps/{segment_id.hex()}", "missing") from None
    reader, zeros = Reader(repository), bytes(BLOCK)
    partial = out + ".partial"
    # Not under its name before it is whole, and never over something else.
    if os.path.lexists(out):
        raise Failure(1, f"{out} already exists")
    with open(partial, "xb") as file:
        try:
            for first, end, pack_id, ordinal in runs:
                end = min(end, blocks)
                if pack_id is None or first >= end:
                    continue
                file.seek(first * BLOCK)
                for content in reader.read(pack_id, ordinal, end - first):
                    for at in range(0, len(content), BLOCK):
                        block = content[at : at + BLOCK]
                        if block == zeros:
                            file.seek(BLOCK, os.SEEK_CUR)
                        else:
                            file.write(block)
            file.truncate(disk["size_bytes"])
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            os.unlink(partial)
            raise
    os.rename(partial, out)


def points(repository):
    """All restore points, oldest first, and what cannot be read."""
    found, problems = [], []
    for digits in repository.names("points"):
        try:
            found.append(read_point(repository, bytes.fromhex(digits)))
        except Failure as failure:
            problems.append(failure)
        except FileNotFoundError:
            pass  # Forgotten meanwhile.
    # After the points: where one is gone, a hold may keep it.
    for digits in repository.names("holds"):
        try:
            held = read_held_point(repository, bytes.fromhex(digits))
            if held and all(point["id"] != held["id"] for point in found):
                found.append(held)
        except Failure as failure:
            problems.append(failure)
        except FileNotFoundError:
            pass  # Released meanwhile.
    counting = []
    for point in found:
        try:
            if counts(repository, point):
                counting.append(point)
        except Failure as failure:
            problems.append(failure)
            counting.append(point)
    return sorted(counting, key=lambda point: (point["time"].rstrip("Z"), point["id"])), problems


def counts(repository, point):
    """Whether all judgements of the lease that a restore point was made under name it (§11.3)."""
    lease = point.get("lease")
    if lease is None:
        return True
    hex_bytes(f"points/{point['id']}", lease, 16)
    try:
        names = os.listdir(os.path.join(repository.path, "revoked", lease))
    except FileNotFoundError:
        return True
    for name in sorted(names):
        if name.startswith("judgement-") and ID.fullmatch(name[len("judgement-") :]):
            judgement = bytes.fromhex(name[len("judgement-") :])
            _, value = read_record(repository, "judgement", judgement, bytes.fromhex(lease))
            if point["id"] not in value.get("points", []):
                return False
    return True


def resolve(found, spec):
    if spec.endswith("@latest"):
        matches = [point for point in found if point["vm"] == spec[: -len("@latest")]][-1:]
    else:
        matches = [point for point in found if point["id"].startswith(spec)]
    if not matches:
        raise not_found(f"restore point {spec}")
    if len(matches) > 1:
        raise Failure(1, f"{spec} fits {len(matches)} restore points")
    return matches[0]


def run(arguments):
    def password():
        if arguments.password_file:
            with open(arguments.password_file, "rb") as file:
                data = file.read()
                return re.sub(rb"\r?\n\Z", b"", data)
        if "VMTIDE_PASSWORD" in os.environ:
            return os.environb[b"VMTIDE_PASSWORD"]
        return getpass.getpass("Password: ").encode()

    repository = Repository(arguments.repository, password)
    found, problems = points(repository)
    if arguments.point is None:
        for point in found:
            disks = ", ".join(disk["id"] for disk in point["disks"])
            print(f"{point['id']}  {point['time']}  {point['vm']}  {disks}")
        for problem in problems:
            print(problem, file=sys.stderr)
        return 5 if problems else 0
    point = resolve(found, arguments.point)
    if arguments.disk is None:
        for disk in point["disks"]:
            print(f"{disk['id']}  {disk['size_bytes']} bytes")
        return 0
    disks = [disk for disk in point["disks"] if disk["id"] == arguments.disk]
    if not disks:
        raise not_found(f"disk {arguments.disk} in restore point {point['id']}")
    restore(repository, disks[0], arguments.out)
    return 0


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("repository", metavar="REPO")
    parser.add_argument("point", metavar="POINT", nargs="?")
    parser.add_argument("disk", metavar="DISK", nargs="?")
    parser.add_argument("out", metavar="OUT", nargs="?")
    parser.add_argument("--password-file", metavar="FILE")
    arguments = parser.parse_args()
    if arguments.disk is not None and arguments.out is None:
        parser.error("OUT is missing")
    try:
        return run(arguments)
    except Failure as failure:
        print(f"restore.py: {failure}", file=sys.stderr)
        return failure.code
    except PermissionError as error:
        print(f"restore.py: {error}", file=sys.stderr)
        return 4
    except OSError as error:
        print(f"restore.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
