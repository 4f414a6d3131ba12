"""Compile `schemas/tinker.proto` into `tinker.binpb`, the descriptor that `protobuf.py` loads.

Run from a checkout, with grpcio-tools installed: `python -m tx_async.wire.generate_descriptor`.
"""

import importlib
import tempfile
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[2] / "schemas" / "tinker.proto"
DESCRIPTOR = Path(__file__).with_name("tinker.binpb")


def compile_descriptor() -> bytes:
    """The serialized FileDescriptorProto of the schema, without comments and positions."""
    from google.protobuf import descriptor_pb2

    protoc: Any = importlib.import_module("grpc_tools.protoc")

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "set.binpb"
        arguments = ["protoc", f"-I{SOURCE.parent}", f"--descriptor_set_out={output}", SOURCE.name]
        if protoc.main(arguments) != 0:
            raise SystemExit(f"{SOURCE} does not compile.")
        files = descriptor_pb2.FileDescriptorSet.FromString(output.read_bytes())
    return files.file[0].SerializeToString(deterministic=True)


if __name__ == "__main__":
    DESCRIPTOR.write_bytes(compile_descriptor())
    print(f"wrote {DESCRIPTOR}")
