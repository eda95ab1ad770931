"""Makes a delta between two disk images and applies it, with libvmtide through ctypes.

    python3 delta.py LIBVMTIDE DIRECTORY     makes its images below DIRECTORY
"""
import ctypes
import json
import os
import sys

Handle = ctypes.c_uint64
WriteCallback = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64)
ReadCallback = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64)


class OpenOptions(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_uint64),
        ("format", ctypes.c_char_p),
        ("snapshot", ctypes.c_char_p),
        ("search", ctypes.c_char_p),
        ("flags", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    ]


class DeltaOptions(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_uint64),
        ("base", ctypes.c_char_p),
        ("base_id", ctypes.c_char_p),
        ("new_id", ctypes.c_char_p),
        ("changes", ctypes.c_void_p),
        ("changes_count", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("level", ctypes.c_int32),
        ("granularity_bytes", ctypes.c_uint32),
        ("workers", ctypes.c_uint32),
        ("source_options", ctypes.POINTER(OpenOptions)),
        ("base_options", ctypes.POINTER(OpenOptions)),
    ]


class VmtideError(Exception):
    def __init__(self, status, message):
        super().__init__(f"{message} (status {status})")
        self.status = status


class Vmtide:
    def __init__(self, path):
        self.library = ctypes.CDLL(path)
        self.library.vmtide_error_message.restype = ctypes.c_char_p
        self.library.vmtide_error_message.argtypes = [Handle]
        self.library.vmtide_text_data.restype = ctypes.c_char_p
        self.library.vmtide_text_data.argtypes = [Handle]
        self.library.vmtide_close.argtypes = [Handle, ctypes.c_void_p]
        self.library.vmtide_open_handles.restype = ctypes.c_uint64
        if self.library.vmtide_abi_version() != 1:
            raise SystemExit("this program is for version 1 of the interface")

    def call(self, name, *arguments):
        """Calls what ends with an error object, and raises what it says."""
        error = Handle()
        status = getattr(self.library, name)(*arguments, ctypes.byref(error))
        if status != 0:
            message = self.library.vmtide_error_message(error.value).decode()
            self.library.vmtide_close(error.value, None)
            raise VmtideError(status, message)

    def text(self, name, *arguments):
        """The same of what answers with JSON."""
        text = Handle()
        self.call(name, *arguments, ctypes.byref(text))
        value = json.loads(self.library.vmtide_text_data(text.value))
        self.library.vmtide_close(text.value, None)
        return value


def main():
    library, directory = sys.argv[1:]
    vmtide = Vmtide(library)
    path = lambda name: os.path.join(directory, name).encode()
    old = bytearray(os.urandom(1 << 20) + bytes(7 << 20))
    new = bytearray(old)
    new[300_000:400_000] = os.urandom(100_000)
    new[5 << 20:6 << 20] = b"x" * (1 << 20)
    for name, content in (("old.raw", old), ("new.raw", new)):
        with open(path(name), "wb") as file:
            file.write(content)
    vmtide.text("vmtide_convert", path("old.raw"), None, path("disk.qcow2"), None, None)

    # Out: the delta comes piece by piece.
    stream = bytearray()

    @WriteCallback
    def write(_context, data, length):
        stream.extend(ctypes.string_at(data, length))
        return 0

    # What a guest writes to a raw image must not decide how the image is read.
    raw = OpenOptions(ctypes.sizeof(OpenOptions), b"raw")
    options = DeltaOptions(ctypes.sizeof(DeltaOptions), path("old.raw"), b"monday", b"tuesday",
                           source_options=ctypes.pointer(raw), base_options=ctypes.pointer(raw))
    made = vmtide.text(
        "vmtide_delta_create", path("new.raw"), ctypes.byref(options), None, write, None, None)
    assert made["new_id"] == "tuesday" and made["stream_bytes"] == len(stream), made

    # In: and goes back the same way.
    position = 0

    @ReadCallback
    def read(_context, buffer, capacity):
        nonlocal position
        piece = bytes(stream[position:position + capacity])
        ctypes.memmove(buffer, piece, len(piece))
        position += len(piece)
        return len(piece)

    applied = vmtide.text(
        "vmtide_delta_apply", None, read, None, path("disk.qcow2"), None, None)
    print(json.dumps(applied))
    vmtide.text("vmtide_convert", path("disk.qcow2"), None, path("back.raw"), None, None)
    with open(path("back.raw"), "rb") as file:
        assert file.read() == new, "the image is not what it should be"

    # The same delta does not begin where the image is now.
    position = 0
    try:
        vmtide.text("vmtide_delta_apply", None, read, None, path("disk.qcow2"), None, None)
        raise SystemExit("a delta was applied twice")
    except VmtideError as error:
        print(error)
    assert vmtide.library.vmtide_open_handles() == 0


main()
