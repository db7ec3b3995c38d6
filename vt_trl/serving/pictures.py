"""The picture of a request: from a ``data:`` URL, or from a host that the operator has named.

A server that fetches whatever address it is sent can be made to read what only it can reach. So remote pictures are
refused unless their host is named; then https only, no redirect, no proxy, and no address that is not public. The
connection goes to the address that was checked, so a name that changes its mind in between changes nothing.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from vt_trl.errors import ConfigError, DataError
from vt_trl.images import load_image
from vt_trl.serving.errors import ApiError, bad_request
from vt_trl.serving.limits import ServeLimits

Resolve = Callable[[str], Awaitable[Sequence[str]]]
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_SECONDS = 20.0  # for fetching a picture


async def resolve(host: str) -> list[str]:
    """All addresses of a host name."""
    found = await asyncio.get_running_loop().getaddrinfo(host, 443, type=socket.SOCK_STREAM)
    return sorted({entry[4][0] for entry in found})


class Pictures:
    """Reads pictures within the limits. ``hosts``: host names that may be fetched from, none by default.

    ``resolver`` and ``transport`` (httpx) are for tests.
    """

    def __init__(
        self, limits: ServeLimits, hosts: Sequence[str] = (), resolver: Resolve = resolve, transport: Any = None
    ):
        self.limits = limits
        self.hosts = frozenset(host.lower().rstrip(".") for host in hosts)
        self.resolver, self.transport = resolver, transport
        wrong = sorted(host for host in self.hosts if not host or set(host) & set("/:@*?#") or _is_address(host))
        if wrong:
            raise ConfigError(f"--allow-image-hosts holds {wrong[0]!r}; give bare host names, such as images.example.")

    async def read(self, url: str) -> Image.Image:
        """The upright RGB picture. Raises ApiError (400, or 504 when a host does not answer in time)."""
        data = self._decoded(url) if url[:5].lower() == "data:" else await self._fetched(url)
        try:
            return await asyncio.to_thread(load_image, data, max_decoded_pixels=self.limits.image_pixels)
        except DataError as error:
            raise bad_request(f"{error.reason}.", "invalid_image") from None

    def _decoded(self, url: str) -> bytes:
        head, comma, text = url.partition(",")
        if not comma or not head.lower().startswith("data:image/") or not head.lower().endswith(";base64"):
            raise bad_request(
                "The image's data URL must begin with data:image/...;base64, and hold base64.", "bad_url"
            )
        if len(text) > 4 * (self.limits.image_bytes // 3 + 1):
            raise self._too_large()
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise bad_request("The image's data URL holds no valid base64.", "bad_url") from None
        if len(data) > self.limits.image_bytes:
            raise self._too_large()
        return data

    def _too_large(self) -> ApiError:
        return bad_request(f"The image has more than {self.limits.image_bytes} bytes; shrink it.", "image_too_large")

    def _allowed(self, url: str) -> tuple[str, str]:
        """The host, and path with query, of an address that may be fetched."""
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError:
            raise bad_request("The image's address is no URL.", "bad_url") from None
        if not self.hosts:
            raise bad_request(
                "This server fetches no images; send the picture itself as a data:image/...;base64 URL.",
                "remote_image_refused",
            )
        if parts.scheme.lower() != "https" or host not in self.hosts or port not in (None, 443) or "@" in parts.netloc:
            raise bad_request(
                "This server does not fetch images from there; send a data: URL.", "remote_image_refused"
            )
        return host, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")

    async def _fetched(self, url: str) -> bytes:
        import httpx

        host, path = self._allowed(url)
        try:
            async with asyncio.timeout(_SECONDS):
                address = await self._public_address(host)
                place = f"[{address}]" if ":" in address else address
                async with (
                    httpx.AsyncClient(
                        follow_redirects=False, trust_env=False, timeout=_SECONDS, transport=self.transport
                    ) as client,
                    client.stream(
                        "GET",
                        f"https://{place}{path}",
                        headers={"Host": host, "Accept-Encoding": "identity"},
                        extensions={"sni_hostname": host},  # also the name that the certificate must have
                    ) as answer,
                ):
                    return await self._body(answer)
        except TimeoutError:
            raise ApiError(504, "The image's host did not answer in time.", "image_timeout", "messages") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError):
            raise bad_request("The image cannot be fetched from its host.", "image_unreachable") from None

    async def _public_address(self, host: str) -> str:
        addresses = await self.resolver(host)
        if not addresses or not all(_is_public(address) for address in addresses):
            raise bad_request("The image's host has an address that is not public.", "remote_image_refused")
        return addresses[0]

    async def _body(self, answer: Any) -> bytes:
        if answer.status_code != 200:  # a redirect too: it could lead anywhere
            raise bad_request(f"The image's host answered {answer.status_code}, not 200.", "image_unreachable")
        data = bytearray()
        async for chunk in answer.aiter_raw():
            data += chunk
            if len(data) > self.limits.image_bytes:
                raise self._too_large()
        return bytes(data)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_public(text: str) -> bool:
    """Whether an address is public, and so is the IPv4 address that some IPv6 addresses stand for."""
    address = ipaddress.ip_address(text.partition("%")[0])
    found = [address]
    if address.version == 6:
        found += [inner for inner in (address.ipv4_mapped, address.sixtofour) if inner is not None]
        if address in _NAT64:
            found.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return all(one.is_global and not one.is_multicast and not one.is_reserved for one in found)
