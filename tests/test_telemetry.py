"""Nothing is told to other machines: no module of the package asks for an address, or leaves a file behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from distributed import Client, LocalCluster

#: what a child process does: look at the variable when onnxruntime is asked for, and note every use of the network
WATCHED = """
import json, os, sys, threading, time

told = {"at_import": [], "asked": [], "sockets": []}
done = threading.Event()


def note(event, arguments):
    if event == "import" and arguments[0] == "onnxruntime":
        told["at_import"].append(os.environ.get("ORT_DISABLE_TELEMETRY"))
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        told["asked"].append([event, repr(arguments[1:])])


def watch():  # native code opens sockets that Python's hooks do not see
    while not done.wait(0.002):
        for number in os.listdir("/proc/self/fd"):
            try:
                target = os.readlink(f"/proc/self/fd/{number}")
            except OSError:
                continue
            if target.startswith("socket:"):
                told["sockets"].append(target)


sys.addaudithook(note)
if os.path.isdir("/proc/self/fd"):
    threading.Thread(target=watch, daemon=True).start()
import numpy as np
from stimage_sd import models

extractor = models.get_extractor("efficientnet_lite0")
extractor(np.zeros((2, 64, 64, 3), np.uint8))
time.sleep(0.5)
done.set()
print(json.dumps(told))
"""


def test_networks_run_without_the_network_or_a_file_at_home(tmp_path: Path) -> None:
    home, temporary, cache = (tmp_path / name for name in ("home", "temporary", "cache"))
    for folder in (home, temporary, cache):
        folder.mkdir()
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "0", "HOME": str(home), "TMPDIR": str(temporary)}
    environment |= {"STIMAGE_SD_CACHE": str(cache)}
    environment |= {"NUMBA_CACHE_DIR": str(cache), "MPLCONFIGDIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["at_import"]
    assert set(told["at_import"]) == {"1"}
    assert told["asked"] == []
    assert told["sockets"] == []
    assert [path for folder in (home, temporary) for path in folder.rglob("*") if path.is_file()] == []


def test_workers_of_a_cluster_are_told_too() -> None:
    def in_worker() -> list[str | None]:
        import stimage_sd.models._extractors  # noqa: F401

        return [os.environ.get("ORT_DISABLE_TELEMETRY")]

    # workers whose own environment says nothing, or the contrary: the task brings the package along
    with (
        LocalCluster(
            n_workers=1, processes=True, dashboard_address=None, env={"ORT_DISABLE_TELEMETRY": "0"}
        ) as cluster,
        Client(cluster) as client,
    ):
        assert client.submit(in_worker, pure=False).result() == ["1"]
