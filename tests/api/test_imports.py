"""An upload that is refused is told by its files' names, without a path of this machine."""

import io
import json
import tarfile
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save

from tx_async.api.imports import _without_paths
from tx_async.errors import CorruptedCheckpoint

A = "base_model.model.lm_head.lora_A.weight"
SETTINGS = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}).encode()


def tar(**files: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


async def test_an_upload_of_a_dtype_that_is_not_read_is_named_without_a_path(client, scheduler, tiny_qwen3: Path):
    scheduler.base_model = msgspec.structs.replace(scheduler.base_model, path=str(tiny_qwen3))
    files = {"adapter_config.json": SETTINGS, "adapter_model.safetensors": save({A: np.zeros((2, 64), np.int32)})}
    answer = await client.post("/api/v1/import_adapter?name=x", content=tar(**files))
    assert answer.status_code == 400
    said = answer.json()["detail"]
    assert "in adapter_model.safetensors has dtype I32" in said and "/" not in said


def test_the_folder_itself_is_the_upload():
    with (
        pytest.raises(CorruptedCheckpoint, match=r"^The upload is damaged: a\.json misfits a\.json\.$"),
        _without_paths(Path("/x/y")),
    ):
        raise CorruptedCheckpoint("/x/y is damaged: /x/y/a.json misfits a.json.")
