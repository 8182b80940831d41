"""Addresses that a service tells others to reach it at."""

from __future__ import annotations

import socket

import pytest

from perigee.errors import InvalidArgumentError
from services.kit import addresses
from services.kit.addresses import advertised_host, is_loopback, join_address
from services.kit.config import ServerConfig
from services.weights.config import WeightsConfig


def test_what_is_configured_comes_first_and_then_what_is_bound() -> None:
    assert advertised_host(ServerConfig(host="0.0.0.0", advertise_host="pod-1")) == "pod-1"
    assert advertised_host(ServerConfig(host="10.1.2.3")) == "10.1.2.3"
    assert advertised_host(ServerConfig()) == "127.0.0.1"


def test_the_address_of_the_host_name_or_of_the_default_route_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"name": "10.0.0.7", "route": "10.0.0.8"}
    monkeypatch.setattr(addresses, "_address_of_name", lambda _: answers["name"])
    monkeypatch.setattr(addresses, "_address_of_route", lambda _: answers["route"])
    config = ServerConfig(host="0.0.0.0")
    assert advertised_host(config) == "10.0.0.7"
    answers["name"] = "127.0.1.1"  # Debian's, of a machine that has no name in DNS
    assert advertised_host(config) == "10.0.0.8"
    answers["route"] = "127.0.0.1"
    with pytest.raises(InvalidArgumentError, match=r"server\.advertise_host.*PERIGEE_ADVERTISE_HOST"):
        advertised_host(config)


def test_a_machine_without_a_route_has_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> str:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(addresses, "_address_of_name", unreachable)
    monkeypatch.setattr(addresses, "_address_of_route", unreachable)
    assert addresses.find_address(socket.AF_INET) is None


def test_addresses_of_ipv6_get_brackets() -> None:
    assert join_address("fd00::7", 50053) == "[fd00::7]:50053"
    assert join_address("pod-1", "50053") == "pod-1:50053"
    assert is_loopback("::1")
    assert not is_loopback("localhost.example")


def test_weights_are_not_promised_on_loopback_to_other_machines() -> None:
    assert WeightsConfig().reached_at("10.0.0.7").host == "10.0.0.7"
    assert WeightsConfig(host="rdma-1").reached_at("10.0.0.7").host == "rdma-1"
    assert WeightsConfig(host="127.0.0.1").reached_at("127.0.0.1").host == "127.0.0.1"
    with pytest.raises(InvalidArgumentError, match=r"weights\.host.*leave it out to take 10\.0\.0\.7"):
        WeightsConfig(host="127.0.0.1").reached_at("10.0.0.7")
