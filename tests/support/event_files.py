"""Read TensorBoard's event files without TensorBoard."""

import struct
from pathlib import Path

import pytest


def logged(folder: Path) -> dict[tuple[str, int], float]:
    """Return the scalars of event files by name and step, without those that a later session removed."""
    proto = pytest.importorskip("tensorboardX.proto.event_pb2", reason="the extra logging")
    scalars: dict[tuple[str, int], float] = {}
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = proto.Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16
            if event.session_log.status == proto.SessionLog.START:
                scalars = {key: value for key, value in scalars.items() if key[1] < event.step}
            scalars |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    return scalars
