"""Inputs made to cost more than they weigh, each of about as many bytes as asked for."""

from __future__ import annotations

import functools
import io
import json
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

Grow = Callable[[int], bytes]


# -- JSON of the Open Inference Protocol ----------------------------------------------------------


def around(data: bytes, side: int = 8) -> bytes:
    """Return a request of one image whose data is this text."""
    head = f'{{"inputs":[{{"name":"images","shape":[1,1,{side},{side}],"datatype":"FP32","data":'
    return head.encode() + data + b"}]}"


def listed(item: bytes) -> Grow:
    """Return what makes the data a list of one item again and again."""
    return lambda size: around(b"[" + b",".join([item] * (size // (len(item) + 1))) + b"]")


def empty_strings_and_a_long_one(size: int) -> bytes:
    return around(b"[" + b'"",' * 1000 + b'"' + b"x" * size + b'"]')


def keys(size: int) -> bytes:
    return b"{" + b",".join(b'"%07d":0' % key for key in range(size // 12)) + b"}"


def side_field(name: str, value: bytes) -> Grow:
    def grow(size: int) -> bytes:
        request = json.loads(around(json.dumps([0.5] * 64).encode()))
        text = json.dumps({**request, name: "HERE"}).encode()
        return text.replace(b'"HERE"', value * (size // len(value)))

    return grow


def many_inputs(size: int) -> bytes:
    return b'{"inputs":[' + b",".join([b"{}"] * (size // 3)) + b"]}"


JSON: dict[str, Grow] = {
    "zeros": listed(b"0"),
    "empty strings": listed(b'""'),
    "empty strings and a long one": empty_strings_and_a_long_one,
    "empty lists": listed(b"[]"),
    "lists of lists": listed(b"[[[]]]"),
    "objects": listed(b"{}"),
    "nulls": listed(b"null"),
    "numbers that are hard to round": listed(b"2.2250738585072011e-308"),
    "one long number": lambda size: around(b"[0." + b"1" * size + b"]"),
    "one long whole number": lambda size: around(b"[" + b"1" * size + b"]"),
    "escapes": lambda size: around(b'["' + rb"\u0041" * (size // 6) + b'"]'),
    "nested lists": lambda size: around(b"[" * size),
    "nested objects": lambda size: around(b'{"a":' * (size // 5)),
    "lists closed": lambda size: around(b"[" * (size // 2) + b"]" * (size // 2)),
    "keys": keys,
    "spaces": lambda size: around(b" " * size + b"[0.5]"),
    "many inputs": many_inputs,
    "a long id": side_field("id", b"x"),
    "a deep id": side_field("id", b"["),
    "outputs": side_field("outputs", b'[{"name":"label"},'),
    "an unknown field": side_field("other", b"[0,"),
    "commas": lambda size: b"," * size,
    "zero bytes": bytes,
}


# -- multipart ------------------------------------------------------------------------------------

HEAD = b'--B\r\ncontent-disposition: form-data; name="images"\r\n\r\n'


def filled(piece: bytes) -> Grow:
    return lambda size: HEAD + piece * (size // len(piece)) + b"\r\n--B--\r\n"


def many_parts(size: int) -> bytes:
    part = HEAD + b"x\r\n"
    return part * (size // len(part)) + b"--B--\r\n"


def many_headers(size: int) -> bytes:
    line = b'content-disposition: form-data; name="images"\r\n'
    return b"--B\r\n" + line * (size // len(line)) + b"\r\nx\r\n--B--\r\n"


MULTIPART: dict[str, Grow] = {
    "almost boundaries": filled(b"\r\n--BX"),
    "beginnings of boundaries": filled(b"\r\n-"),
    "carriage returns": filled(b"\r"),
    "line ends": filled(b"\r\n"),
    "bare boundaries": filled(b"\r\n--B\r\n"),
    "many parts": many_parts,
    "many headers": many_headers,
    "one long header": lambda size: b"--B\r\ncontent-disposition: " + b";" * size,
    "a long name": lambda size: HEAD.replace(b"images", b"x" * size) + b"x\r\n--B--\r\n",
    "a preamble": lambda size: b"x" * size + b"\r\n" + HEAD + b"x\r\n--B--\r\n",
}
TYPES: dict[str, Grow] = {
    "semicolons": lambda size: b"multipart/form-data" + b";" * size,
    "quotes": lambda size: b'multipart/form-data; boundary="' + b'\\"' * (size // 2),
    "parameters": lambda size: b"multipart/form-data" + b";a=b" * (size // 4),
    "a long boundary": lambda size: b"multipart/form-data; boundary=" + b"B" * size,
}


# -- images ---------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(extra: bytes, after: bytes = b"") -> bytes:
    """Return an 8x8 PNG with chunks before and after its pixels."""
    header = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + b"\x50" * 8) * 8))
    begin = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return begin + extra + pixels + after + chunk(b"IEND", b"")


def chunks(kind: bytes, data: bytes) -> Grow:
    one = chunk(kind, data)
    return lambda size: png(one * (size // len(one)))


@functools.cache
def packed(size: int) -> bytes:
    return zlib.compress(bytes(size), 9)


def exif(tags: int, value: int) -> bytes:
    """Return EXIF whose tags all have the same long value."""
    entries = b"".join(struct.pack(">HHII", 1000 + tag, 1, value, 8) for tag in range(tags))
    directory = b"MM\0*" + struct.pack(">IH", 8, tags) + entries + bytes(4)
    return directory + bytes(max(0, value + 8 - len(directory)))


def encoded(kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (80, 80, 80)).save(file, kind, **options)
    return file.getvalue()


def segments(one: bytes) -> Grow:
    """Return what puts a JPEG segment in front of the others again and again."""
    plain = encoded("JPEG")
    return lambda size: plain[:2] + one * (size // len(one)) + plain[2:]


def marked(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 255, marker, len(data) + 2) + data


def webp(one: bytes) -> Grow:
    def grow(size: int) -> bytes:
        data = encoded("WEBP") + one * (size // len(one))
        return data[:4] + struct.pack("<I", len(data) - 8) + data[8:]

    return grow


IMAGES: dict[str, Grow] = {
    "png: empty chunks": chunks(b"prVt", b""),
    "png: empty pixels": chunks(b"IDAT", b""),
    "png: pixels byte by byte": lambda size: png(b"", chunk(b"IDAT", b"\0") * (size // 13)),
    "png: comments": chunks(b"tEXt", b"k\0v"),
    "png: packed comments": chunks(b"zTXt", b"k\0\0" + packed(1_000_000)),
    "png: international comments": chunks(b"iTXt", b"k\0\1\0\0\0" + packed(1_000_000)),
    "png: profiles": chunks(b"iCCP", b"k\0\0" + packed(1_000_000)),
    "png: palettes": chunks(b"PLTE", bytes(768)),
    "png: transparency": chunks(b"tRNS", b"\0\1"),
    "png: frames": chunks(b"fcTL", bytes(26)),
    "png: exif": lambda size: png(chunk(b"eXIf", exif(min(1000, size // 100), size // 2))),
    "png: exif of many tags": lambda size: png(chunk(b"eXIf", exif(min(60_000, size // 12), 0))),
    "png: more pixels than its size": lambda size: png(b"", chunk(b"IDAT", packed(100 * size))),
    "jpeg: fill bytes": segments(b"\xff"),
    "jpeg: comments": segments(marked(0xFE, b"")),
    "jpeg: tables": segments(marked(0xDB, b"\0" + b"\1" * 64)),
    "jpeg: profiles": segments(marked(0xE2, b"ICC_PROFILE\0\1\1")),
    "jpeg: exif": segments(marked(0xE1, b"Exif\0\0" + exif(300, 65_000))),
    "jpeg: photoshop": segments(marked(0xED, b"Photoshop 3.0\0" + b"8BIM" + bytes(8))),
    "jpeg: previews": segments(marked(0xE2, b"MPF\0" + exif(100, 4000))),
    "jpeg: restarts": lambda size: encoded("JPEG")[:-2] + b"\xff\xd0" * (size // 2) + b"\xff\xd9",
    "webp: chunks": webp(b"ABCD\0\0\0\0"),
    "webp: frames": webp(b"ANMF\x10\0\0\0" + bytes(16)),
    "webp: rest": webp(b"\0"),
    "noise": lambda size: np.random.default_rng(0).bytes(size),
}
