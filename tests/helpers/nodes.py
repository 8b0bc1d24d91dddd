"""Two nodes on one machine, a launcher on each: two network namespaces that a cable joins, or the loopback.

A namespace lives as long as the process that holds it, which ends when its input does: whatever becomes of
the tests, the system takes namespaces and cable away.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager

from launches import WORKERS, environment, kept

ADDRESSES = ("10.87.0.1", "10.87.0.2")


class NotPermittedError(Exception):
    """This system lets nobody make a namespace here; the text is its reason."""


@contextmanager
def namespaces():
    """For each of two nodes a command that runs another one there, and its environment.

    Raises:
        NotPermittedError: the system makes no namespaces, or no cables.
    """
    if missing := [tool for tool in ("unshare", "nsenter", "ip") if shutil.which(tool) is None]:
        raise NotPermittedError(f"no {', '.join(missing)} here")
    is_root = os.geteuid() == 0
    with ExitStack() as stack:
        first = stack.enter_context(_holder([] if is_root else ["--map-root-user"]))
        inside = [["nsenter", "--target", str(first), "--net"]]
        if not is_root:
            # Both in the first one's user namespace, which may join them.
            inside[0] += ["--user", "--preserve-credentials"]
        second = stack.enter_context(_holder([], [] if is_root else inside[0]))
        inside.append([*inside[0][:2], str(second), *inside[0][3:]])
        _system([*inside[0], *f"ip link add node0 type veth peer name node1 netns {second}".split()])
        for k, address in enumerate(ADDRESSES):
            _system([*inside[k], *f"ip address add {address}/24 dev node{k}".split()])
            for device in (f"node{k}", "lo"):
                _system([*inside[k], *f"ip link set {device} up".split()])
        yield [(inside[k], {"GLOO_SOCKET_IFNAME": f"node{k}"}) for k in range(2)]


@contextmanager
def _holder(options, before=()):
    """The process that holds a network namespace of its own; its number."""
    command = [*before, "unshare", *options, "--net", "sh", "-c", "echo; exec cat"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        if not process.stdout.readline():
            raise NotPermittedError(process.stderr.read().strip())
        yield process.pid
        process.stdin.close()
        process.wait(timeout=60)


def _system(command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise NotPermittedError(f"{' '.join(command)}: {done.stderr.strip()}")


@contextmanager
def loopback():
    """The same of two nodes that share this machine's network."""
    yield [([], {"GLOO_SOCKET_IFNAME": "lo"})] * 2


def torchrun_on(nodes, rendezvous, script, out, *arguments, timeout=600):
    """As ``launches.torchrun``, by a launcher with one process on each of two ``nodes``.

    Args:
        rendezvous: torchrun's backend by which the launchers find each other.
    """
    addresses = ADDRESSES if nodes[0][0] else ("127.0.0.1", "127.0.0.1")
    # In a namespace every port is free.
    port = 29500 if nodes[0][0] else _free_port()
    started = []
    with ExitStack() as stack:
        told = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in nodes]
        for k, (inside, own) in enumerate(nodes):
            command = [*inside, sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
            command += ["--nproc-per-node=1", f"--node-rank={k}", f"--local-addr={addresses[k]}"]
            command += [f"--rdzv-backend={rendezvous}"]
            if rendezvous == "static":
                command += [f"--master-addr={addresses[0]}", f"--master-port={port}"]
            else:
                command += [f"--rdzv-endpoint={addresses[0]}:{port}", "--rdzv-id=nodes"]
                command += [f"--rdzv-conf=is_host={int(k == 0)}"]
            command += [str(WORKERS / script), str(out), *map(str, arguments)]
            started.append(subprocess.Popen(command, env=environment() | own, stderr=told[k]))
        try:
            codes = [process.wait(timeout=timeout) for process in started]
        finally:
            for process in started:
                process.kill()
        for file in told:
            file.seek(0)
        texts = [file.read() for file in told]
    assert codes == [0, 0], "\n...\n".join(text[:2000] + text[-2000:] for text in texts)
    return kept(out, len(nodes))


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
