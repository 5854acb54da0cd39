"""Runs what the stand-in for the binding for Java asks for, over pipes; numbers are big-endian as in Java."""

import struct
import sys

import numpy as np
import onnxruntime

sessions, tensors = [], []
source, sink = sys.stdin.buffer, sys.stdout.buffer


def integer():
    return struct.unpack(">i", source.read(4))[0]


def text():
    head = source.read(2)
    return source.read(struct.unpack(">H", head)[0]).decode() if head else None


def say(*items):
    for item in items:
        if isinstance(item, int):
            sink.write(struct.pack(">i", item))
        else:
            sink.write(struct.pack(">H", len(item.encode())) + item.encode())


def kept(array):
    tensors.append(array)
    return len(tensors) - 1


while (command := text()) is not None:
    if command == "open":
        session = onnxruntime.InferenceSession(text(), providers=["CPUExecutionProvider"])
        sessions.append(session)
        names = [i.name for i in session.get_inputs()]
        say(len(sessions) - 1, len(names), *names)
    elif command == "tensor":
        dtype, shape = text(), [integer() for _ in range(integer())]
        say(kept(np.frombuffer(source.read(integer()), dtype).reshape(shape)))
    elif command == "run":
        session = sessions[integer()]
        given = {text(): tensors[integer()] for _ in range(integer())}
        names = [o.name for o in session.get_outputs()]
        results = session.run(names, given)
        say(len(names))
        for name, array in zip(names, results, strict=True):
            say(name, kept(array))
    elif command == "read":
        data = tensors[integer()].astype(np.float32).tobytes()
        say(len(data))
        sink.write(data)
    sink.flush()
