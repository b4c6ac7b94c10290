"""Parts of `.npz` files, written by hand so that they can be wrong."""

import struct


def npy_header(descr, shape, *, fortran_order=False, version=(1, 0)):
    text = repr({"descr": descr, "fortran_order": fortran_order, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", len(text)) + text
