"""Who may ask: the Host of a name that is ours, the token of the printed address, and for a change its form's too.

A page of anybody's that the browser shows may send requests to this machine (cross-site request forgery), and may make
its own name point here (DNS rebinding). The first has neither the cookie, which is SameSite=Strict, nor the form's
token, and another Origin; the second has another Host.
"""

import ipaddress
import secrets
import socket
from dataclasses import dataclass, field
from urllib.parse import urlsplit

LOCAL = ("127.0.0.1", "localhost", "::1")
BYTES = 24  # of a token
# What the browser is told with each answer. Without any Referer a form would come with `Origin: null`.
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
CLOSED = "Open the address that the command has printed."


@dataclass(frozen=True)
class Guard:
    """Whose requests are answered.

    Attributes:
        host: that the page is bound to.
        tokens: annotator -> token, in this process alone.
    """

    host: str
    tokens: dict[str, str] = field(repr=False)

    @classmethod
    def of(cls, host: str, annotators: list[str]) -> "Guard":
        return cls(host, {name: secrets.token_urlsafe(BYTES) for name in annotators})

    def is_local(self) -> bool:
        return self.host in LOCAL

    def knows_host(self, header: str | None) -> bool:
        """Whether a Host header, whatever its port (a tunnel has another), is no name of somebody else's."""
        try:
            name = urlsplit(f"//{header}").hostname or ""
        except ValueError:
            return False
        if name in LOCAL or name == self.host.lower():
            return True
        if self.is_local():
            return False
        own = {socket.gethostname().lower(), socket.getfqdn().lower()}
        return name in own or _is_address(name)  # an address is nobody's name, so it cannot be made to point here

    def annotator(self, token: str | None) -> str | None:
        """Whose token it is."""
        given = (token or "").encode()
        found = [name for name, own in self.tokens.items() if secrets.compare_digest(own.encode(), given)]
        return found[0] if found else None

    def may_change(self, annotator: str, token: str | None, origin: str | None, host: str | None) -> bool:
        """Whether a POST comes from the page that this person was given."""
        return self.annotator(token) == annotator and origin is not None and urlsplit(origin).netloc == host


def policy(nonce: str) -> str:
    """Content-Security-Policy: nothing is loaded, run or sent but what the page itself holds."""
    return (
        f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; img-src data:; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
