"""Which IP addresses are public? One answer for lists of addresses and for connections.

By the IANA registries of special-purpose addresses, written out since what `ipaddress` calls global depends on the
version of Python. Standard library only: img2dataset's workers import it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

NOT_PUBLIC = tuple(
    ipaddress.IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",
        "100.64.0.0/10",  # behind a carrier's NAT; metadata of a cloud
        "127.0.0.0/8",
        "168.63.129.16/32",  # services of the host of a virtual machine, in Azure
        "169.254.0.0/16",  # link-local; metadata of most clouds
        "172.16.0.0/12",
        "192.0.0.0/24",  # protocols
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # relays of 6to4
        "192.168.0.0/16",
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
)
UNICAST = ipaddress.IPv6Network("2000::/3")  # all else is local, multicast, a translation or not given out
NOT_PUBLIC_UNICAST = tuple(
    ipaddress.IPv6Network(text)
    for text in (
        "2001::/23",  # protocols, Teredo and ORCHID among them
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4, which leads to any IPv4 address
        "3fff::/20",  # documentation
    )
)
# IPv4 hosts by other names: as a socket of both kinds tells them, and as a resolver of an IPv6-only network does
CARRIERS = (ipaddress.IPv6Network("::ffff:0:0/96"), ipaddress.IPv6Network("64:ff9b::/96"))


def may_reach(address: Address, opened: Sequence[Network] = ()) -> bool:
    """Whether an address is public, or lies in one of the networks that the user opened.

    An IPv4 address mapped into IPv6, or translated by the well-known prefix of NAT64, is judged by itself.
    """
    if any(address in network for network in opened if network.version == address.version):
        return True
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in NOT_PUBLIC)
    if any(address in network for network in CARRIERS):
        return may_reach(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF), opened)
    return address in UNICAST and not any(address in network for network in NOT_PUBLIC_UNICAST)
