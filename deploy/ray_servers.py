"""Keep a `resnet serve` running on each node of the Ray cluster until Ctrl-C; its options are the arguments.

Examples:
  python deploy/ray_servers.py /models --port 8001
"""

import subprocess
import sys
from contextlib import suppress

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@ray.remote(num_cpus=1, max_retries=-1, retry_exceptions=True)
def serve(*options: str) -> None:
    """Run a server, and fail if it ends, so that Ray starts it again."""
    subprocess.run([sys.executable, "-m", "resnet", "serve", "--host", "0.0.0.0", *options], check=True)


ray.init("auto")
nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
places = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
servers = [serve.options(scheduling_strategy=place).remote(*sys.argv[1:]) for place in places]
print("servers on", ", ".join(nodes.values()), flush=True)
with suppress(KeyboardInterrupt):
    ray.get(servers)
