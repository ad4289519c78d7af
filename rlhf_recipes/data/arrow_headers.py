"""What a message of Arrow's IPC format unpacks to, by its header: pyarrow unpacks first and tells then.

https://arrow.apache.org/docs/format/Columnar.html, Message.fbs: a flatbuffer, whose tables begin with the distance to
a list of where their fields lie.
"""

from struct import unpack_from


def unpacked(message) -> tuple[int, int]:
    """Rows and bytes of a `pyarrow.ipc.Message`; 0 and 0 of one without rows.

    Raises:
        struct.error: its header points beyond its end.
    """
    if message.type not in ("record batch", "dictionary"):
        return 0, 0
    data, body = memoryview(message.metadata), message.body
    batch = _follow(data, _field(data, _follow(data, 0), 2))
    if message.type == "dictionary":  # a batch under its id
        batch = _follow(data, _field(data, batch, 1))
    length, buffers, compression = (_field(data, batch, number) for number in (0, 2, 3))
    rows = unpack_from("<q", data, length)[0] if length else 0
    if not buffers:
        return rows, 0  # no columns
    vector = _follow(data, buffers)
    count, sizes = unpack_from("<I", data, vector)[0], []
    for place in range(vector + 4, vector + 4 + 16 * count, 16):
        offset, size = unpack_from("<qq", data, place)
        whole = unpack_from("<q", body, offset)[0] if compression and size >= 8 else size
        sizes.append(size if whole < 0 else whole)  # -1: as it is
    return rows, sum(sizes)


def _follow(data: memoryview, place: int) -> int:
    """Where what is said to lie so far behind `place` lies."""
    return place + unpack_from("<I", data, place)[0]


def _field(data: memoryview, table: int, number: int) -> int:
    """Where a field of a table lies; 0 where it has its default."""
    fields = table - unpack_from("<i", data, table)[0]
    place = fields + 4 + 2 * number
    if place >= fields + unpack_from("<H", data, fields)[0]:
        return 0
    offset = unpack_from("<H", data, place)[0]
    return table + offset if offset else 0
