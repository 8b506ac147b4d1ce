"""A batch on a Ray cluster of two nodes on this machine, one of which is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgedit.apps.batch.checking import check_batch
from edgedit.apps.batch.ledger import Ledger
from edgedit.apps.batch.reporter import Reporter
from edgedit.apps.batch.run import Summary

pytest.importorskip("ray")
pytestmark = pytest.mark.full


@pytest.fixture
def cluster() -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=nodes.address, log_to_driver=False)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def test_the_jobs_of_a_lost_node_are_drawn_elsewhere_to_the_same_bytes(
    cluster: Any,
    write_jobs: Callable[..., Path],
    draw_batch: Callable[..., Summary],
    pictures: Callable[..., dict[str, bytes]],
    open_ledger: Callable[..., Ledger],
) -> None:
    from edgedit.apps.batch.ray_pool import RayPool, cluster_cores

    other = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    assert cluster_cores() == 2
    jobs = write_jobs([{"id": f"j{i}", "prompt": "a red cat", "seed": i, "steps": 30} for i in range(40)])
    draw_batch(jobs, "whole")

    class Losing(Reporter):
        def picture(self, entry: Any) -> None:
            super().picture(entry)
            if self.drawn == 8:
                cluster.remove_node(other, allow_graceful=False)

    summary = draw_batch(jobs, reporter=Losing(), make_pool=RayPool, workers=2, batch=1)
    assert (summary.done, summary.failed) == (40, 0)
    assert pictures() == pictures("whole")
    with open_ledger() as ledger:
        assert check_batch(ledger).problems == []
