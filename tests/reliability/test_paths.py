"""Paths of checkpoints that lead to no file: refused in a paragraph, and never opened."""

import os
import socket

import pytest

import flows
from flows.training.checkpoint import CheckpointError, find_checkpoint, load_checkpoint

PATHS = {
    "pipe": "is no regular file but a pipe",
    "socket": "is no regular file but a socket",
    "/dev/zero": "is no regular file but a device",
    "link_to_pipe": "is no regular file but a pipe",
    "broken": "is a broken link to nowhere",
    "loop": "is a broken link to loop",
    "a" * 5000: "name too long",
    "x\0y": "null character",
    "~/run": "~ is not replaced by a home folder",
    "~nobody/run": "~ is not replaced by a home folder",
    "": "is empty; give the path",
    "s3://bucket/run": "is an address, which is not opened",
    "text/inside": "no checkpoint at text/inside",
    "run": "no checkpoint in the folder run|run is a folder",
}


@pytest.mark.parametrize("function", [find_checkpoint, load_checkpoint, flows.load])
@pytest.mark.parametrize("path", PATHS, ids=[repr(path[:12]) for path in PATHS])
def test_a_path_without_a_checkpoint(path, function, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
    for name, target in {"link_to_pipe": "pipe", "broken": "nowhere", "loop": "loop"}.items():
        os.symlink(target, name)
    (tmp_path / "text").write_text("x")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    for name in ("best.pt", "last.pt"):
        os.mkfifo(tmp_path / "run/checkpoints" / name)
    with pytest.raises(CheckpointError, match=PATHS[path]):
        function(path)
