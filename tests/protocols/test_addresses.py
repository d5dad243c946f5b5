"""Addresses: what is one, what is none, and which belong to one operator."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain_protocols.addresses import is_private, join_address, split_address, subnet


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:1", "127.0.0.1", 1),
        ("[::1]:65535", "::1", 65535),
        ("gpu-7.lab_a.example:4242", "gpu-7.lab_a.example", 4242),
        ("localhost:80", "localhost", 80),
    ],
)
def test_addresses_go_there_and_back(text: str, host: str, port: int) -> None:
    assert split_address(text) == (host, port)
    assert join_address(host, port) == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no port"),
        ("host", "no port"),
        (":80", "empty"),
        ("::1:80", "brackets"),
        ("[::1]", r"\[host\]:port"),
        ("[::1", r"\[host\]:port"),
        ("[host]:80", "no IPv6"),
        ("a b:80", "characters"),
        ("a/b:80", "characters"),
        ("-a:80", "characters"),
        ("a:0", "1 to 65535"),
        ("a:65536", "1 to 65535"),
        ("a:+80", "1 to 65535"),
        ("a:٨٠", "1 to 65535"),
        ("a:80\n", "1 to 65535"),
        ("a" * 200 + ":80", "longer"),
    ],
)
def test_what_is_no_address_says_why(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        split_address(text)


@given(st.text(max_size=40))
def test_any_text_splits_or_says_why(text: str) -> None:
    try:
        host, port = split_address(text)
    except ValueError:
        return
    assert split_address(join_address(host, port)) == (host, port)


def test_subnets_are_what_one_operator_holds() -> None:
    assert subnet("198.51.100.7:1") == subnet("198.51.100.250:9") == "198.51.100.0/24"
    assert subnet("[2001:db8:1:2::3]:1") == subnet("[2001:db8:1:ffff::9]:1") == "2001:db8:1::/48"
    assert subnet("[2001:db8:2::1]:1") != subnet("[2001:db8:1::1]:1")
    assert subnet("Host.Example:5") == "host.example"
    assert [is_private(a) for a in ("127.0.0.1:1", "100.64.1.2:1", "[fd00::1]:1")] == [True] * 3
    assert not is_private("8.8.8.8:1")
    assert not is_private("host.example:1")
