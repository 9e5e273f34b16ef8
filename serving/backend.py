"""The engine process: it loads the models and computes, for front ends that take the requests.

The supervisor starts it, as `python -m serving.backend`; see `serving.supervisor`.
"""

from __future__ import annotations

from serving import child, policy, security
from serving.child import DRAIN, Child
from serving.command import loader, read_access, show_metrics
from serving.hub import Hub
from serving.models import Models
from serving.watcher import Watcher


def compute(process: Child) -> None:
    """Compute until the supervisor says that there is nothing more to come."""
    config = process.task.config
    access = read_access(config)
    security.warn_if_open(config.host, access.tls, access.token)  # once, not by every front end
    served = Models()
    watcher = Watcher(config.repository, served, loader(config), policy.parse(config.versions))
    if process.task.again:
        watcher.scan()  # what holds is served: one version that does not is no reason to serve nothing
    else:
        watcher.start()
    hub = Hub(process.door, served, watcher)
    show_metrics(config, served, hub.counts)
    process.report()
    while process.wait(config.watch or None) != DRAIN:
        watcher.scan()
        hub.publish()
    served.close()
    served.drain(config.grace)


if __name__ == "__main__":
    child.run(compute)
