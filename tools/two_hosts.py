"""Test the loss of a host: train on two emulated hosts, cut one off, check that the other ends, and resume the run.

    sudo python tools/two_hosts.py --launcher torchrun --json two_hosts.json
    sudo python tools/two_hosts.py --launcher accelerate

The hosts are two network namespaces of this machine, joined by a virtual cable (requires root and `ip`), and share the
disk. One process trains on each. Three runs of the tiny model of `tools/soak.py`:

* whole: both hosts train to the end;
* cable: the cable is pulled in mid-run, so the first host gets no packet and no error from the second;
* killed: every process of the second host gets SIGKILL.

In the last two, the first host must end within --peer-timeout-s + --grace-s with the message of a lost process. After a
restart on both hosts, the log must equal that of the first run. Exit status 0 if all of this holds.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.soak import ROOT, TINY_RUN, comparable, make_data, num_lines

ADDRESSES = ("10.213.7.1", "10.213.7.2")
PORT = 29533
MESSAGE = "LostPeer: rank 0 of 2 lost another process"


class TwoHosts:
    """Two network namespaces joined by a cable, removed at the end."""

    def __init__(self) -> None:
        self.names = [f"pixelsail{os.getpid()}{letter}" for letter in "ab"]
        self.interfaces = ["cable0", "cable1"]

    def __enter__(self) -> "TwoHosts":
        """Make them."""
        for name in self.names:
            ip("netns", "add", name)
        first, second = self.names
        end, other = self.interfaces
        ip("link", "add", end, "netns", first, "type", "veth", "peer", "name", other, "netns", second)
        for name, interface, address in zip(self.names, self.interfaces, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", interface, "up")
        return self

    def __exit__(self, *_: object) -> None:
        """Remove them."""
        for name in self.names:
            ip("netns", "del", name)

    def pull_cable(self) -> None:
        """Disconnect the second host without notifying the first."""
        ip("-n", self.names[1], "link", "set", self.interfaces[1], "down")

    def plug_in(self) -> None:
        """Reconnect the second host."""
        ip("-n", self.names[1], "link", "set", self.interfaces[1], "up")

    def start(self, host: int, command: Sequence[str], output: Path, data: Path) -> subprocess.Popen[bytes]:
        """Start a command on a host."""
        own = {"GLOO_SOCKET_IFNAME": self.interfaces[host], "PIXEL_SAIL_DATA": str(data), "OMP_NUM_THREADS": "1"}
        with output.open("a") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], *command],
                cwd=ROOT,
                env=os.environ | own | {"TOKENIZERS_PARALLELISM": "false"},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def ip(*arguments: str) -> None:
    """Call ip(8). Raises: RuntimeError with its output."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}; network namespaces need root")


def command_line(launcher: str, host: int, overrides: Sequence[str]) -> list[str]:
    """Return the launch command of a host."""
    train = ["scripts/train.py", *TINY_RUN, "evals=[]", *overrides]
    programs = Path(sys.executable).parent
    if launcher == "torchrun":
        meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:{PORT}", "--rdzv-id=two_hosts"]
        # Both hosts have this machine's name, from which torchrun would derive which of them hosts the rendezvous.
        names = [f"--rdzv-conf=is_host={'false' if host else 'true'}", f"--local-addr={ADDRESSES[host]}"]
        return [str(programs / "torchrun"), "--nnodes=2", "--nproc-per-node=1", *meeting, *names, *train]
    return [
        *(str(programs / "accelerate"), "launch", "--use_deepspeed", "--num_machines=2", "--num_processes=2"),
        *(f"--machine_rank={host}", f"--main_process_ip={ADDRESSES[0]}", f"--main_process_port={PORT}"),
        *("--deepspeed_multinode_launcher=standard", "--mixed_precision=no", "--dynamo_backend=no", *train),
    ]


def start_both(hosts: TwoHosts, given: argparse.Namespace, run_dir: Path) -> list[subprocess.Popen[bytes]]:
    """Start a run on both hosts."""
    own = (f"run_dir={run_dir}", f"optim.steps={given.steps}", "checkpoint.every=4")
    overrides = (*own, f"watchdog.peer_timeout_s={given.peer_timeout_s}")
    return [
        hosts.start(
            host, command_line(given.launcher, host, overrides), output_of(run_dir, host), given.work.resolve() / "data"
        )
        for host in range(2)
    ]


def output_of(run_dir: Path, host: int) -> Path:
    """Return the file with the output of a host."""
    return run_dir.with_name(f"{run_dir.name}_{host}.txt")


def end_all(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the remaining processes of both hosts."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def train_to_the_end(hosts: TwoHosts, given: argparse.Namespace, run_dir: Path) -> list[str]:
    """Run on both hosts until the end; return the errors."""
    processes = start_both(hosts, given, run_dir)
    try:
        statuses = [process.wait(timeout=given.timeout_s) for process in processes]
    finally:
        end_all(processes)
    faults = [f"{run_dir.name}: host {host} ended with {status}" for host, status in enumerate(statuses) if status]
    lines = num_lines(run_dir / "log.jsonl")
    return faults if lines == given.steps else [*faults, f"{run_dir.name}: {lines} log lines, expected {given.steps}"]


def cut_off(hosts: TwoHosts, given: argparse.Namespace, how: str, run_dir: Path) -> dict[str, Any]:
    """Train, cut the second host off in mid-run, and return how and when the first one ended."""
    processes = start_both(hosts, given, run_dir)
    try:
        wait_for_lines(run_dir / "log.jsonl", given.steps // 3, processes, given.timeout_s)
        cut = time.monotonic()
        if how == "cable":
            hosts.pull_cable()
        else:
            os.killpg(processes[1].pid, signal.SIGKILL)
            kill_data_workers_and_trainer(hosts.names[1])
        status = processes[0].wait(timeout=given.timeout_s)
        seconds = time.monotonic() - cut
    finally:
        end_all(processes)
        hosts.plug_in()
    said = output_of(run_dir, 0).read_text(errors="replace")
    messages = [line for line in said.splitlines() if MESSAGE in line]
    return {"how": how, "status": status, "seconds": round(seconds, 1), "message": (messages or [""])[0][:300]}


def kill_data_workers_and_trainer(namespace: str) -> None:
    """Send SIGKILL to every process in a namespace: launchers put their children into separate process groups."""
    done = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True)
    for pid in map(int, done.stdout.split()):
        os.kill(pid, signal.SIGKILL)


def wait_for_lines(log: Path, number: int, processes: Sequence[subprocess.Popen[bytes]], timeout_s: float) -> None:
    """Wait until the log has `number` lines. Raises: RuntimeError if the run ends before or it takes too long."""
    deadline = time.monotonic() + timeout_s
    while num_lines(log) < number:
        if any(process.poll() is not None for process in processes) or time.monotonic() > deadline:
            raise RuntimeError(f"{log} did not reach {number} lines; see {output_of(log.parent, 0)}")
        time.sleep(0.05)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the three runs and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launcher", choices=("torchrun", "accelerate"), default="torchrun")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--peer-timeout-s", type=float, default=10.0)
    parser.add_argument("--grace-s", type=float, default=30.0, help="seconds for the launcher to end after its process")
    parser.add_argument("--timeout-s", type=float, default=400.0, help="time limit of one start")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/two_hosts"),
        help="work folder, emptied first except for the synthetic data",
    )
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    if os.geteuid() != 0 or shutil.which("ip") is None:
        print("two_hosts: needs root and the `ip` command (package iproute2)", file=sys.stderr)
        return 2
    work = given.work.resolve()
    make_data(work / "data")
    for path in work.iterdir():
        if path.is_dir() and path.name != "data":
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()
    faults, cuts = [], []
    with TwoHosts() as hosts:
        faults += train_to_the_end(hosts, given, work / "whole")
        for how in ("cable", "killed"):
            cut = cut_off(hosts, given, how, work / how)
            cuts.append(cut)
            print(cut, flush=True)
            if not cut["status"] or not cut["message"] or cut["seconds"] > given.peer_timeout_s + given.grace_s:
                faults.append(f"{how}: the first host did not end as expected: {cut}")
            faults += train_to_the_end(hosts, given, work / how)
            if comparable(work / how) != comparable(work / "whole"):
                faults.append(f"{how}: the log of the resumed run differs from that of the uninterrupted one")
    result = {"launcher": given.launcher, "steps": given.steps, "cuts": cuts, "faults": faults}
    print(json.dumps(result, indent=1))
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
