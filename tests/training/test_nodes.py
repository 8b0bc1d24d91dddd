"""Processes on two nodes, each with a launcher of its own, end as one process does with the mean loss."""

import os
import sys

import pytest
import torch
from launches import WORKERS
from nodes import NotPermittedError, loopback, namespaces, torchrun_on

sys.path.insert(0, str(WORKERS))

import on_nodes

pytestmark = pytest.mark.slow

NETWORKS = {
    "two networks, c10d": (namespaces, "c10d"),
    "two networks, static": (namespaces, "static"),
    # Where the system makes no namespaces, too.
    "one network, c10d": (loopback, "c10d"),
}


@pytest.fixture(scope="module", params=NETWORKS)
def nodes(request, tmp_path_factory):
    """What the process of each of two nodes got, and whether they are on networks of their own."""
    network, rendezvous = NETWORKS[request.param]
    try:
        with network() as both:
            results = torchrun_on(both, rendezvous, "on_nodes.py", tmp_path_factory.mktemp("nodes"))
    except NotPermittedError as error:
        pytest.skip(f"network namespaces are not to be had: {error}")
    return results, network is namespaces


def parameters_of(result):
    found = result["parameters"] if "parameters" in result else result["adapter"]
    return list(found.values()) if isinstance(found, dict) else found


def test_the_nodes_are_on_the_networks_that_they_should_be_on(nodes):
    results, of_their_own = nodes
    networks = {result["network"] for result in results} | {os.readlink("/proc/self/ns/net")}
    assert len(networks) == (3 if of_their_own else 1)


@pytest.mark.parametrize("way", on_nodes.WAYS)
def test_both_nodes_are_alike_bit_for_bit(nodes, way):
    first, second = (result[way] for result in nodes[0])
    assert first["history"] == second["history"] != []
    assert all(map(torch.equal, parameters_of(first), parameters_of(second)))


@pytest.mark.parametrize("way", on_nodes.WAYS)
def test_two_nodes_equal_one_process_with_the_averaged_loss(nodes, way):
    script, scenario = on_nodes.WAYS[way]
    together, alone = nodes[0][0][way], script.train_alone(scenario, 2)
    assert together["ranks"] == alone["ranks"]
    assert [row[:3] for row in together["history"]] == [tuple(row[:3]) for row in alone["history"]]
    # ddp's numbers are of float64.
    bound = 1e-9 if script is on_nodes.ddp else 1e-5
    for one, parameter in zip(parameters_of(together), parameters_of(alone), strict=True):
        assert (one - parameter).norm() <= bound * parameter.norm()
